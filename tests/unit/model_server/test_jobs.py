"""The table of jobs: what each process may do to it, and in what order things may happen."""

import dataclasses
import fcntl
import json
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from model_server import jobs
from model_server.config import Config, ConfigError, JobsConfig
from model_server.core import Refusal
from model_server.errors import ModelFailed
from model_server.jobs.consumer import _Consumer
from model_server.jobs.queue import Queue
from model_server.jobs.store import STATUSES, Store
from model_server.logs import Log
from model_server.payload import TensorSpec

VERSIONS = {"m": "2"}
BODY = b'{"data": [1, 2]}'
CONFIG = JobsConfig(Path(), limit=3, attempts=2, keep_seconds=100, longest_seconds=9, max_bytes=10_000)


@pytest.fixture
def config(tmp_path: Path) -> JobsConfig:
    config = dataclasses.replace(CONFIG, directory=tmp_path)
    assert jobs.create(config) is None
    return config


@pytest.fixture
def store(config: JobsConfig) -> Store:
    return Store(config)


def submit(store: Store, colour: str = "blue", **options):
    return store.submit("m", "1", colour, options.pop("body", BODY), **options)[0]


def claim(store: Store, job, colour: str = "blue"):
    return store.claim(job.id, colour, VERSIONS)


def sql(config: JobsConfig, statement: str, *values) -> list[tuple]:
    """As another process would."""
    connection = sqlite3.connect(config.file)
    with connection:
        found = connection.execute(statement, values).fetchall()
    connection.close()
    return found


def status_of(refusal: pytest.ExceptionInfo) -> int:
    return refusal.value.status


def test_a_job_from_its_submission_to_its_result(store, config):
    job = submit(store)
    assert (job.status, job.model, job.version, job.attempts, len(job.id)) == ("pending", "m", "1", 0, 32)
    running, body = claim(store, job)
    assert (running.status, running.attempts, running.ran_version, running.ran_colour) == (
        "in_progress",
        1,
        "2",
        "blue",
    )
    assert body == BODY
    assert store.complete(running, b"{}", 0.5)
    done = store.find(job.id)
    assert (done.status, store.result(job.id)) == ("completed", b"{}")
    assert done.submitted <= done.started <= done.finished
    assert sql(config, "select input from jobs") == [(None,)]


def test_a_job_is_claimed_once_and_by_its_colour_alone(store, config):
    job = submit(store)
    assert claim(store, job, "green") is None
    claimed = []
    others = [Store(config) for _ in range(8)]
    threads = [threading.Thread(target=lambda other=other: claimed.append(claim(other, job))) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 8 and sum(found is not None for found in claimed) == 1


def test_what_a_commit_says_survives_a_power_cut(store, config):
    submit(store)
    assert sql(config, "pragma journal_mode") == [("wal",)]
    assert store._connection.execute("pragma synchronous").fetchone() == (2,)


def test_a_canceled_job_never_runs(store):
    job = submit(store)
    assert store.cancel(job.id).status == "canceled"
    assert claim(store, job) is None


def test_the_result_of_a_job_that_was_canceled_while_it_ran_is_discarded(store):
    job, _ = claim(store, submit(store))
    store.cancel(job.id)
    assert not store.complete(job, b"{}", 0.5)
    assert not store.fail(job, "late") and not store.hand_back(job)
    assert (store.find(job.id).status, store.result(job.id)) == ("canceled", None)


def test_an_old_run_cant_answer_for_a_new_one(store):
    old, _ = claim(store, submit(store))
    store.cancel(old.id)
    store.retry(old.id, "blue")
    new, _ = claim(store, old)
    assert not store.complete(old, b"old", 0.5)
    assert store.complete(new, b"new", 0.5) and store.result(old.id) == b"new"


def test_only_what_isnt_finished_is_canceled_and_only_what_failed_is_retried(store):
    job = submit(store)
    with pytest.raises(Refusal) as refusal:
        store.retry(job.id, "blue")
    assert status_of(refusal) == 409
    running, _ = claim(store, job)
    store.complete(running, b"{}", 0.5)
    for change in (lambda: store.cancel(job.id), lambda: store.retry(job.id, "blue")):
        with pytest.raises(Refusal) as refusal:
            change()
        assert status_of(refusal) == 409
    for change in (store.find, store.cancel, lambda job_id: store.retry(job_id, "blue")):
        with pytest.raises(Refusal) as refusal:
            change("unknown")
        assert status_of(refusal) == 404


def test_a_retry_begins_anew_at_the_end_of_the_queue(store):
    job, _ = claim(store, submit(store))
    store.fail(job, "no luck")
    other = submit(store, "green")
    again = store.retry(job.id, "green")
    assert (again.status, again.colour, again.attempts, again.error) == ("pending", "green", 0, None)
    assert (again.started, again.finished, again.ran_colour) == (None, None, None)
    assert store.waiting("green") == [other.id, job.id]
    assert claim(store, job, "green")[1] == BODY


def test_too_many_pending_jobs_are_refused(store):
    waiting = [submit(store) for _ in range(3)]
    with pytest.raises(Refusal) as refusal:
        submit(store)
    assert status_of(refusal) == 503 and dict(refusal.value.headers)["Retry-After"]
    submit(store, "green")
    claim(store, waiting[0])
    submit(store)
    store.cancel(waiting[1].id)
    submit(store)
    with pytest.raises(Refusal) as refusal:
        store.retry(waiting[1].id, "blue")
    assert status_of(refusal) == 503


def test_too_many_bytes_are_refused_until_jobs_expire(store, config):
    job, _ = claim(store, submit(store, body=b"x" * 7000))
    with pytest.raises(Refusal) as refusal:
        submit(store, body=b"y" * 2000)
    assert status_of(refusal) == 507
    store.complete(job, b"z" * 6000, 0.5)
    with pytest.raises(Refusal):
        submit(store, body=b"y" * 2000)
    sql(config, "update jobs set finished = finished - 101")
    store.expire()
    submit(store, body=b"y" * 2000)


def test_the_tally_is_right_after_everything(store, config):
    for _ in range(3):
        submit(store)
    running, _ = claim(store, submit(store, "green"), "green")
    store.complete(running, b"12345", 0.5)
    store.cancel(store.waiting("blue")[0])
    sql(config, "update jobs set finished = finished - 201 where status = 'canceled'")
    store.expire()
    expected = "select colour, status, count(*), sum(bytes) from jobs group by colour, status order by 1, 2"
    assert sql(config, expected) == sql(config, "select * from tally where jobs or bytes order by 1, 2")
    assert store.counts("blue") == {**dict.fromkeys(STATUSES, 0), "pending": 2}


def test_the_same_idempotency_key_is_the_same_job(store):
    job, is_new = store.submit("m", "1", "blue", BODY, "mine")
    assert is_new
    assert store.submit("m", "1", "green", BODY, "mine") == (job, False)
    with pytest.raises(Refusal) as refusal:
        store.submit("m", "1", "blue", b"other", "mine")
    assert status_of(refusal) == 422
    assert submit(store).id != submit(store).id


def test_jobs_expire_in_two_steps(store, config):
    job, _ = claim(store, submit(store))
    store.complete(job, b"{}", 0.5)
    waiting = submit(store)
    store.expire()
    assert not store.is_expired(store.find(job.id)) and store.result(job.id) == b"{}"
    sql(config, "update jobs set finished = finished - 101, submitted = submitted - 1000")
    store.expire()
    assert store.is_expired(store.find(job.id)) and store.result(job.id) is None
    sql(config, "update jobs set finished = finished - 100")
    store.expire()
    with pytest.raises(Refusal):
        store.find(job.id)
    assert store.waiting("blue") == [waiting.id]


def test_an_expired_job_isnt_retried(store, config):
    job = submit(store)
    store.cancel(job.id)
    sql(config, "update jobs set finished = finished - 101")
    with pytest.raises(Refusal) as refusal:
        store.retry(job.id, "blue")
    assert status_of(refusal) == 410


def test_what_a_dead_consumer_was_at_goes_first_again_until_it_has_died_too_often(store):
    first, second = submit(store), submit(store)
    claim(store, first)
    assert store.recover("green", ["m"]) == (0, [])
    assert store.find(first.id).status == "in_progress"
    assert store.recover("blue", ["m"]) == (0, [])
    assert store.waiting("blue") == [first.id, second.id]
    claim(store, first)
    _, [failed] = store.recover("blue", ["m"])
    assert (failed.id, failed.attempts, failed.error) == (first.id, 2, "the service died while it ran")
    assert store.find(first.id).status == "failed" and store.waiting("blue") == [second.id]


def test_a_job_that_is_handed_back_has_lost_no_attempt(store):
    for _ in range(5):
        job, _ = claim(store, store.find(store.waiting("blue")[0]) if store.waiting("blue") else submit(store))
        assert store.hand_back(job)
    assert (store.find(job.id).attempts, store.find(job.id).ran_colour) == (0, None)


def test_jobs_of_a_silent_colour_are_adopted_once(store, config):
    store.beat("blue")
    running, _ = claim(store, submit(store))
    waiting, unknown = submit(store), store.submit("elsewhere", "1", "blue", BODY)[0]
    assert store.adopt("green", ["m"], 120) == (0, ())
    sql(config, "update consumers set beat = beat - 121")
    found = []
    threads = [
        threading.Thread(target=lambda colour=colour: found.append(Store(config).adopt(colour, ["m"], 120)[0]))
        for colour in ("green", "none")
    ]
    store.beat("green")
    store.beat("none")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 2]
    adopter = store.find(waiting.id).colour
    assert adopter != "blue" and store.waiting(adopter) == [running.id, waiting.id]
    assert store.find(unknown.id).colour == "blue"
    assert not store.complete(running, b"late", 0.5)


def test_an_adopted_job_that_has_died_too_often_fails(store, config):
    job = submit(store)
    claim(store, job)
    store.recover("blue", ["m"])
    claim(store, job)
    assert store.adopt("green", ["m"], 120)[0] == 0
    sql(config, "update jobs set submitted = submitted - 121")
    [failed] = store.adopt("green", ["m"], 120)[1]
    assert (failed.id, failed.status) == (job.id, "failed")


def test_jobs_of_a_model_that_the_colour_lost_go_to_the_one_that_serves_it(store):
    store.beat("blue")
    running, waiting, own = submit(store), submit(store), store.submit("other", "1", "blue", BODY)[0]
    claim(store, running)
    assert store.claim(waiting.id, "blue", {"other": "1"}) is None
    assert store.recover("blue", ["other"]) == (2, [])
    assert store.waiting("blue") == [own.id] and store.find(running.id).status == "pending"
    assert claim(store, waiting) is None and claim(store, waiting, "green") is None
    assert store.adopt("blue", ["other"], 120) == (0, ())
    assert store.adopt("green", ["m"], 120) == (2, [])
    assert store.waiting("green") == [running.id, waiting.id]


def test_jobs_of_a_model_that_nobody_serves_wait_and_then_fail(store, config):
    job = submit(store)
    store.recover("blue", ["other"])
    assert store.give_up(["other"]) == [] and store.find(job.id).status == "pending"
    sql(config, "update jobs set submitted = submitted - 101")
    assert store.give_up(["m"]) == []
    [failed] = store.give_up(["other"])
    assert (failed.id, failed.status, failed.error) == (job.id, "failed", "no colour serves its model any more")
    again = submit(store)
    sql(config, "update jobs set submitted = submitted - 101")
    assert store.give_up(["other"]) == [] and store.waiting("blue") == [again.id]


def test_a_consumer_gives_the_other_colour_time_before_it_gives_jobs_up(store, config, tmp_path):
    job = submit(store)
    sql(config, "update jobs set submitted = submitted - 86401")
    settings = Config.from_environment({"MODEL_COLOUR": "blue", "MODEL_JOBS_DIR": str(tmp_path)})
    models = SimpleNamespace(all=[SimpleNamespace(name="other", version="2")])
    consumer = _Consumer(models, settings, MagicMock(), Log(colour="blue", release=""))
    consumer.begin()
    consumer.turn()
    assert store.find(job.id).status == "pending"
    consumer._started -= 121
    consumer.turn()
    assert store.find(job.id).status == "failed"
    consumer.end(60)


class BadInput(Exception):
    """What a model's own code may raise."""


@pytest.mark.parametrize("quotes", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_model_says_of_an_input_is_logged_only_where_asked_for(store, config, tmp_path, quotes, wrapped):
    def fail(*_):
        try:
            float("+49 151")
        except ValueError as error:
            if wrapped:
                failed = BadInput(f"not {error}")
                raise ModelFailed(f"the model failed: BadInput: {failed}") from failed
            raise BadInput(f"not {error}") from error

    bundle = SimpleNamespace(input=TensorSpec((1,), "float32"), max_rows=1)
    model = SimpleNamespace(name="m", version="1", bundle=bundle, prepare=list, predict=fail)
    settings = Config.from_environment({"MODEL_COLOUR": "blue", "MODEL_JOBS_DIR": str(tmp_path)})
    with open(tmp_path / "log", "wb") as log:
        models = SimpleNamespace(all=[model], find=lambda name: model)
        consumer = _Consumer(models, settings, MagicMock(), Log(log.fileno(), quotes=quotes))
        assert consumer._predict(submit(store), b'{"data": [1]}') == (None, "the model failed on this request")
    [line] = [json.loads(text) for text in (tmp_path / "log").read_text().splitlines()]
    assert line["event"] == "prediction_failed" and line["message"].startswith("the model failed: BadInput")
    assert ("+49" in line["message"], "+49" in json.dumps(line)) == (quotes, quotes)
    assert "BadInput" in line["traceback"]


def test_adopted_jobs_run_in_their_turn_though_others_wait(store, config, tmp_path):
    adopted, own = submit(store), submit(store, "green")
    sql(config, "update jobs set submitted = submitted - 121 where id = ?", adopted.id)
    ran: list[str] = []
    queue = Queue(config, "green", ran.append)
    queue.put(own.id)
    settings = Config.from_environment({"MODEL_COLOUR": "green", "MODEL_JOBS_DIR": str(tmp_path)})
    models = SimpleNamespace(all=[SimpleNamespace(name="m", version="2")])
    _Consumer(models, settings, metrics=None, log=Log(colour="green", release="")).turn()
    while (task := queue.take()) is not None:
        task.execute()
    assert ran == [adopted.id, own.id]


def test_position_and_estimate(store, monkeypatch):
    first, second, third = submit(store), submit(store), submit(store)
    assert store.place(third) == (3, None)
    running, _ = claim(store, first)
    store.complete(running, b"{}", 2.0)
    assert store.place(store.find(third.id)) == (2, 4.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    claim(store, second)
    assert store.place(store.find(third.id)) == (1, 4.0)
    # What has run for half of its time needs the other half; what takes longer than usual may end at any time.
    monkeypatch.setattr(time, "time", lambda: now + 1.5)
    assert store.place(store.find(second.id)) == (0, pytest.approx(0.5))
    assert store.place(store.find(third.id)) == (1, pytest.approx(2.5))
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert store.place(store.find(third.id)) == (1, 2.0)
    running, _ = claim(store, third)
    store.complete(running, b"{}", 7.0)
    assert store.place(submit(store))[1] == pytest.approx(3.0)


def test_what_waits_with_an_earlier_turn_isnt_before_what_runs(store):
    done, _ = claim(store, submit(store))
    store.complete(done, b"{}", 2.0)
    submit(store)
    running = submit(store)
    claim(store, running)
    assert store.place(store.find(running.id)) == (0, pytest.approx(2.0, abs=0.5))


def test_the_list_is_newest_first_in_pages(store):
    ids = [submit(store, colour).id for colour in ("blue", "green", "blue")]
    store.cancel(ids[0])
    assert [job.id for job in store.list(None, 2, None)] == [ids[2], ids[1]]
    assert [job.id for job in store.list(None, 2, ids[1])] == [ids[0]]
    assert [job.id for job in store.list("pending", 9, None)] == [ids[2], ids[1]]
    with pytest.raises(Refusal):
        store.list(None, 1, "unknown")


def test_the_queue_gives_each_colour_its_own_jobs_in_order(config):
    ran: list[str] = []
    blue, green = Queue(config, "blue", ran.append), Queue(config, "green", ran.append)
    elsewhere = Queue(config, "blue")
    for name in ("a", "b"):
        elsewhere.put(name)
    assert green.take() is None and green.is_empty() and not blue.is_empty()
    blue.take().execute()
    blue.take().execute()
    assert ran == ["a", "b"] and blue.take() is None
    blue.put("c")
    blue.clear()
    assert blue.is_empty()


def test_many_jobs_are_put_in_one_transaction(config):
    queue = Queue(config, "blue")
    statements: list[str] = []
    queue._huey.storage.conn.set_trace_callback(statements.append)
    queue.put("a", "b", "c")
    assert [text.split()[0].lower() for text in statements] == ["begin", "insert", "insert", "insert", "commit"]
    assert [queue.take().args for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_the_queue_holds_no_pickle(config):
    Queue(config, "blue").put("0123")
    [(data,)] = sql(config, "select data from task")
    assert b'"0123"' in data and data[:1] == b"["


def test_who_starts_while_another_makes_the_file_waits(tmp_path):
    config = dataclasses.replace(CONFIG, directory=tmp_path)
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=jobs.create, args=(config,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not config.file.exists()
    thread.join(60)
    submit(Store(config))


def test_an_outage_is_told_when_it_begins_once_a_minute_and_when_it_is_over(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    with open(tmp_path / "log", "wb") as log:
        outage = jobs.Outage(Log(log.fileno()))
        outage.end()
        for _ in range(25):
            outage.begin("it can't be used")
            now[0] += 5
        outage.end()
        outage.end()
        outage.begin("it can't be used")
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events == ["jobs_unavailable"] * 3 + ["jobs_available", "jobs_unavailable"]


@pytest.mark.parametrize("name", ["LIMIT", "ATTEMPTS", "KEEP_SECONDS", "LONGEST_SECONDS", "MAX_BYTES"])
def test_settings(name):
    assert Config.from_environment({f"MODEL_JOBS_{name}": "0"}).jobs is None
    with pytest.raises(ConfigError, match=f"MODEL_JOBS_{name}"):
        Config.from_environment({"MODEL_JOBS_DIR": "/jobs", f"MODEL_JOBS_{name}": "0"})
