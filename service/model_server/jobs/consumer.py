"""The process that runs jobs, one at a time, with less claim to the processor than the workers have."""

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable

from model_server import payload
from model_server.config import Config
from model_server.core import Models
from model_server.failures import log_failure
from model_server.jobs import Outage, create
from model_server.jobs.queue import Queue
from model_server.jobs.store import Job, Store
from model_server.logs import Log
from model_server.metrics import Metrics
from model_server.state import SharedState
from model_server.worker import prove

# How often the consumer says that it is alive, and how long it must have been silent for others to take its jobs.
_TURN_SECONDS = 5.0
SILENT_SECONDS = 120.0
# How often an idle consumer looks for a new job.
_POLL_SECONDS = 0.2
_NICENESS = 10
# How often a file that can't be used is tried again.
_UNAVAILABLE_SECONDS = 5.0


def run_consumer(models: Models, config: Config, metrics: Metrics, state: SharedState, log: Log) -> None:
    """Run the colour's jobs until SIGTERM; the one that runs then gets the drain's time and is handed back after it.

    Raises RuntimeError where a job takes too long, since only the end of the process stops it, and sqlite3.Error.
    """
    os.nice(_NICENESS)
    prove(models)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    # As at the start; a disk that was full then may have room by now.
    outage = Outage(log)
    while (problem := create(config.jobs)) is not None:
        outage.begin(problem)
        if signal.sigtimedwait((signal.SIGTERM,), _UNAVAILABLE_SECONDS) is not None:
            return
    outage.end()
    consumer = _Consumer(models, config, metrics, log, state.set_job_running)
    consumer.begin()
    while signal.sigtimedwait((signal.SIGTERM,), _TURN_SECONDS) is None:
        consumer.turn()
    consumer.end(config.drain_seconds)


class _Consumer:
    """The main thread keeps the tables in order; a thread of its own runs the models, for as long as that takes.

    ``busy`` is called with True and False around each job: a model that lets no other thread run stops the main one,
    too, and it is for the parent to notice.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        metrics: Metrics,
        log: Log,
        busy: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._models = models
        self._versions = {model.name: model.version for model in models.all}
        self._names = list(self._versions)
        self._colour = config.colour
        self._longest_seconds = config.jobs.longest_seconds
        self._log = log
        self._metrics = metrics
        self._busy = busy
        self._store = Store(config.jobs)
        self._queue = Queue(config.jobs, config.colour, self._run)
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._started = time.monotonic()
        self._outage = Outage(log)
        self._stopping = False
        self._failure: BaseException | None = None
        # The job that runs, and since when, of time.monotonic.
        self._current: tuple[Job, float] | None = None

    def begin(self) -> None:
        """Take up what the last consumer of this colour has left, and start."""
        left, failed = self._store.recover(self._colour, self._names)
        if left:
            self._log.warning(
                "jobs_left", f"{left} jobs of models that aren't served here wait for a colour that does", jobs=left
            )
        for job in failed:
            self._note(job, "failed")
        # The table has all of it, and in the right order.
        self._refill()
        self._upkeep()
        self._thread.start()

    def turn(self) -> None:
        """What has to be done every few seconds."""
        if self._failure is not None:
            raise self._failure
        job, since = self._current or (None, 0.0)
        if job is not None and time.monotonic() - since > self._longest_seconds:
            if self._store.fail(job, f"it took longer than {self._longest_seconds} s"):
                self._note(job, "failed")
            raise RuntimeError(f"job {job.id} takes longer than {self._longest_seconds} s")
        try:
            self._upkeep()
        except sqlite3.Error as error:
            # The job that runs is worth more than a process that starts anew.
            self._outage.begin(f"the file of the jobs can't be used: {error}")
        else:
            self._outage.end()

    def end(self, seconds: float) -> None:
        """Let the job that runs finish within ``seconds``, or have it run again by whoever comes next."""
        self._stopping = True
        self._thread.join(seconds)
        job, _ = self._current or (None, 0.0)
        if job is not None and self._store.hand_back(job):
            self._log.warning("job_handed_back", f"job {job.id} didn't finish in time and is run again", job=job.id)

    def _upkeep(self) -> None:
        self._store.beat(self._colour)
        self._store.expire()
        adopted, failed = self._store.adopt(self._colour, self._names, SILENT_SECONDS)
        # Not at once: the other colour may be about to take what this one has left, or be started anew just now.
        if time.monotonic() - self._started > SILENT_SECONDS:
            failed = [*failed, *self._store.give_up(self._names)]
        if adopted:
            self._log.warning("jobs_adopted", f"{adopted} jobs that no other colour runs are taken over", jobs=adopted)
            # They are older than what waits here: filled from the table again, the queue is in the right order.
            self._refill()
        for job in failed:
            self._note(job, "failed")
        # A process that died between the table and the queue has left jobs in the table alone.
        if self._queue.is_empty():
            self._refill()

    def _refill(self) -> None:
        self._queue.clear()
        # Workers may add new jobs meanwhile, which are then there twice: the second time there's nothing to claim.
        self._queue.put(*self._store.waiting(self._colour))

    def _work(self) -> None:
        try:
            while not self._stopping:
                task = self._queue.take()
                if task is None:
                    time.sleep(_POLL_SECONDS)
                else:
                    task.execute()
        except BaseException as error:
            self._failure = error

    def _run(self, job_id: str) -> None:
        claimed = self._store.claim(job_id, self._colour, self._versions)
        if claimed is None:
            return
        job, body = claimed
        started = time.monotonic()
        self._current = job, started
        self._busy(True)
        result, error = self._predict(job, body)
        seconds = time.monotonic() - started
        wanted = self._store.fail(job, error) if result is None else self._store.complete(job, result, seconds)
        self._busy(False)
        self._current = None
        if wanted:
            self._note(job, "failed" if result is None else "completed", seconds)

    def _predict(self, job: Job, body: bytes) -> tuple[bytes | None, str]:
        """The answer that ``POST /predict`` would get, or None and why there is none."""
        try:
            model = self._models.find(job.model)
            rows = payload.parse(body, model.bundle.input, model.bundle.max_rows)
            [output] = model.predict([model.prepare(rows.values)])
            return payload.render(output, rows.single), ""
        except (payload.BadRequest, payload.NotFinite) as error:
            return None, str(error)
        # Whatever the model's code raises: the next job may do better.
        except Exception as error:
            log_failure(self._log, error, job=job.id)
            return None, "the model failed on this request"

    def _note(self, job: Job, status: str, seconds: float | None = None) -> None:
        self._metrics.jobs_finished.labels(status).inc()
        if seconds is not None:
            self._metrics.job_duration.labels(job.model).observe(seconds)
        self._log.info(
            "job_finished",
            f"job {job.id} {status}",
            job=job.id,
            job_model=job.model,
            status=status,
            attempts=job.attempts,
            seconds=None if seconds is None else round(seconds, 3),
        )
