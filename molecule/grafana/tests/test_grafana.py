"""Prometheus and Grafana on a provisioned host. Nothing here needs the stand-in: a real Grafana has to pass as well."""

import json
from pathlib import Path

import pytest

DASHBOARDS = Path(__file__).resolve().parents[3] / "roles/grafana/files/dashboards"
USER_URL = "http://127.0.0.1:3000/api/user"
PASSWORD_FILE = "/etc/grafana/admin_password"
SERVICES = ["prometheus", "prometheus-node-exporter", "grafana-server"]


def http(host, url, user=None):
    """GET on the host; the password goes from its file into the request, never on a command line."""
    script = "import base64, sys, urllib.request as r; q = r.Request(sys.argv[1])\n"
    if user:
        script += (
            f"c = base64.b64encode(b'{user}:' + open('{PASSWORD_FILE}', 'rb').read().strip()).decode()\n"
            "q.add_header('Authorization', 'Basic ' + c)\n"
        )
    script += "print(r.build_opener(r.ProxyHandler({})).open(q, timeout=20).read().decode())"
    return host.check_output("python3 -c %s %s", script, url)


@pytest.mark.parametrize("name", SERVICES)
def test_services_run_and_start_at_boot(host, name):
    service = host.service(name)
    assert service.is_running, host.run("journalctl -u %s -n 50 --no-pager", name).stdout
    assert service.is_enabled


@pytest.mark.parametrize("port", [9090, 9100, 3000])
def test_ports_are_on_loopback_only(host, port):
    addresses = [name for name in host.socket.get_listening_sockets() if name.endswith(f":{port}")]
    assert addresses == [f"tcp://127.0.0.1:{port}"]


@pytest.mark.parametrize("port", [9090, 9100])
def test_ports_were_never_open_to_the_network(host, port):
    unit = "prometheus" if port == 9090 else "prometheus-node-exporter"
    journal = host.check_output("journalctl -u %s --no-pager", unit)
    assert f"address=127.0.0.1:{port}" in journal
    for everywhere in (f"address=0.0.0.0:{port}", f"address=[::]:{port}", f"address=:{port}"):
        assert everywhere not in journal


def test_prometheus_runs_our_configuration(host):
    answer = json.loads(http(host, "http://127.0.0.1:9090/api/v1/status/config"))
    assert "scrape_interval: 5s" in answer["data"]["yaml"]
    flags = json.loads(http(host, "http://127.0.0.1:9090/api/v1/status/flags"))["data"]
    assert flags["storage.tsdb.retention.time"] == "45d"
    rules = json.loads(http(host, "http://127.0.0.1:9090/api/v1/rules"))["data"]["groups"]
    assert {"TargetDown", "JobDown"} <= {rule["name"] for group in rules for rule in group["rules"]}


def test_prometheus_scrapes_itself_and_the_host(host):
    answer = json.loads(http(host, "http://127.0.0.1:9090/api/v1/targets"))
    health = {target["labels"]["job"]: target["health"] for target in answer["data"]["activeTargets"]}
    assert health["prometheus"] == health["node"] == "up"


def test_node_exporter_sees_the_units(host):
    metrics = http(host, "http://127.0.0.1:9100/metrics")
    assert 'node_systemd_unit_state{name="prometheus.service",state="active"' in metrics
    assert 'name="systemd-journald.service"' not in metrics


def test_password_is_readable_by_grafana_only(host):
    file = host.file(PASSWORD_FILE)
    assert (file.user, file.group, file.mode) == ("root", "grafana", 0o640)
    assert file.size >= 20


def test_password_is_in_no_log(host):
    # grep reads the patterns from the file, so that the password isn't on a command line here either.
    assert host.run(f"journalctl --no-pager | grep -qFf {PASSWORD_FILE}").rc == 1
    assert host.run(f"grep -rqFf {PASSWORD_FILE} /etc/grafana --exclude=admin_password").rc == 1
    assert host.run(f"grep -rqFf {PASSWORD_FILE} /var/log").rc == 1


def test_settings_leave_nothing_open(host):
    settings = host.file("/etc/grafana/grafana.ini").content_string
    for line in (
        "http_addr = 127.0.0.1",
        "reporting_enabled = false",
        "check_for_updates = false",
        "disable_gravatar = true",
        "news_feed_enabled = false",
        "allow_sign_up = false",
        "plugin_admin_enabled = false",
        "preinstall_disabled = true",
        "admin_password = $__file{/etc/grafana/admin_password}",
    ):
        assert line in settings.splitlines()


def test_nobody_gets_in_without_a_password(host):
    section = host.file("/etc/grafana/grafana.ini").content_string.split("[auth.anonymous]")[1].split("[")[0]
    assert "enabled = false" in section.splitlines()


def test_grafana_has_read_the_data_sources(host):
    source = json.loads(http(host, "http://127.0.0.1:3000/api/datasources/uid/prometheus", "admin"))
    assert source["url"] == "http://127.0.0.1:9090"
    assert source["jsonData"]["timeInterval"] == "5s"
    assert source["jsonData"]["manageAlerts"] is True
    alerts = json.loads(http(host, "http://127.0.0.1:3000/api/datasources/uid/alertmanager", "admin"))
    assert alerts["url"] == "http://127.0.0.1:9093"
    assert alerts["jsonData"]["implementation"] == "prometheus"


def test_the_overview_is_the_home_page(host):
    home = json.loads(http(host, "http://127.0.0.1:3000/api/dashboards/home", "admin"))
    assert home["dashboard"]["title"] == "Appliance overview"


def test_a_password_that_was_changed_in_grafana_is_made_the_one_on_disk_again(host, playbook):
    reset = (
        "echo another-password | runuser -u grafana -- grafana-cli --homepath /usr/share/grafana"
        " --config /etc/grafana/grafana.ini admin reset-admin-password --password-from-stdin"
    )
    assert host.run(reset).rc == 0
    with pytest.raises(AssertionError, match="401"):
        http(host, USER_URL, "admin")
    run = playbook("../molecule/grafana/converge")
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(http(host, USER_URL, "admin"))["login"] == "admin"


def test_grafana_has_read_every_dashboard(host):
    found = json.loads(http(host, "http://127.0.0.1:3000/api/search?folderUIDs=appliance", "admin"))
    assert {entry["uid"] for entry in found} == {path.stem for path in DASHBOARDS.glob("*.json")}
