"""Jobs in the real processes: submitted, killed in the middle, taken up again, canceled, fetched."""

import json
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from bundle_making import ROOT, SHIPPED, write_sums
from service_process import SECONDS, Service, running, slow

ROW = [0.2, 0.6]
SLOW_ROW = [9, 0]


class Client:
    """What a user of jobs does."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, method: str, path: str, body: object = None, **headers: str):
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        status, found, answer = self.service.ask("worker-0", method, path, data, **headers)
        return status, found, json.loads(answer)

    def submit(self, row: list, **headers: str) -> str:
        status, _, job = self.ask("POST", "/v1/jobs", {"data": row}, **headers)
        assert status == 202, job
        return job["id"]

    def job(self, job_id: str) -> dict:
        return self.ask("GET", f"/v1/jobs/{job_id}")[2]

    def wait(self, job_id: str, status: str) -> dict:
        self.service.wait_for(lambda: self.job(job_id)["status"] == status, f"{status}: {self.job(job_id)}")
        return self.job(job_id)

    def result(self, job_id: str) -> bytes:
        status, _, body = self.service.ask("worker-0", "GET", f"/v1/jobs/{job_id}/result")
        assert status == 200, body
        return body


@contextmanager
def serving(sockets: Path, bundle: Path, jobs: Path, **settings: object) -> Iterator[Client]:
    sockets.mkdir(exist_ok=True)
    with running(sockets, bundle, MODEL_WORKERS=1, MODEL_JOBS_DIR=jobs, **settings) as service:
        service.wait_ready()
        yield Client(service)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    jobs = tmp_path_factory.mktemp("jobs")
    sockets = Path(f"/tmp/mj-{os.getpid()}")
    with serving(sockets, SHIPPED / "1.0.0", jobs, MODEL_MAX_BODY_BYTES=10_000) as client:
        yield client


def kill_everything(client: Client) -> None:
    """As a power cut or the kernel's out-of-memory killer does."""
    children = client.service.children()
    for pid in (client.service.process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    client.service.process.wait()


def consumer_of(client: Client) -> int:
    """Its process, the last that the parent starts."""
    return client.service.children()[-1]


def change(jobs: Path, statement: str) -> None:
    with closing(sqlite3.connect(jobs / "jobs.db", timeout=10)) as connection, connection:
        connection.execute(statement)


def test_the_result_is_what_predict_answers(client):
    for row in (ROW, [ROW, [0.5, 0.25]]):
        status, headers, job = client.ask("POST", "/v1/jobs", {"data": row})
        assert (status, headers["Location"]) == (202, f"/v1/jobs/{job['id']}")
        assert re.fullmatch("[0-9a-f]{32}", job["id"]) and job["status"] == "pending" and job["position"] >= 1
        done = client.wait(job["id"], "completed")
        assert client.result(job["id"]) == client.service.predict(row)[2]
        assert done["ran_by"] == {"colour": "green", "version": "1.0.0"}
        assert (done["model"], done["version"], done["attempts"]) == ("simplemodel", "1.0.0", 1)
        assert done["submitted"] <= done["started"] <= done["finished"] < done["expires"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["finished"])


def test_a_model_is_named_in_the_path(client):
    status, _, job = client.ask("POST", "/v1/model/simplemodel/jobs", {"data": ROW})
    assert status == 202
    client.wait(job["id"], "completed")
    assert client.ask("POST", "/v1/model/other/jobs", {"data": ROW})[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/jobs", b"{", {}, 400),
        ("POST", "/v1/jobs", {"data": [1, 2, 3]}, {}, 400),
        ("POST", "/v1/jobs", {"data": ["x", 2]}, {}, 400),
        ("POST", "/v1/jobs", b"x" * 10_001, {}, 413),
        ("POST", "/v1/jobs", {"data": ROW}, {"Content_Encoding": "br"}, 415),
        ("POST", "/v1/jobs", {"data": ROW}, {"Idempotency_Key": "x" * 256}, 400),
        ("GET", "/v1/jobs/unknown", None, {}, 404),
        ("GET", "/v1/jobs/unknown/result", None, {}, 404),
        ("POST", "/v1/jobs/unknown/cancel", None, {}, 404),
        ("POST", "/v1/jobs/unknown/retry", None, {}, 404),
        ("GET", "/v1/jobs?status=lost", None, {}, 400),
        ("GET", "/v1/jobs?limit=0", None, {}, 400),
        ("GET", "/v1/jobs?limit=1001", None, {}, 400),
        ("GET", "/v1/jobs?limit=0000001000", None, {}, 400),
        ("GET", "/v1/jobs?limit=000000100" + "9" * 30, None, {}, 400),
        ("GET", "/v1/jobs?after=unknown", None, {}, 404),
        ("DELETE", "/v1/jobs", None, {}, 405),
    ],
)
def test_refusals_are_json(client, method, path, body, headers, status):
    found, _, answer = client.ask(method, path, body, **headers)
    assert (found, answer.keys()) == (status, {"error"})


def test_an_idempotency_key_is_for_one_job(client):
    first = client.submit(ROW, Idempotency_Key="mine")
    status, _, again = client.ask("POST", "/v1/jobs", {"data": ROW}, Idempotency_Key="mine")
    assert (status, again["id"]) == (200, first)
    assert client.ask("POST", "/v1/jobs", {"data": [1, 1]}, Idempotency_Key="mine")[0] == 422


def test_the_list_holds_no_inputs(client):
    ids = [client.submit([0.111222, 0.5]) for _ in range(3)]
    _, _, page = client.ask("GET", "/v1/jobs?limit=2")
    assert [job["id"] for job in page["jobs"]] == ids[:0:-1] and page["next"] == ids[1]
    _, _, rest = client.ask("GET", f"/v1/jobs?limit=1&after={page['next']}")
    assert [job["id"] for job in rest["jobs"]] == [ids[0]]
    for job_id in ids:
        client.wait(job_id, "completed")
    _, _, done = client.ask("GET", "/v1/jobs?status=completed&limit=1000")
    assert set(ids) <= {job["id"] for job in done["jobs"]} and done["next"] is None
    assert "0.111222" not in json.dumps([page, done]) and "0.111222" not in client.service.log_file.read_text()


def test_metrics_and_log_lines(client):
    job_id = client.submit(ROW, X_Request_ID="asked-for-a-job")
    client.wait(job_id, "completed")
    client.service.wait_for(
        lambda: client.service.metrics().get('model_job_duration_seconds_count{model="simplemodel"}', 0) >= 1, "counted"
    )
    found = client.service.metrics()
    assert found['model_jobs_finished_total{status="completed"}'] >= 1
    assert found['model_jobs{status="completed"}'] >= 1 and found['model_jobs{status="in_progress"}'] == 0
    assert found['http_requests_total{code="200",method="GET",path="/v1/jobs/<job_id>"}'] >= 1
    lines = {line["event"]: line for line in client.service.logs() if line.get("job") == job_id}
    assert lines["job_submitted"]["request_id"] == "asked-for-a-job"
    assert lines["job_finished"]["status"] == "completed" and lines["job_finished"]["seconds"] >= 0


@pytest.mark.parametrize("colour", ["green", "blue"])
def test_a_job_survives_the_death_of_everything(short_dir, bundle_dir, tmp_path, colour):
    slow(bundle_dir, 3)
    with serving(short_dir / "a", bundle_dir, tmp_path) as client:
        job_id, waiting = client.submit(SLOW_ROW), client.submit(ROW)
        client.wait(job_id, "in_progress")
        assert client.job(waiting)["position"] == 1
        kill_everything(client)
    if colour != "green":
        change(tmp_path, "update consumers set beat = beat - 121")
    with serving(short_dir / "b", bundle_dir, tmp_path, MODEL_COLOUR=colour) as client:
        done = client.wait(job_id, "completed")
        assert (done["attempts"], done["ran_by"]["colour"]) == (2, colour)
        assert client.wait(waiting, "completed")["attempts"] == 1
        assert client.result(job_id) == client.service.predict(SLOW_ROW)[2]


def test_jobs_of_a_replaced_model_are_run_by_the_colour_that_serves_it(short_dir, bundle_dir, tmp_path):
    slow(bundle_dir, 3)
    with serving(short_dir / "green", SHIPPED / "1.0.0", tmp_path) as green:
        with serving(short_dir / "blue", bundle_dir, tmp_path, MODEL_COLOUR="blue", MODEL_DRAIN_SECONDS=0) as before:
            ids = [before.submit(SLOW_ROW), before.submit(ROW)]
            before.wait(ids[0], "in_progress")
            before.service.process.terminate()
            assert before.service.process.wait(SECONDS) == 0
        digits = ROOT / "bundles" / "digits" / "1.0.0"
        with serving(short_dir / "after", digits, tmp_path, MODEL_COLOUR="blue") as after:
            for job_id, row in zip(ids, (SLOW_ROW, ROW), strict=True):
                assert green.wait(job_id, "completed")["ran_by"] == {"colour": "green", "version": "1.0.0"}
                assert after.result(job_id) == green.service.predict(row)[2]
            assert "jobs_left" in after.service.log_file.read_text()
            image = json.loads((digits / "examples.json").read_text())["examples"][0]["request"]["data"]
            assert after.wait(after.submit(image), "completed")["ran_by"]["colour"] == "blue"


def test_a_job_whose_model_nobody_serves_waits_until_somebody_does(short_dir, bundle_dir, tmp_path):
    slow(bundle_dir, 600)
    with serving(short_dir / "a", bundle_dir, tmp_path, MODEL_DRAIN_SECONDS=0) as client:
        job_id = client.submit(SLOW_ROW)
        client.wait(job_id, "in_progress")
        client.service.process.terminate()
        assert client.service.process.wait(SECONDS) == 0
    with serving(short_dir / "b", ROOT / "bundles" / "digits" / "1.0.0", tmp_path) as client:
        client.service.wait_for(lambda: "jobs_left" in client.service.log_file.read_text(), "left")
        job = client.job(job_id)
        assert (job["status"], job["position"], job["estimated_seconds"]) == ("pending", None, None)
    with serving(short_dir / "c", SHIPPED / "1.0.0", tmp_path) as client:
        assert client.wait(job_id, "completed")["attempts"] == 1


def test_a_job_that_kills_the_consumer_fails_after_its_attempts(short_dir, bundle_dir, tmp_path):
    source = (bundle_dir / "model.py").read_text()
    deadly = "import os\n        rows[0, 0] == 9 and os.kill(os.getpid(), 9)\n        return self.layers(rows)"
    (bundle_dir / "model.py").write_text(source.replace("return self.layers(rows)", deadly))
    write_sums(bundle_dir)
    with serving(short_dir / "a", bundle_dir, tmp_path, MODEL_JOBS_ATTEMPTS=2) as client:
        job_id, waiting = client.submit(SLOW_ROW), client.submit(ROW)
        failed = client.wait(job_id, "failed")
        assert (failed["attempts"], failed["error"]) == (2, "the service died while it ran")
        client.wait(waiting, "completed")
        assert client.service.health()[1]["status"] == "ready"


def test_a_job_is_canceled_and_retried(short_dir, bundle_dir, tmp_path):
    slow(bundle_dir, 2)
    with serving(short_dir / "a", bundle_dir, tmp_path) as client:
        running_job, pending = client.submit(SLOW_ROW), client.submit(ROW)
        client.wait(running_job, "in_progress")
        for job_id in (running_job, pending):
            status, _, job = client.ask("POST", f"/v1/jobs/{job_id}/cancel")
            assert (status, job["status"]) == (200, "canceled")
        client.wait(client.submit(ROW), "completed")
        assert [client.job(job_id)["status"] for job_id in (running_job, pending)] == ["canceled", "canceled"]
        assert client.job(pending)["attempts"] == 0
        assert client.ask("GET", f"/v1/jobs/{running_job}/result")[0] == 409
        assert client.ask("POST", f"/v1/jobs/{running_job}/cancel")[0] == 409
        assert client.ask("POST", f"/v1/jobs/{running_job}/retry")[0] == 202
        client.wait(running_job, "completed")
        assert client.ask("POST", f"/v1/jobs/{running_job}/retry")[0] == 409
        assert client.service.metrics()['model_jobs_finished_total{status="canceled"}'] == 2


def test_a_result_outlives_its_colour_until_it_expires(short_dir, tmp_path):
    with serving(short_dir / "a", SHIPPED / "1.0.0", tmp_path) as client:
        job_id = client.submit(ROW)
        client.wait(job_id, "completed")
        expected = client.result(job_id)
        client.service.process.terminate()
        assert client.service.process.wait(SECONDS) == 0
    with serving(short_dir / "b", SHIPPED / "1.1.0", tmp_path, MODEL_COLOUR="blue") as client:
        assert client.result(job_id) == expected
        assert client.job(job_id)["ran_by"] == {"colour": "green", "version": "1.0.0"}
        change(tmp_path, "update jobs set finished = finished - 86401")
        assert client.ask("GET", f"/v1/jobs/{job_id}/result")[0] == 410
        change(tmp_path, "update jobs set finished = finished - 86401")
        client.service.wait_for(lambda: client.ask("GET", f"/v1/jobs/{job_id}")[0] == 404, "removed")


def test_sigterm_hands_a_long_job_back_and_finishes_a_short_one(short_dir, bundle_dir, tmp_path):
    slow(bundle_dir, 3)

    def stopped() -> list[tuple]:
        client.wait(job_id, "in_progress")
        client.service.process.terminate()
        assert client.service.process.wait(SECONDS) == 0
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
            return connection.execute("select status, attempts from jobs").fetchall()

    with serving(short_dir / "a", bundle_dir, tmp_path, MODEL_DRAIN_SECONDS=1) as client:
        job_id = client.submit(SLOW_ROW)
        assert stopped() == [("pending", 0)]
    with serving(short_dir / "a", bundle_dir, tmp_path, MODEL_DRAIN_SECONDS=20) as client:
        assert stopped() == [("completed", 1)]


def test_a_job_that_takes_too_long_fails_and_the_next_one_runs(short_dir, bundle_dir, tmp_path):
    slow(bundle_dir, 600)
    with serving(short_dir / "a", bundle_dir, tmp_path, MODEL_JOBS_LONGEST_SECONDS=1) as client:
        endless, following = client.submit(SLOW_ROW), client.submit(ROW)
        assert client.wait(endless, "failed")["error"] == "it took longer than 1 s"
        client.wait(following, "completed")


def test_a_job_that_lets_no_thread_run_is_ended_too(short_dir, bundle_dir, tmp_path):
    source = (bundle_dir / "model.py").read_text()
    endless = 'import re\n        rows[0, 0] == 9 and re.fullmatch(rb"(a+)+", b"a" * 60 + b"b")\n        return self'
    (bundle_dir / "model.py").write_text(source.replace("return self", endless))
    write_sums(bundle_dir)
    settings = {"MODEL_JOBS_LONGEST_SECONDS": 1, "MODEL_JOBS_ATTEMPTS": 1, "MODEL_HANG_SECONDS": 2}
    with serving(short_dir / "a", bundle_dir, tmp_path, **settings) as client:
        job_id, following = client.submit(SLOW_ROW), client.submit(ROW)
        failed = client.wait(job_id, "failed")
        assert (failed["attempts"], failed["error"]) == (1, "the service died while it ran")
        client.wait(following, "completed")
        [line] = [line for line in client.service.logs() if line["event"] == "worker_hung"]
        assert line["role"] == "jobs" and "is at one job for" in line["message"]


def test_what_the_model_says_when_it_fails_is_told_to_nobody(short_dir, bundle_dir, tmp_path):
    source = (bundle_dir / "model.py").read_text()
    failing = 'import sys\n        rows[0, 0] == 9 and sys.exit("a secret")\n        return self.layers(rows)'
    (bundle_dir / "model.py").write_text(source.replace("return self.layers(rows)", failing))
    write_sums(bundle_dir)
    with serving(short_dir / "a", bundle_dir, tmp_path) as client:
        job_id = client.submit(SLOW_ROW)
        failed = client.wait(job_id, "failed")
        assert (failed["error"], failed["attempts"]) == ("the model failed on this request", 1)
        status, _, answer = client.ask("GET", f"/v1/jobs/{job_id}/result")
        assert (status, answer) == (409, {"error": "the job failed: the model failed on this request"})
        client.wait(client.submit(ROW), "completed")
        [line] = [line for line in client.service.logs() if line["event"] == "prediction_failed"]
        assert (line["job"], line["message"]) == (job_id, "the model failed: SystemExit")
        # What it says may quote the input.
        assert ", in forward\n" in line["traceback"] and "a secret" not in client.service.log_file.read_text()


def test_online_requests_come_first(client):
    # 19 is the most there is, also where the tests themselves run under nice.
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    assert os.getpriority(os.PRIO_PROCESS, consumer_of(client)) == wanted


def test_predictions_are_served_without_jobs(short_dir):
    with serving(short_dir / "a", SHIPPED / "1.0.0", "") as client:
        assert len(client.service.children()) == 2
        for method, path in (
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs/x/result"),
            ("POST", "/v1/model/simplemodel/jobs"),
        ):
            assert client.ask(method, path, {"data": ROW})[::2] == (404, {"error": "jobs are not enabled"})
        assert client.service.predict(ROW)[0] == 200
        assert not [name for name in client.service.metrics() if name.startswith("model_jobs{")]


def test_a_directory_that_cannot_be_used_is_tried_again(short_dir, tmp_path):
    missing = tmp_path / "jobs"
    with serving(short_dir / "a", SHIPPED / "1.0.0", missing) as client:
        status, headers, _ = client.ask("POST", "/v1/jobs", {"data": ROW})
        assert (status, headers["Retry-After"]) == (503, "10")
        assert client.service.predict(ROW)[0] == 200
        client.service.wait_for(lambda: "jobs_unavailable" in client.service.log_file.read_text(), "told")
        missing.mkdir()
        client.service.wait_for(lambda: client.ask("POST", "/v1/jobs", {"data": ROW})[0] == 202, "available")
        client.service.wait_for(lambda: "jobs_available" in client.service.log_file.read_text(), "told")
