"""The load simulator, run by Locust against a real server, with and without its web page."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter

import jinja2
import pytest
import yaml
from answering import LOADTEST, LOCUST, Server

pytestmark = pytest.mark.needs("locust")
PROJECT = LOADTEST.parents[1]
ROW, IMAGE = {"data": [1, 2]}, {"data": "aW1hZ2U="}


@pytest.fixture
def appliance(tmp_path):
    """The files of an appliance on which blue is live, and green is empty; `bundle` adds examples to blue's."""

    class Appliance:
        file = tmp_path / "appliance.json"
        live = tmp_path / "bundles/pair/1.0.0"

        def bundle(self, examples, model="", colour="blue", directory=live):
            place = directory / model
            place.mkdir(parents=True)
            (place / "examples.json").write_text(json.dumps({"examples": [{"request": body} for body in examples]}))
            (tmp_path / f"{colour}.env").write_text(f"MODEL_RELEASE=1\nMODEL_BUNDLE={directory}\n")

        def arguments(self, server, *options):
            settings = {"colours": ["blue", "green"], "state_dir": str(tmp_path), "config_dir": str(tmp_path)}
            self.file.write_text(json.dumps({**settings, "front_door": server.url}))
            return [
                *(LOCUST, f"--locustfile={LOADTEST / 'simulator.py'}", f"--appliance={self.file}", "--skip-log-setup"),
                *("--timeout-seconds=5", "--think-seconds=0.02", "--users=4", "--spawn-rate=4", "--run-time=2"),
                *("--stop-timeout=6", *options),
            ]

        def run(self, kinds, *options):
            """Run it without its page; returns the server and what it wrote."""
            with Server(kinds) as server:
                answer = subprocess.run(
                    [*self.arguments(server, "--headless", "--exit-code-on-error=0", *options)],
                    env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
            assert answer.returncode == 0, answer.stderr
            return server, json.loads(answer.stdout)

    (tmp_path / "routing/states/1").mkdir(parents=True)
    (tmp_path / "routing/states/1/blue").touch()
    (tmp_path / "routing/current").symlink_to("states/1")
    return Appliance()


def test_each_kind_of_user_posts_its_examples_to_their_model(appliance):
    appliance.bundle([ROW], "numbers")
    appliance.bundle([IMAGE], "pictures")
    server, report = appliance.run(["good"], "--target=production")
    posted = Counter((path, body) for _, _, path, body in server.seen)
    assert set(posted) == {
        ("/v1/model/numbers/predict", json.dumps(ROW).encode()),
        ("/v1/model/pictures/predict", json.dumps(IMAGE).encode()),
    }
    assert {headers["X-User-Id"] for headers in server.headers} == {f"loadtest-{n}" for n in range(1, 5)}
    ids = {headers["X-Request-ID"] for headers in server.headers}
    assert len(ids) == len(server.seen) and all(name.startswith("loadtest-") for name in ids)
    assert report["requests"] == len(server.seen) > 10 and report["failures"] == 0 and report["faults"] == []
    assert (report["target"], report["bundle"]) == ("production", "pair 1.0.0")
    assert [line.split()[:3] for line in report["table"][1:]] == [
        ["image", "/v1/model/pictures/predict", str(posted["/v1/model/pictures/predict", json.dumps(IMAGE).encode()])],
        ["tabular", "/v1/model/numbers/predict", str(posted["/v1/model/numbers/predict", json.dumps(ROW).encode()])],
        ["all", "-", str(len(server.seen))],
    ]


def test_criteria_that_are_missed_are_named_with_their_values(appliance):
    appliance.bundle([ROW])
    server, report = appliance.run(
        ["late", "late", "html", "error", "garbage"],
        *("--target=production", "--max-error-share=0.1", "--max-p50-ms=1000000", "--max-p95-ms=100"),
    )
    counts = Counter(kind for kind, *_ in server.seen)
    assert report["requests"] == counts.total() > 5
    assert report["failures"] == counts["html"] + counts["error"] + counts["garbage"]
    assert report["errors"]["status 500"] == counts["error"] and report["errors"]["not JSON"] == counts["html"]
    share, slow = report["faults"]
    assert share.startswith(f"{report['failures']} of {report['requests']} requests failed (")
    assert f"{counts['error']} × status 500" in share and share.endswith("max_error_share is 0.1")
    assert slow == f"p95_ms is {report['p95_ms']:g}; max_p95_ms is 100"


def test_too_few_requests_pass_nothing(appliance):
    appliance.bundle([ROW])
    server, report = appliance.run(["good"], "--target=production", "--min-requests=100000")
    assert report["faults"] == [
        f"{len(server.seen)} requests say nothing, fewer than 100000: take more users or more time"
    ]


def test_the_idle_colour_is_asked_for_its_own_examples(appliance, tmp_path):
    appliance.bundle([ROW])
    other = {"data": [3]}
    appliance.bundle([other], colour="green", directory=tmp_path / "bundles/single/2")
    server, report = appliance.run(["good"], "--target=test", "--run-time=1")
    assert {(path, body) for _, _, path, body in server.seen} == {("/test/predict", json.dumps(other).encode())}
    assert report["bundle"] == "single 2"


@pytest.mark.parametrize("case", ["empty", "none live", "no file"])
def test_where_nothing_can_be_posted_the_reason_is_the_result(appliance, tmp_path, case):
    appliance.bundle([ROW])
    said = {"empty": "green holds no release", "none live": "no colour is live", "no file": "FileNotFoundError"}[case]
    if case == "none live":
        (tmp_path / "routing/current").unlink()
    elsewhere = [f"--appliance={tmp_path / 'nothing'}"] if case == "no file" else []
    server, report = appliance.run(["good"], "--target=test", "--run-time=1", *elsewhere)
    assert server.seen == [] and report["failures"] == report["requests"]
    assert len(report["faults"]) == 1 and said in report["faults"][0]


def test_a_ramp_begins_with_one_user(appliance):
    appliance.bundle([ROW])
    server, report = appliance.run(["good"], "--target=production", "--ramp=linear", "--run-time=5")
    users = [headers["X-User-Id"] for headers in server.headers]
    assert set(users[:5]) == {"loadtest-1"} and len(set(users)) >= 3


@pytest.mark.parametrize("source", ["playbook", "page"])
def test_the_role_starts_it_with_options_that_it_has(source):
    role = PROJECT / "roles/loadtest"
    if source == "page":
        text = (role / "templates/appliance-loadtest-web.service.j2").read_text()
        values = {"loadtest_web_port": 8089}
    else:
        [measure] = [task for task in yaml.safe_load((role / "tasks/run.yml").read_text()) if "block" in task]
        text = measure["block"][0]["ansible.builtin.command"]["cmd"]
        [play] = yaml.safe_load((PROJECT / "playbooks/loadtest.yml").read_text())
        values = {"loadtest_run": {name: render(value) for name, value in play["vars"]["asked"].items()}}
    [options] = re.findall(r"simulator\.py ((?:.*\\\n)*.*)", text)
    options = shlex.split(render(options.replace("\\\n", ""), **values))
    assert len(options) > 5 and (source == "playbook" or "--web-host=127.0.0.1" in options)
    command = [LOCUST, f"--locustfile={LOADTEST / 'simulator.py'}", "--list", *options]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "TabularUser" in answer.stdout, answer.stderr


def render(text, **values):
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(values)


class TestPage:
    @pytest.fixture
    def page(self, appliance):
        """The page's address, and the server that its users ask."""
        appliance.bundle([ROW])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with Server(["good"]) as server:
            process = subprocess.Popen(
                appliance.arguments(server, "--web-host=127.0.0.1", f"--web-port={port}"),
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            url = f"http://127.0.0.1:{port}"
            try:
                wait_for(lambda: answers(url), process)
                yield url, server
            finally:
                process.kill()
                process.wait()

    def test_it_starts_a_run_as_its_form_says(self, page):
        url, server = page
        assert b"production" in ask(url)
        form = {"user_count": 2, "spawn_rate": 2, "run_time": "2s", "target": "production", "think_seconds": "0.05"}
        answer = json.loads(ask(f"{url}/swarm", form | {"ramp": "none", "host": "http://192.0.2.1"}))
        assert answer["success"]
        wait_for(lambda: json.loads(ask(f"{url}/stats/requests"))["state"] == "stopped")
        assert {path for _, _, path, _ in server.seen} == {"/predict"}
        assert {headers["X-User-Id"] for headers in server.headers} == {"loadtest-1", "loadtest-2"}

    def test_a_run_follows_the_form_while_it_goes_on(self, page):
        url, server = page
        form = {"spawn_rate": 5, "run_time": "10m", "target": "production", "think_seconds": "0.05", "ramp": "none"}
        ask(f"{url}/swarm", form | {"user_count": 1})
        wait_for(lambda: len(server.seen) > 5)
        assert {headers["X-User-Id"] for headers in server.headers} == {"loadtest-1"}
        ask(f"{url}/swarm", form | {"user_count": 3, "host": "http://192.0.2.1"})
        wait_for(lambda: len({headers["X-User-Id"] for headers in server.headers}) == 3)

    @pytest.mark.parametrize("header", [{"Origin": "http://example.com"}, {"Host": "example.com"}, {"Origin": "null"}])
    def test_other_pages_cant_use_it(self, page, header):
        url, server = page
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask(f"{url}/swarm", {"user_count": 2, "spawn_rate": 2, "target": "production"}, header)
        assert json.loads(ask(f"{url}/stats/requests"))["state"] == "ready" and server.seen == []


def ask(url, form=None, headers=None):
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=30) as answer:
        return answer.read()


def answers(url):
    try:
        ask(url)
    except urllib.error.URLError:
        return False
    return True


def wait_for(condition, process=None):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.1)
