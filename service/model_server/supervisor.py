"""The parent: loads the model, forks the other processes, replaces those that die, and ends them in order.

It stays single-threaded and serves nothing itself, so that it can fork safely at any time.
"""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from model_server.bundle import Bundle
from model_server.config import Config, ConfigError
from model_server.control import run_control
from model_server.jobs import create as create_jobs
from model_server.logs import Log
from model_server.metrics import Metrics
from model_server.state import Phase, SharedState
from model_server.web import TURN_SECONDS

if TYPE_CHECKING:
    from model_server.core import Models

_BACKLOG = 1024
_JOBS = "jobs"
_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGCHLD))
# How often the parent looks at the workers: while the first ones start, and afterwards at least.
_STARTING_TURN_SECONDS = 0.02
_TURN_SECONDS = 5.0
# Given to a job beyond its time, in which the process for jobs ends it by itself, unless the model's code lets no other
# thread run. Its turn, and each wait for a file that others write to, may take five seconds, and there are several.
_JOB_MARGIN_SECONDS = 30.0
# Given to workers beyond their drain before they are killed.
_KILL_MARGIN_SECONDS = 2.0
_CONTROL_STOP_SECONDS = 3.0


@dataclass
class Backoff:
    """How long to wait before a replacement: not at all the first time, then ever longer, up to ten seconds.

    A process that has lived for a minute counts as sound again.
    """

    FIRST_SECONDS = 0.25
    LONGEST_SECONDS = 10.0
    STABLE_SECONDS = 60.0

    failures: int = 0

    def next_delay(self, lived_seconds: float) -> float:
        """Seconds to wait, given how long the process lived that has just died."""
        if lived_seconds >= self.STABLE_SECONDS:
            self.failures = 0
        self.failures += 1
        if self.failures == 1:
            return 0.0
        # The exponent is bounded too: a float overflows after a thousand failures.
        return min(self.FIRST_SECONDS * 2 ** min(self.failures - 2, 16), self.LONGEST_SECONDS)


@dataclass(eq=False)
class _Slot:
    """One role, filled by one process after the other."""

    role: str
    run: Callable[[], None]
    # What is asked of it, where it answers anybody.
    listener: socket.socket | None = None
    path: Path | None = None
    worker: int | None = None
    pid: int | None = None
    started: float = 0.0
    due: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)

    def hide(self) -> None:
        """Have connections refused for a while: nginx then takes the next worker instead of waiting for this one."""
        self.path.rename(_hidden(self.path))

    def show(self) -> None:
        """Take connections again."""
        if self.path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            _hidden(self.path).rename(self.path)

    def close(self) -> None:
        """Make sure that nobody connects any more."""
        if self.path is None or self.listener is None:
            return
        self.path.unlink(missing_ok=True)
        _hidden(self.path).unlink(missing_ok=True)
        self.listener.close()


class Supervisor:
    """Runs the processes of one container."""

    def __init__(self, config: Config, bundle: Bundle, metrics: Metrics, metrics_directory: str, log: Log) -> None:
        self._config = config
        self._bundle = bundle
        self._metrics = metrics
        self._metrics_directory = metrics_directory
        self._log = log
        self._state = SharedState(config.workers)
        self._slots: list[_Slot] = []
        self._port: socket.socket | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises BundleError; no worker socket exists then."""
        # A process in a container has no default reaction to a signal, and loading may take long.
        signal.signal(signal.SIGTERM, _exit_at_once)
        signal.signal(signal.SIGINT, _exit_at_once)
        try:
            if self._config.jobs is not None:
                # Before any worker asks for it. What can't be made the process for jobs tries again, and tells.
                create_jobs(self._config.jobs)
            # Before PyTorch is imported: the control process needs none of it, and health can say "starting".
            gc.collect()
            gc.freeze()
            self._slots.append(self._control_slot())
            self._start(self._slots[0])
            started = time.monotonic()
            self._load_workers()
            self._state.set_loaded()
            loaded = time.monotonic() - started
            self._log.info("model_loaded", f"{self._bundle.label} is loaded", seconds=round(loaded, 3))
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            for slot in self._slots[1:]:
                self._start(slot)
            self._supervise()
            self._stop()
        except _Stopped:
            return
        finally:
            self._end_everything()

    def _control_slot(self) -> _Slot:
        path = self._config.control_socket
        listener = _listen(path)

        def run() -> None:
            run_control(
                listener, self._config, self._bundle, self._metrics, self._metrics_directory, self._state, self._log
            )

        return _Slot("control", run, listener, path)

    def _load_workers(self) -> None:
        # Imported here and not above: with the import starts PyTorch, which the control process is to do without.
        from model_server.loading import load
        from model_server.worker import run_worker

        models = load(self._bundle)
        self._port = _listen_on_port(self._config)
        shared = [] if self._port is None else [self._port]

        def slot(index: int) -> _Slot:
            path = self._config.worker_socket(index)
            listener = _listen(path)

            def run() -> None:
                run_worker(
                    index,
                    [listener, *shared],
                    models,
                    self._config,
                    self._bundle,
                    self._metrics,
                    self._metrics_directory,
                    self._state,
                    self._log,
                )

            return _Slot(f"worker-{index}", run, listener, path, worker=index)

        # All of them before the first fork, so that each child can close those of the others.
        for index in range(self._config.workers):
            self._slots.append(slot(index))
        if self._config.jobs is not None:
            self._slots.append(self._jobs_slot(models))

    def _jobs_slot(self, models: "Models") -> _Slot:
        from model_server.jobs.consumer import run_consumer

        return _Slot(_JOBS, lambda: run_consumer(models, self._config, self._metrics, self._state, self._log))

    def _start(self, slot: _Slot) -> None:
        parent = os.getpid()
        slot.started = time.monotonic()
        slot.pid = os.fork()
        if slot.pid == 0:
            self._become(slot, parent)

    def _become(self, slot: _Slot, parent: int) -> None:
        """The life of a child, from the fork to its end."""
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # An interrupt from a terminal reaches every process; the parent alone decides what it means.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            _die_with(parent)
            for other in self._slots:
                if other is not slot and other.listener is not None:
                    other.listener.close()
            # Whoever holds it has the kernel accept connections, also when no worker is left.
            if self._port is not None and slot.worker is None:
                self._port.close()
            self._metrics.become(slot.role)
            slot.run()
            status = 0
        except BaseException as error:
            self._log.error("process_failed", f"{slot.role} failed", error)
        finally:
            # Not sys.exit: what the parent has on its stack is the parent's to finish.
            os._exit(status)

    def _supervise(self) -> None:
        while True:
            self._announce_start()
            due = [slot.due for slot in self._slots if slot.pid is None]
            # Half the limit, so that a worker is noticed soon after it has reached that.
            timeout = min(_TURN_SECONDS, self._config.hang_seconds / 2)
            if due:
                timeout = min(timeout, max(0.0, min(due) - time.monotonic()))
            if self._state.phase is Phase.STARTING:
                timeout = min(timeout, _STARTING_TURN_SECONDS)
            turn = time.monotonic()
            received = signal.sigtimedwait(_SIGNALS, timeout)
            if received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT):
                return
            for slot in self._reap():
                self._plan_replacement(slot)
            now = time.monotonic()
            # A turn that took much too long: the whole container was frozen, and the workers have yet to catch up.
            if now - turn < timeout + 1:
                self._kill_hung()
            for slot in self._slots:
                if slot.pid is None and slot.due <= now:
                    self._replace(slot)

    def _replace(self, slot: _Slot) -> None:
        try:
            self._start(slot)
        except OSError as error:
            # The system is out of processes or memory; what still runs goes on, and this is tried again.
            delay = slot.backoff.next_delay(0.0)
            self._log.error("fork_failed", f"{slot.role} is tried again in {delay:g} s", error, role=slot.role)
            self._delay(slot, delay)
            return
        slot.show()
        if slot.worker is not None:
            self._state.count_restart()

    def _kill_hung(self) -> None:
        for slot in self._slots:
            if slot.pid is None or (what := self._hang(slot)) is None:
                continue
            self._log.error("worker_hung", f"{slot.role} {what} and is killed", role=slot.role)
            self._signal([slot], signal.SIGKILL)
            # Once is enough; the end is reaped like any other.
            self._clear(slot)

    def _hang(self, slot: _Slot) -> str | None:
        """What shows that a process hangs, or None."""
        if slot.role == _JOBS:
            seconds = self._state.job_seconds
            is_late = seconds > self._config.jobs.longest_seconds + _JOB_MARGIN_SECONDS
            return f"is at one job for {seconds:.1f} s" if is_late else None
        if slot.worker is None:
            return None
        busy, silent = self._state.busy_seconds(slot.worker), self._state.silent_seconds(slot.worker)
        limit = self._config.hang_seconds
        if busy > limit:
            return f"is at one prediction for {busy:.1f} s"
        # Idle workers give a sign of life at each turn of their loop only.
        return f"is silent for {silent:.1f} s" if silent > limit + 2 * TURN_SECONDS else None

    def _clear(self, slot: _Slot) -> None:
        """Forget what a process had said of itself."""
        if slot.worker is not None:
            self._state.clear(slot.worker)
        elif slot.role == _JOBS:
            self._state.set_job_running(False)

    @staticmethod
    def _delay(slot: _Slot, seconds: float) -> None:
        slot.due = time.monotonic() + seconds
        if seconds and slot.worker is not None:
            with contextlib.suppress(FileNotFoundError):
                slot.hide()

    def _announce_start(self) -> None:
        if self._state.phase is Phase.STARTING and self._state.ready == self._state.wanted:
            self._state.phase = Phase.SERVING
            self._config.startup_error_file.unlink(missing_ok=True)
            self._log.info("ready", f"{self._bundle.label} is ready with {self._state.wanted} workers")

    def _plan_replacement(self, slot: _Slot) -> None:
        lived = time.monotonic() - slot.started
        delay = slot.backoff.next_delay(lived)
        self._delay(slot, delay)
        self._log.error(
            "process_died",
            f"{slot.role} died after {lived:.1f} s and is replaced in {delay:g} s",
            role=slot.role,
            lived_seconds=round(lived, 3),
            delay_seconds=delay,
        )

    def _reap(self) -> list[_Slot]:
        """Bury the dead; the slots that are empty now."""
        empty = []
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return empty
            if pid == 0:
                return empty
            for slot in self._slots:
                if slot.pid == pid:
                    slot.pid = None
                    self._clear(slot)
                    self._metrics.forget(slot.role)
                    empty.append(slot)

    def _stop(self) -> None:
        self._state.phase = Phase.DRAINING
        self._log.info("draining", "accepted requests are finished, new ones are refused")
        control, *others = self._slots
        # First out of everybody's reach, so that a worker which has emptied its backlog knows it has seen all.
        if self._port is not None:
            self._port.close()
        for slot in others:
            slot.close()
        self._end(others, self._config.drain_seconds + _KILL_MARGIN_SECONDS)
        self._end([control], _CONTROL_STOP_SECONDS)
        self._log.info("stopped", f"{self._bundle.label} is stopped")

    def _end(self, slots: list[_Slot], seconds: float) -> None:
        """Ask the processes to end and kill those that are still there after ``seconds``."""
        self._signal(slots, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while any(slot.pid is not None for slot in slots) and (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait((signal.SIGCHLD,), left)
            self._reap()
        self._signal(slots, signal.SIGKILL)

    def _end_everything(self) -> None:
        self._signal(self._slots, signal.SIGKILL)
        for slot in self._slots:
            if slot.pid is not None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(slot.pid, 0)
            slot.close()
        self._metrics.remove_files()

    @staticmethod
    def _signal(slots: list[_Slot], number: int) -> None:
        for slot in slots:
            if slot.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, number)


def remove_stale_sockets(directory: Path) -> None:
    """Remove what a killed container left behind. Raises OSError."""
    for path in (*directory.glob("worker-*.sock"), *directory.glob(".worker-*.sock"), directory / "control.sock"):
        path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """A socket at `path`. Raises ConfigError where it can't be made."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode is set at creation: between bind and a chmod anybody could connect.
    mask = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise ConfigError(f"MODEL_SOCKET_DIR: {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def _listen_on_port(config: Config) -> socket.socket | None:
    """A TCP socket that all workers accept from. Raises ConfigError where it can't be had."""
    if config.port is None:
        return None
    try:
        return socket.create_server(
            (config.host, config.port),
            family=socket.AF_INET6 if ":" in config.host else socket.AF_INET,
            backlog=_BACKLOG,
        )
    except OSError as error:
        raise ConfigError(f"MODEL_HOST and MODEL_PORT: {config.host}:{config.port}: {error.strerror}") from error


class _Stopped(BaseException):
    """A signal came while the model was being loaded. Not SystemExit, which the model's code may raise too."""


def _exit_at_once(*_: object) -> None:
    raise _Stopped


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; a worker alone would hold its socket for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
