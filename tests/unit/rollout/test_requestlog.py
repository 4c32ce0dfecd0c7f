"""One request through the logs of nginx and of the model."""

import gzip
import json
from pathlib import Path

import pytest


def nginx_line(request_id="r-1", time="2026-01-31T12:00:05+00:00", **more):
    about = {"time": time, "environment": "prod", "request_id": request_id, "status": 200, "request_seconds": 2.5}
    return json.dumps(about | more) + "\n"


def model_line(request_id="r-1", time="2026-01-31T12:00:04.900Z", **more):
    return json.dumps({"time": time, "event": "request", "colour": "blue", "request_id": request_id} | more) + "\n"


@pytest.fixture
def logs(box):
    """Writes nginx's log of some name, and what the journal answers."""

    class Logs:
        directory = box.door.access_log.parent

        def write(self, name, *lines):
            data = "".join(lines).encode()
            (self.directory / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

        def journal(self, *lines):
            box.host.journal["blue"] = "".join(lines)

    return Logs()


def test_both_sides_of_a_request_are_shown_one_after_the_other(box, logs):
    logs.write("access.log", nginx_line("r-2"), nginx_line(), nginx_line("r-11"))
    logs.journal(model_line("r-11"), model_line(queue_ms=0.1))
    answer = box.run("logs", "r-1", json_output=False)
    headline, nginx, model = answer.out.splitlines()
    assert answer.status == 0 and headline == "request r-1: 1 of nginx's lines, 1 of the model's"
    assert nginx == f"nginx  {nginx_line().strip()}" and model == f"model  {model_line(queue_ms=0.1).strip()}"
    found = box.run("logs", "r-1").json
    assert (found["ok"], found["changed"], found["request_id"]) == (True, False, "r-1")
    assert found["nginx"] == [json.loads(nginx_line())] and found["model"] == [json.loads(model_line(queue_ms=0.1))]


def test_rotated_logs_and_that_of_the_idle_colour_are_looked_through(box, logs):
    for day, name in enumerate(("test_access.log", "access.log.1", "access.log.2.gz", "test_access.log.7.gz"), 1):
        logs.write(name, nginx_line(time=f"2026-01-0{day}T12:00:00+00:00", name=name))
    found = box.run("logs", "r-1").json
    assert [entry["name"] for entry in found["nginx"]] == [
        "test_access.log",
        "access.log.1",
        "access.log.2.gz",
        "test_access.log.7.gz",
    ]


def test_what_is_damaged_hides_nothing_else(box, logs):
    logs.write("access.log", "\x00\x01 r-1\n", '"r-1"\n', nginx_line()[:40] + "\n", nginx_line())
    logs.write("access.log.2.gz", nginx_line())
    torn = logs.directory / "access.log.2.gz"
    torn.write_bytes(torn.read_bytes()[:30])
    (logs.directory / "access.log.3.gz").write_bytes(b"not compressed")
    logs.journal("Started model r-1.\n", model_line())
    found = box.run("logs", "r-1").json
    assert (len(found["nginx"]), len(found["model"])) == (1, 1)


def test_the_journal_is_asked_for_the_time_that_nginx_names(box, logs):
    logs.write("access.log", nginx_line("a.b"))
    box.run("logs", "a.b")
    command = box.host.calls[-1]
    assert command[:3] == ["journalctl", "--unit=model@blue.service", "--unit=model@green.service"]
    assert r"--grep=a\.b" in command
    # 12:00:05, less the two and a half seconds that it took, in seconds since the epoch.
    assert "--since=@1769860792" in command and "--until=@1769861105" in command


def test_a_request_that_nginx_never_saw_is_looked_for_in_all_of_the_journal(box, logs):
    logs.journal(model_line("gate-1"))
    answer = box.run("logs", "gate-1")
    assert answer.status == 0 and answer.json["nginx"] == []
    assert not [part for part in box.host.calls[-1] if part.startswith(("--since", "--until"))]


def test_nothing_found_says_where_was_looked(box, logs):
    logs.write("access.log", nginx_line("other"))
    answer = box.run("logs", "r-1")
    assert answer.status == 1 and not answer.json["ok"]
    assert "no log holds the request r-1" in answer.message and str(box.door.access_log) in answer.message


@pytest.mark.parametrize("wrong", ["", "a b", "a" * 65, "a\n", "../etc", "x;id"])
def test_what_nginx_would_not_take_for_an_id_is_refused(box, wrong):
    answer = box.run("logs", wrong)
    assert answer.status == 2 and "1 to 64 letters" in answer.err
    assert box.host.calls == []


def test_a_journal_that_cant_be_read_is_an_error(box, logs, monkeypatch):
    logs.write("access.log", nginx_line())
    monkeypatch.setattr(box.host, "_do", lambda command: (1, "", "Failed to open journal: \x1b[31mdenied"))
    answer = box.run("logs", "r-1")
    assert answer.status == 1 and answer.message == "the journal can't be read: Failed to open journal: [31mdenied"


def test_a_log_that_may_not_be_read_asks_for_root(box, logs, monkeypatch):
    opening = Path.open

    def refuse(path, *arguments, **options):
        if path == box.door.access_log:
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    answer = box.run("logs", "r-1")
    assert answer.status == 5 and answer.message == f"{box.door.access_log}: Permission denied: run with sudo"
