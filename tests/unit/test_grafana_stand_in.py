"""The stand-in for Grafana is only worth something if it refuses what Grafana would choke on."""

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "molecule/grafana/stand_in/grafana_stand_in.py"
DASHBOARD = ROOT / "roles/grafana/files/dashboards/appliance-overview.json"
DATASOURCE = {"name": "Prometheus", "uid": "prometheus", "type": "prometheus", "access": "proxy"}
PASSWORD = "only-for-this-test"


class Provisioning:
    """A directory as the role leaves it on a host."""

    def __init__(self, directory):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = directory / "grafana.ini"
        self.password = directory / "admin_password"
        self.dashboards = directory / "dashboards"
        self.datasource = directory / "provisioning/datasources/appliance.yml"
        self.provider = directory / "provisioning/dashboards/appliance.yml"
        data = directory / "data"
        for path in (self.dashboards, self.datasource.parent, self.provider.parent, data):
            path.mkdir(parents=True)
        self.password.write_text(PASSWORD)
        self.config.write_text(
            f"; a comment\n[server]\nhttp_addr = 127.0.0.1\nhttp_port = {self.port}\n"
            f"[security]\nadmin_password = $__file{{{self.password}}}\n"
            f"[dashboards]\ndefault_home_dashboard_path = {self.dashboards / DASHBOARD.name}\n"
            f"[paths]\ndata = {data}\nprovisioning = {directory / 'provisioning'}\n"
        )
        self.write(self.datasource, "datasources", **DATASOURCE)
        self.write(self.provider, "providers", name="appliance", type="file", options={"path": str(self.dashboards)})
        (self.datasource.parent / "sample.yaml").write_text("# nothing\napiVersion: 1\n")
        shutil.copy(DASHBOARD, self.dashboards)

    @staticmethod
    def write(path, key, **entry):
        path.write_text(yaml.safe_dump({"apiVersion": 1, key: [entry]}))

    def add_dashboard(self, name, **changes):
        model = json.loads(DASHBOARD.read_text()) | changes
        (self.dashboards / name).write_text(json.dumps(model))

    def command(self, *arguments, program=STAND_IN):
        return [sys.executable, str(program), f"--config={self.config}", *arguments]

    def refusal(self):
        result = subprocess.run(self.command(), capture_output=True, text=True, timeout=20)
        assert result.returncode == 1
        assert result.stderr.startswith("stand-in for Grafana: refused: ")
        assert PASSWORD not in result.stderr
        return result.stderr

    def get(self, path, password=PASSWORD):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def provisioning(tmp_path):
    return Provisioning(tmp_path)


@pytest.fixture
def running(provisioning):
    process = subprocess.Popen(provisioning.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                provisioning.get("/api/health")
                break
            except urllib.error.URLError:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < deadline, "the stand-in didn't start in time"
                time.sleep(0.05)
        yield provisioning
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_it_says_what_it_is():
    output = subprocess.run([sys.executable, str(STAND_IN), "-v"], capture_output=True, text=True, check=True).stdout
    assert "stand-in for Grafana" in output


def test_good_provisioning_is_served(running):
    assert running.get("/api/health", password=None)[1]["database"] == "ok"
    assert running.get("/api/datasources/uid/prometheus")[1]["name"] == "Prometheus"
    assert running.get("/api/datasources/uid/other")[0] == 404
    assert [found["uid"] for found in running.get("/api/search")[1]] == ["appliance-overview"]


def test_the_home_page_is_served(running):
    home = running.get("/api/dashboards/home")[1]
    assert home["meta"]["isHome"] and home["dashboard"]["uid"] == "appliance-overview"


@pytest.mark.parametrize(("content", "reason"), [(None, "can't be read"), ("{", "isn't JSON")])
def test_broken_home_page_is_refused(provisioning, tmp_path, content, reason):
    home = tmp_path / "home.json"
    if content:
        home.write_text(content)
    settings = provisioning.config.read_text()
    provisioning.config.write_text(settings.replace(str(provisioning.dashboards / DASHBOARD.name), str(home)))
    refusal = provisioning.refusal()
    assert str(home) in refusal and reason in refusal


@pytest.mark.parametrize("password", [None, "wrong"])
def test_only_the_administrator_may_ask(running, password):
    assert running.get("/api/datasources/uid/prometheus", password)[0] == 401


def test_dashboards_are_read_again_without_a_restart(running):
    running.add_dashboard("second.json", uid="second", title="Second")
    assert {found["uid"] for found in running.get("/api/search")[1]} == {"appliance-overview", "second"}
    (running.dashboards / "third.json").write_text("{")
    assert {found["uid"] for found in running.get("/api/search")[1]} == {"appliance-overview", "second"}


def test_the_password_file_counts_only_for_a_new_database(running, tmp_path):
    running.password.write_text("another")
    cli = tmp_path / "grafana-cli"
    shutil.copy(STAND_IN, cli)
    assert running.get("/api/user", "another")[0] == 401
    reset = running.command("admin", "reset-admin-password", "--password-from-stdin", program=cli)
    subprocess.run(reset, input="another", text=True, check=True, timeout=20)
    assert running.get("/api/user", "another")[0] == 200
    assert running.get("/api/user", PASSWORD)[0] == 401


def test_duplicate_dashboard_uid_is_refused(provisioning):
    provisioning.add_dashboard("copy.json", title="Another title")
    assert "the uid 'appliance-overview' is taken" in provisioning.refusal()


def test_duplicate_dashboard_title_is_refused(provisioning):
    provisioning.add_dashboard("copy.json", uid="another-uid")
    assert "the title 'Appliance overview' is taken" in provisioning.refusal()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"uid": None}, "has no uid"),
        ({"id": 7}, "id has to be null"),
        ({"schemaVersion": 12}, "schemaVersion is 12"),
        ({"panels": []}, "has no panels"),
        ({"__inputs": []}, "export for sharing"),
        ({"panels": [{"id": 1, "type": "graph"}]}, "'graph' isn't known"),
        ({"panels": [{"id": 1, "type": "stat"}, {"id": 1, "type": "stat"}]}, "the id 1 is taken"),
        ({"panels": [{"id": 1, "type": "stat", "datasource": {"uid": "other"}}]}, "'other', which isn't provisioned"),
    ],
)
def test_bad_dashboard_is_refused(provisioning, changes, reason):
    provisioning.add_dashboard("bad.json", **({"uid": "bad", "title": "Bad"} | changes))
    assert reason in provisioning.refusal()


def test_dashboard_that_is_not_json_is_refused(provisioning):
    (provisioning.dashboards / "bad.json").write_text('{"uid": ')
    assert "bad.json isn't JSON" in provisioning.refusal()


@pytest.mark.parametrize("missing", ["name", "uid", "type", "access"])
def test_incomplete_data_source_is_refused(provisioning, missing):
    entry = {key: value for key, value in DATASOURCE.items() if key != missing}
    provisioning.write(provisioning.datasource, "datasources", **entry)
    assert f"has no {missing}" in provisioning.refusal()


@pytest.mark.parametrize("key", ["datasource", "provider"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("apiVersion: 1\ndatasources: [\n", "isn't YAML"),
        ("apiVersion: 2\n", "apiVersion has to be 1"),
        ("- 1\n", "a mapping"),
    ],
)
def test_broken_provisioning_file_is_refused(provisioning, key, text, reason):
    getattr(provisioning, key).write_text(text)
    assert reason in provisioning.refusal()


def test_provider_without_its_directory_is_refused(provisioning):
    shutil.rmtree(provisioning.dashboards)
    assert "is no directory" in provisioning.refusal()


def test_missing_password_file_is_refused(provisioning):
    provisioning.password.unlink()
    assert "admin_password can't be read" in provisioning.refusal()


def test_empty_password_file_is_refused(provisioning):
    provisioning.password.write_text("\n")
    assert "admin_password is empty" in provisioning.refusal()


def test_unreadable_password_file_is_refused(provisioning):
    # Permission bits don't stop root, under whom tests may run; a directory can't be read as a file by anybody.
    provisioning.password.unlink()
    provisioning.password.mkdir()
    assert "admin_password can't be read" in provisioning.refusal()


@pytest.mark.parametrize("line", ["no equals sign", "[security]\nadmin_user = twice"])
def test_broken_settings_are_refused(provisioning, line):
    provisioning.config.write_text(provisioning.config.read_text() + line + "\n")
    assert str(provisioning.config) in provisioning.refusal()


def test_port_that_is_taken_is_refused(provisioning):
    with socket.socket() as other:
        other.bind(("127.0.0.1", provisioning.port))
        other.listen()
        assert "can't be listened on" in provisioning.refusal()
