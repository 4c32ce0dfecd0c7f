"""The table of jobs: what was asked, how far it is, what came of it.

Both colours and all their processes share the file. Each change is one transaction that also checks that it still
applies, so that it doesn't matter which process comes first.
"""

import fcntl
import hashlib
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from model_server.config import JobsConfig
from model_server.core import Refusal

STATUSES = ("pending", "in_progress", "completed", "failed", "canceled")
# For an answer that comes at once where another process writes for long.
BUSY_SECONDS = 5
# What a job without contents counts as, so that a bound on bytes also bounds the number of jobs.
_ROW_BYTES = 1024
# So that nobody waits for long on the lock.
_EXPIRED_AT_ONCE = 500
# How much the latest run counts in the mean duration of a model's jobs.
_NEWEST_WEIGHT = 0.2
_DIED = "the service died while it ran"
_UNSERVED = "no colour serves its model any more"
# The colour of pending jobs that wait for any colour which serves their model.
NOBODY = ""

# `tally` is kept by triggers, since counting and summing would take longer with each job.
_SCHEMA = f"""
create table if not exists jobs (
    number integer primary key autoincrement, id text not null unique, model text not null, version text not null,
    colour text not null, status text not null, attempts integer not null default 0, turn integer not null,
    submitted real not null, started real, finished real, ran_version text, ran_colour text, error text,
    bytes integer not null, key text unique, digest blob not null, input blob, result blob
);
create index if not exists jobs_queue on jobs (colour, status, turn);
create index if not exists jobs_turn on jobs (turn);
create index if not exists jobs_status on jobs (status);
create index if not exists jobs_finished on jobs (finished) where finished is not null;
create index if not exists jobs_kept on jobs (finished) where bytes > {_ROW_BYTES};
create table if not exists tally (
    colour text, status text, jobs integer not null, bytes integer not null, primary key (colour, status)
);
create trigger if not exists jobs_insert after insert on jobs begin
    insert into tally values (new.colour, new.status, 1, new.bytes)
        on conflict do update set jobs = jobs + 1, bytes = bytes + excluded.bytes;
end;
create trigger if not exists jobs_delete after delete on jobs begin
    update tally set jobs = jobs - 1, bytes = bytes - old.bytes where colour = old.colour and status = old.status;
end;
create trigger if not exists jobs_update after update of colour, status, bytes on jobs begin
    update tally set jobs = jobs - 1, bytes = bytes - old.bytes where colour = old.colour and status = old.status;
    insert into tally values (new.colour, new.status, 1, new.bytes)
        on conflict do update set jobs = jobs + 1, bytes = bytes + excluded.bytes;
end;
create table if not exists durations (model text primary key, seconds real not null);
create table if not exists consumers (colour text primary key, beat real not null);
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job without its input and result. Times are seconds since the epoch.

    ``version`` was served when it was submitted; ``colour`` is the one that is to run it, or NOBODY; ``ran_version``
    and ``ran_colour`` say who did, or does.
    """

    id: str
    model: str
    version: str
    colour: str
    status: str
    attempts: int
    submitted: float
    started: float | None
    finished: float | None
    ran_version: str | None
    ran_colour: str | None
    error: str | None


_COLUMNS = ", ".join(field.name for field in fields(Job))


def create(config: JobsConfig) -> None:
    """Make the file where it is missing. Raises OSError or sqlite3.Error where it can't be used."""
    # Two colours that start together would get in each other's way when they change the journal's mode.
    with open(config.directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _connect(config.file)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.executescript(_SCHEMA)
        finally:
            connection.close()


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    # What a client was told has to survive a power cut.
    connection.execute("pragma synchronous = full")
    return connection


class Store:
    """The jobs, for the threads of one process. It connects at its first use, which must be after the fork.

    Every method may raise sqlite3.Error: the disk may be full, or another process may hold the lock for too long.
    """

    def __init__(self, config: JobsConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def submit(self, model: str, version: str, colour: str, body: bytes, key: str | None = None) -> tuple[Job, bool]:
        """Add a pending job; it and whether it is new. ``key`` is what the client calls it: the same again is no new
        job. Raises Refusal where there are too many jobs, or the key stands for another request.
        """
        digest = hashlib.sha256(model.encode() + b"\0" + body).digest()
        with self._transaction() as connection:
            if key is not None:
                row = connection.execute("select id, digest from jobs where key = ?", (key,)).fetchone()
                if row is not None and row[1] != digest:
                    raise Refusal(422, "the Idempotency-Key was used for another request")
                if row is not None:
                    return self._find(connection, row[0]), False
            self._check_room(connection, colour, len(body))
            [row] = connection.execute(
                "insert into jobs (id, model, version, colour, status, turn, submitted, bytes, key, digest, input)"
                f" values (?, ?, ?, ?, 'pending', {_NEXT_TURN}, ?, ?, ?, ?, ?) returning {_COLUMNS}",
                (uuid.uuid4().hex, model, version, colour, time.time(), _ROW_BYTES + len(body), key, digest, body),
            ).fetchall()
            return Job(*row), True

    def find(self, job_id: str) -> Job:
        """Raises Refusal (404)."""
        with self._lock:
            return self._find(self._connected(), job_id)

    def place(self, job: Job) -> tuple[int, float | None]:
        """Where an unfinished job stands in its queue (the next one is 1), and in how many seconds it should be done.

        None where no job of a model before it, or of its own, was ever measured. The colour mustn't be NOBODY.
        """
        [row] = self._read(
            "select sum(status = 'pending'), case when count(*) = count(seconds)"
            " then sum(max(0, seconds - case status when 'in_progress' then ? - started else 0 end)) end"
            " from jobs left join durations using (model) where colour = ?"
            " and (status = 'in_progress' or status = 'pending' and ? = 'pending')"
            " and turn <= (select turn from jobs where id = ?)",
            (time.time(), job.colour, job.status, job.id),
        )
        return row[0] or 0, row[1]

    def result(self, job_id: str) -> bytes | None:
        """The answer of a completed job, or None."""
        rows = self._read("select result from jobs where id = ?", (job_id,))
        return rows[0][0] if rows else None

    def list(self, status: str | None, limit: int, after: str | None) -> Sequence[Job]:
        """The newest first; those that are older than the job ``after``. Raises Refusal where that is unknown."""
        conditions, values = ["true"], []
        if status is not None:
            conditions.append("status = ?")
            values.append(status)
        if after is not None:
            self.find(after)
            conditions.append("number < (select number from jobs where id = ?)")
            values.append(after)
        where = " and ".join(conditions)
        rows = self._read(f"select {_COLUMNS} from jobs where {where} order by number desc limit ?", (*values, limit))
        return [Job(*row) for row in rows]

    def cancel(self, job_id: str) -> Job:
        """End a job that isn't finished. Raises Refusal (404, 409)."""
        with self._transaction() as connection:
            rows = connection.execute(
                "update jobs set status = 'canceled', finished = ?"
                f" where id = ? and status in ('pending', 'in_progress') returning {_COLUMNS}",
                (time.time(), job_id),
            ).fetchall()
            if rows:
                return Job(*rows[0])
            job = self._find(connection, job_id)
            raise Refusal(409, f"the job is {job.status}; only one that isn't finished can be canceled")

    def retry(self, job_id: str, colour: str) -> Job:
        """Have ``colour`` run a failed or canceled job as if it were new. Raises Refusal (404, 409, 410, 503)."""
        with self._transaction() as connection:
            job = self._find(connection, job_id)
            if job.status not in ("failed", "canceled"):
                raise Refusal(409, f"the job is {job.status}; only one that failed or was canceled can be retried")
            if self.is_expired(job):
                raise Refusal(410, "the job has expired; submit it again")
            self._check_room(connection, colour, 0)
            [row] = connection.execute(
                f"update jobs set colour = ?, turn = {_NEXT_TURN}, attempts = 0, finished = null, error = null,"
                f" {_UNCLAIMED} where id = ? returning {_COLUMNS}",
                (colour, job_id),
            ).fetchall()
            return Job(*row)

    def expires(self, job: Job) -> float | None:
        """When the result of a finished job goes, or None."""
        return None if job.finished is None else job.finished + self._config.keep_seconds

    def is_expired(self, job: Job) -> bool:
        """Whether its result is gone, or about to."""
        expires = self.expires(job)
        return expires is not None and expires <= time.time()

    def counts(self, colour: str) -> Mapping[str, int]:
        """How many jobs of a colour have each status."""
        found = dict(self._read("select status, jobs from tally where colour = ?", (colour,)))
        return {status: found.get(status, 0) for status in STATUSES}

    # What follows is for consumers.

    def claim(self, job_id: str, colour: str, versions: Mapping[str, str]) -> tuple[Job, bytes] | None:
        """Start a pending job of ``colour``; it and its input, or None where it isn't to be run, or not by this colour.

        ``versions`` are those of the models that the colour serves.
        """
        with self._transaction() as connection:
            job = self._find_or_none(connection, job_id)
            if job is None or (job.status, job.colour) != ("pending", colour) or job.model not in versions:
                return None
            [row] = connection.execute(
                "update jobs set status = 'in_progress', attempts = attempts + 1, started = ?, ran_version = ?,"
                f" ran_colour = ? where id = ? returning {_COLUMNS}, input",
                (time.time(), versions[job.model], colour, job_id),
            ).fetchall()
            return Job(*row[:-1]), row[-1]

    def complete(self, job: Job, result: bytes, seconds: float) -> bool:
        """Keep the result of a job that was claimed, and drop its input; False where nobody wants it any more.

        ``seconds`` is how long it took.
        """
        with self._transaction() as connection:
            done = connection.execute(
                "update jobs set status = 'completed', finished = ?, input = null, result = ?, bytes = ?"
                f" where {_STILL_CLAIMED}",
                (time.time(), result, _ROW_BYTES + len(result), job.id, job.started),
            ).rowcount
            if done:
                connection.execute(
                    "insert into durations values (?, ?) on conflict do update set"
                    f" seconds = {1 - _NEWEST_WEIGHT} * seconds + {_NEWEST_WEIGHT} * excluded.seconds",
                    (job.model, seconds),
                )
            return bool(done)

    def fail(self, job: Job, error: str) -> bool:
        """End a job that was claimed; False where nobody wants it any more. ``error`` is for the client."""
        return self._end_claim(job, "status = 'failed', finished = ?, error = ?", (time.time(), error))

    def hand_back(self, job: Job) -> bool:
        """Have a job that was claimed run again, through no fault of its own."""
        return self._end_claim(job, f"attempts = attempts - 1, {_UNCLAIMED}", ())

    def recover(self, colour: str, models: Sequence[str]) -> tuple[int, Sequence[Job]]:
        """Put what a dead consumer of this colour was at back into the queue, and leave the jobs of other models than
        ``models`` to whoever serves them; how many of those there are, and the jobs that have failed for good.
        """
        with self._transaction() as connection:
            failed = self._release(connection, "colour = ?", (colour,))
            left = connection.execute(
                f"update jobs set colour = ? where colour = ? and status = 'pending' and model not in {_marks(models)}",
                (NOBODY, colour, *models),
            ).rowcount
            return left, failed

    def adopt(self, colour: str, models: Sequence[str], silent_seconds: float) -> tuple[int, Sequence[Job]]:
        """Take over the jobs of nobody, and of colours whose consumer is silent; how many, and those that have failed
        for good.

        Only jobs of ``models``: this colour couldn't run the others either.
        """
        with self._transaction() as connection:
            # Where no consumer of the colour was ever seen, the job's age is what counts.
            adopted = connection.execute(
                f"update jobs set colour = ? where colour != ? and status in ('pending', 'in_progress')"
                f" and model in {_marks(models)} and (colour = ? or"
                " coalesce((select beat from consumers where consumers.colour = jobs.colour), submitted) < ?)"
                " returning id",
                (colour, colour, *models, NOBODY, time.time() - silent_seconds),
            ).fetchall()
            ids = [row[0] for row in adopted]
            return len(ids), self._release(connection, f"id in {_marks(ids)}", ids) if ids else ()

    def give_up(self, models: Sequence[str]) -> Sequence[Job]:
        """End the jobs of nobody that are as old as results get, but those of ``models``; those that have failed."""
        now = time.time()
        with self._transaction() as connection:
            rows = connection.execute(
                f"update jobs set status = 'failed', finished = ?, error = '{_UNSERVED}' where colour = ?"
                f" and status = 'pending' and submitted <= ? and model not in {_marks(models)} returning {_COLUMNS}",
                (now, NOBODY, now - self._config.keep_seconds, *models),
            ).fetchall()
            return [Job(*row) for row in rows]

    def waiting(self, colour: str) -> Sequence[str]:
        """The pending jobs of a colour, the next one first."""
        rows = self._read("select id from jobs where colour = ? and status = 'pending' order by turn", (colour,))
        return [row[0] for row in rows]

    def beat(self, colour: str) -> None:
        """Note that the colour's consumer is alive."""
        with self._transaction() as connection:
            connection.execute(
                "insert into consumers values (?, ?) on conflict do update set beat = excluded.beat",
                (colour, time.time()),
            )

    def expire(self) -> None:
        """Drop what finished jobs hold once they have expired, and the jobs themselves after as long again; some at a
        time.
        """
        kept, now = self._config.keep_seconds, time.time()
        with self._transaction() as connection:
            connection.execute(
                "delete from jobs where number in"
                f" (select number from jobs where finished <= ? limit {_EXPIRED_AT_ONCE})",
                (now - 2 * kept,),
            )
            connection.execute(
                f"update jobs set input = null, result = null, bytes = {_ROW_BYTES} where number in"
                f" (select number from jobs where finished <= ? and bytes > {_ROW_BYTES} limit {_EXPIRED_AT_ONCE})",
                (now - kept,),
            )

    def _release(self, connection: sqlite3.Connection, which: str, values: Sequence[str]) -> Sequence[Job]:
        rows = connection.execute(
            f"update jobs set status = 'failed', finished = ?, error = '{_DIED}'"
            f" where {which} and status = 'in_progress' and attempts >= ? returning {_COLUMNS}",
            (time.time(), *values, self._config.attempts),
        ).fetchall()
        connection.execute(f"update jobs set {_UNCLAIMED} where {which} and status = 'in_progress'", values)
        return [Job(*row) for row in rows]

    def _end_claim(self, job: Job, change: str, values: Sequence[object]) -> bool:
        with self._transaction() as connection:
            done = connection.execute(
                f"update jobs set {change} where {_STILL_CLAIMED}", (*values, job.id, job.started)
            ).rowcount
            return bool(done)

    def _check_room(self, connection: sqlite3.Connection, colour: str, size: int) -> None:
        [pending] = connection.execute(
            "select coalesce(sum(jobs), 0) from tally where colour = ? and status = 'pending'", (colour,)
        ).fetchone()
        if pending >= self._config.limit:
            raise Refusal(503, "too many jobs are waiting; try again later", headers=(("Retry-After", "10"),))
        [kept] = connection.execute("select coalesce(sum(bytes), 0) from tally").fetchone()
        if kept + size + _ROW_BYTES > self._config.max_bytes:
            raise Refusal(507, "the jobs take all the space that they may; try again when older ones have expired")

    @staticmethod
    def _find_or_none(connection: sqlite3.Connection, job_id: str) -> Job | None:
        row = connection.execute(f"select {_COLUMNS} from jobs where id = ?", (job_id,)).fetchone()
        return None if row is None else Job(*row)

    def _find(self, connection: sqlite3.Connection, job_id: str) -> Job:
        job = self._find_or_none(connection, job_id)
        if job is None:
            raise Refusal(404, "there is no such job")
        return job

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _connect(self._config.file)
        return self._connection

    def _read(self, statement: str, values: Sequence[object]) -> Sequence[tuple]:
        with self._lock:
            return self._connected().execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            connection = self._connected()
            # Immediate: what is read in it can't change before it is written.
            connection.execute("begin immediate")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("rollback")
                raise


_NEXT_TURN = "(select coalesce(max(turn), 0) + 1 from jobs)"
_UNCLAIMED = "status = 'pending', started = null, ran_version = null, ran_colour = null"
# Since then it may have been canceled, or another consumer may have started it.
_STILL_CLAIMED = "id = ? and status = 'in_progress' and started = ?"


def _marks(values: Sequence[str]) -> str:
    """Placeholders for a list of ``values``."""
    return f"({', '.join('?' * len(values))})"
