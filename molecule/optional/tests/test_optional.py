"""What an inventory switches on: the service that reads training rows, and the load simulator's page; and off again.

The broker is librdkafka's mock of a cluster, over TCP, since no image registry is reached from a lab.
"""

import base64
import json
import math
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from roles.grafana.dashboards.promql import resolved

PROJECT = Path(__file__).resolve().parents[3]
MOCK = PROJECT / "tests/unit/drift/mock_kafka.py"
DASHBOARD = PROJECT / "roles/grafana/files/dashboards/appliance-drift.json"
WITHOUT_DATA = PROJECT / "molecule/grafana/tests/without_data.yml"
DRIFT = "cd /opt/appliance/drift && PYTHONPATH=source bin/python"
SETTINGS = {
    "drift_enabled": True,
    "drift_topics": {"simplemodel": "simplemodel-training"},
    "loadtest_web_enabled": True,
}
TAGS = "drift,loadtest,prometheus"


def metric(host, name, label=""):
    """The value of the service's first series of that name with that label; None where there is none."""
    lines = host.run("curl -sf http://127.0.0.1:9146/metrics").stdout.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and label in line), None)


def good_rows(host):
    return metric(host, "training_rows_total", 'status="ok"')


def query(host, expression):
    text = host.check_output("curl -sf %s", f"http://127.0.0.1:9090/api/v1/query?query={quote(expression)}")
    return [float(row["value"][1]) for row in json.loads(text)["data"]["result"]]


@pytest.fixture(scope="module", autouse=True)
def switched_on(host, playbook, eventually):
    told = playbook("site", "--tags", TAGS, "-e", json.dumps(SETTINGS))
    assert told.returncode == 0, told.stdout[-3000:]
    yield
    told = playbook("site", "--tags", TAGS)
    assert told.returncode == 0, told.stdout[-3000:]
    assert host.run("systemctl list-units --all --plain --no-legend 'appliance-drift*' 'appliance-load*'").stdout == ""
    assert host.check_output("ss -Hltn 'sport = :9146 or sport = :8089'") == ""
    assert not host.file("/etc/appliance/drift.json").exists, "it holds a password"
    eventually(lambda: query(host, 'up{job="training"}') == [], what="a Prometheus that has forgotten the target")


@pytest.fixture(scope="module")
def broker(host, playbook, eventually):
    """A broker at the address that the host's settings have."""
    packed = base64.b64encode(MOCK.read_bytes()).decode()
    host.check_output("sh -c %s", f"echo {packed} | base64 -d >/run/mock_kafka.py")
    host.check_output(
        "systemd-run --quiet --collect --unit=mock-kafka --property=StandardOutput=truncate:/run/mock-kafka.address "
        "--property=StandardError=journal sh -c 'sleep infinity | /opt/appliance/drift/bin/python /run/mock_kafka.py'"
    )
    address = eventually(lambda: host.run("cat /run/mock-kafka.address").stdout.strip(), what="the broker's address")
    settings = SETTINGS | {"drift_bootstrap_servers": [address]}
    told = playbook("site", "--tags", "drift", "-e", json.dumps(settings))
    assert told.returncode == 0, told.stdout[-3000:]
    yield address
    host.run("systemctl stop mock-kafka; rm -f /run/mock_kafka.py /run/mock-kafka.address")


def test_without_a_broker_the_service_waits_and_says_so(host, eventually):
    assert host.run("systemctl is-active appliance-drift").stdout.strip() == "active"
    eventually(lambda: metric(host, "training_connected") == 0, what="its metrics")
    eventually(lambda: query(host, 'up{job="training"}') == [1], what="the target in Prometheus")
    sockets = host.check_output("ss -Hltn 'sport = :9146'").split()
    assert sockets[3] == "127.0.0.1:9146"


def test_training_rows_become_the_reference(host, broker, eventually):
    eventually(lambda: metric(host, "training_connected") == 1, what="a connection to the broker")
    host.check_output("sh -c %s", f"{DRIFT} -m drift.simulate training --rows 5000")
    eventually(lambda: good_rows(host) == 5000, what="every row in the statistics")
    assert metric(host, "training_consumer_lag") == 0
    # Prometheus looks once a minute: rules of windows of hours don't change faster.
    eventually(lambda: set(query(host, "feature:reference_count")) == {5000}, seconds=150, what="the rules go by them")


def test_the_panels_that_need_a_broker_show_the_rows(host, broker, eventually):
    """Those that the checks of the dashboards excuse, since their lab has none."""
    excused = yaml.safe_load(WITHOUT_DATA.read_text(encoding="utf-8"))[DASHBOARD.stem]
    titles = {title for title, reason in excused.items() if "no broker" in reason}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["title"] in titles]
    asked = [resolved(target["expr"]) for panel in panels for target in panel["targets"]]
    assert len(panels) == len(titles) > 0
    for expression in asked:
        # Prometheus looks every five seconds, and a rate takes two looks.
        eventually(
            lambda asked=expression: any(not math.isnan(value) for value in query(host, asked)),
            what=f"data for {expression}",
        )


def test_what_is_known_outlasts_the_service_and_the_broker(host, broker, eventually):
    host.check_output("systemctl kill --signal=KILL appliance-drift")
    eventually(lambda: good_rows(host) == 5000, what="the same statistics after kill -9")
    host.check_output("sh -c %s", f"{DRIFT} -m drift.simulate training --rows 700 --seed 7")
    eventually(lambda: good_rows(host) == 5700, what="the rows that came after")
    host.check_output("systemctl stop mock-kafka")
    eventually(lambda: metric(host, "training_connected") == 0, what="a connection that is lost")
    assert good_rows(host) == 5700


def test_the_page_of_the_load_simulator_is_for_the_host_alone(host, eventually):
    eventually(lambda: host.run("curl -sf http://127.0.0.1:8089/").stdout, what="the page")
    assert "locust" in host.check_output("curl -sf http://127.0.0.1:8089/").lower()
    assert host.check_output("ss -Hltn 'sport = :8089'").split()[3] == "127.0.0.1:8089"


def test_a_load_test_by_hand(playbook, live, host):
    told = playbook("loadtest", "-e", "seconds=5", "-e", "users=3")
    assert told.returncode == 0, told.stdout[-3000:]
    assert "p95" in told.stdout
    told = playbook("loadtest", "-e", "seconds=5", "-e", "users=3", "-e", "max_p50_ms=0.01")
    assert told.returncode != 0 and "max_p50_ms" in told.stdout


def test_one_request_in_both_logs(edge, engine, eventually):
    assert edge.predict(**{"X-Request-ID": "find-me-in-both"}).status == 200

    def found():
        told = engine("logs find-me-in-both")
        return told if told.get("nginx") and told.get("model") else None

    told = eventually(found, what="a line of nginx and one of the model")
    assert (len(told["nginx"]), len(told["model"])) == (1, 1)
