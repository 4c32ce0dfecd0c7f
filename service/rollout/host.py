"""systemctl, docker and journalctl, called without a shell and never for longer than a time limit; docker's daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from rollout.errors import Failed, Refused
from rollout.text import tidy
from rollout.unixhttp import ExchangeError, UnixConnection, exchange

if TYPE_CHECKING:
    import subprocess

_QUERY_SECONDS = 30.0
# Asked while traffic may have to go back, for which the unit of the watch sets a limit.
_URGENT_SECONDS = 10.0
_DOCKER = "unix:///var/run/docker.sock"
_PROPERTIES = "ActiveState,SubState,Result,ExecMainStatus,InvocationID,NRestarts"


def run(command: list[str], timeout: float = _QUERY_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a program found on PATH; `timeout` in seconds. Raises Failed where it is missing or takes too long."""
    # Loaded only where a program is called: a rollback calls none.
    import shutil
    import subprocess

    program = shutil.which(command[0])
    if program is None:
        raise Failed(f"{command[0]} isn't on PATH: install it, or run on the appliance's host")
    try:
        # A session of its own: Ctrl-C is for the engine, which decides what has to be finished first.
        return subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"'{' '.join(command)}' didn't end within {timeout:g} s") from None
    except OSError as error:
        raise Failed(f"'{' '.join(command)}' can't be run: {error.strerror}") from None


class Unit(NamedTuple):
    """What systemd says about a unit."""

    active: str
    sub: str
    result: str
    exit_status: str
    invocation: str
    restarts: int

    def describe(self) -> str:
        """The state in words for a message."""
        return f"unit is {self.active} ({self.sub}), result {self.result}, exit status {self.exit_status}"


def unit_state(unit: str) -> Unit:
    """Ask systemd about a unit. Raises Failed."""
    answer = run(["systemctl", "show", "-p", _PROPERTIES, unit])
    if answer.returncode != 0:
        raise Failed(f"'systemctl show {unit}' failed: {tidy(answer.stderr) or f'exit status {answer.returncode}'}")
    values = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    restarts = values.get("NRestarts", "")
    return Unit(
        active=values.get("ActiveState", "") or "unknown",
        sub=values.get("SubState", "") or "unknown",
        result=values.get("Result", "") or "unknown",
        exit_status=values.get("ExecMainStatus", "") or "unknown",
        invocation=values.get("InvocationID", ""),
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


def restart_unit(unit: str, timeout: float) -> str | None:
    """Restart a unit; `timeout` in seconds. Returns systemd's complaint, or None. Raises Failed."""
    # After several failed starts systemd refuses any further one until the counter is reset.
    run(["systemctl", "reset-failed", unit])
    answer = run(["systemctl", "restart", unit], timeout)
    return None if answer.returncode == 0 else tidy(answer.stderr) or f"exit status {answer.returncode}"


def stop_unit(unit: str, timeout: float) -> None:
    """Stop a unit; `timeout` in seconds. Raises Failed."""
    answer = run(["systemctl", "stop", unit], timeout)
    if answer.returncode != 0:
        raise Failed(f"'systemctl stop {unit}' failed: {tidy(answer.stderr)}")


def unit_enabled(unit: str) -> bool:
    """Whether the unit starts at boot. Raises Failed."""
    return run(["systemctl", "is-enabled", unit]).stdout.strip() == "enabled"


def shutting_down() -> bool:
    """Whether systemd is about to stop the host, as far as it can be asked. Raises nothing."""
    try:
        return run(["systemctl", "is-system-running"], _URGENT_SECONDS).stdout.strip() == "stopping"
    except Failed:
        # Who asks sends traffic back where it isn't, which must not wait for a systemd that is at odds with itself.
        return False


def start_soon(unit: str) -> str | None:
    """Have a unit started without waiting for it. Returns systemd's complaint, or None; raises nothing."""
    try:
        answer = run(["systemctl", "start", "--no-block", unit], _URGENT_SECONDS)
    except Failed as fault:
        return fault.message
    return None if answer.returncode == 0 else tidy(answer.stderr) or f"exit status {answer.returncode}"


class Processor(NamedTuple):
    """What the processors have done since the boot, in clock ticks of all of them together."""

    ran: int
    # The programs were ready to run, and the hypervisor let other machines run instead.
    stolen: int


def processor() -> Processor | None:
    """The processors' times, of proc_stat(5), or None where they can't be told."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in line.split()[1:9])
    except (OSError, IndexError, ValueError):
        return None
    return Processor(user + nice + system + irq + softirq, steal)


def boot() -> str | None:
    """What no two boots of this host have in common, or None where it can't be told."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A container that boots anew has the kernel's id of before: its first process began at another time.
        began = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{kernel}-{began}"


def enable_unit(unit: str) -> None:
    """Make the unit start at boot. Raises Failed."""
    answer = run(["systemctl", "enable", unit])
    if answer.returncode != 0:
        raise Failed(f"'systemctl enable {unit}' failed: {tidy(answer.stderr)}")


def last_journal_line(unit: str, since: float) -> str | None:
    """The last thing that the unit's own process said since `since` (seconds since the epoch), or None."""
    # The unit's process, not systemd's remarks about it: those only repeat the state.
    match = f"_SYSTEMD_UNIT={unit}"
    try:
        answer = run(["journalctl", match, "-n", "1", "-o", "cat", "--no-pager", "--quiet", f"--since=@{int(since)}"])
    except Failed:
        return None
    lines = [line for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode != 0 or not lines:
        return None
    try:
        return tidy(json.loads(lines[-1])["message"])
    except (ValueError, KeyError, TypeError):
        return tidy(lines[-1])


def ended_with(unit: str, status: int, since: float, before: str | None) -> bool:
    """Whether the unit's process ended with `status` since `since`, in another invocation than `before`."""
    about = [f"UNIT={unit}", f"EXIT_STATUS={status}", "-o", "json", "--no-pager", "--quiet", f"--since=@{int(since)}"]
    try:
        answer = run(["journalctl", *about])
        return any(json.loads(line).get("INVOCATION_ID") != before for line in answer.stdout.splitlines())
    except (Failed, ValueError, AttributeError):
        # It's said why a start failed, as far as that is known.
        return False


def image_id(image: str, timeout: float = _QUERY_SECONDS) -> str:
    """The id of an image on this host; `timeout` in seconds.

    Raises Refused where there is none, Failed where docker can't say.
    """
    # From the daemon itself: its client takes longer to start than a rollback may take.
    # The colours' units ask the one of this host, whatever a person's environment says.
    address = os.environ.get("DOCKER_HOST", "")
    if not address.startswith("unix://"):
        address = _DOCKER
    # Docker's own address is often a link; nobody but root can make one of it.
    path = Path(os.path.realpath(address.removeprefix("unix://")))
    connection = UnixConnection(path, timeout)
    try:
        answer = exchange(connection, "GET", f"/images/{quote(image, safe='/:@')}/json", timeout=timeout)
        about = json.loads(answer.body)
        if answer.status == 200:
            return about["Id"]
        complaint = about["message"]
        if answer.status == 404 and "no such image" in complaint.lower():
            raise Refused(f"the image {image} isn't on this host: build or load it first")
    except PermissionError:
        complaint = f"{path} may not be used by this user"
    except (ExchangeError, ValueError, KeyError, TypeError, AttributeError) as error:
        complaint = f"no usable answer on {path}: {error}"
    finally:
        connection.close()
    raise Failed(
        f"docker can't say whether the image {image} exists: {tidy(complaint)}; is the docker service running?"
    )
