"""Monitoring on a provisioned host, from the units to the numbers in Prometheus."""

import json
import re
import threading
from urllib.parse import quote

import pytest

SERVICES = ["prometheus-alertmanager", "prometheus-blackbox-exporter", "mtail"]
EDGE = "http://127.0.0.1:3903/metrics"
ROTATE = "logrotate --force /etc/logrotate.d/appliance"
REQUESTS = 4000
# mtail looks every five seconds, Prometheus as often.
SECONDS = 60


def get(host, url):
    return host.check_output("curl -sSf --max-time 20 %s", url)


def query(host, expression):
    """The samples of an instant query, as (labels, value)."""
    answer = json.loads(get(host, f"http://127.0.0.1:9090/api/v1/query?query={quote(expression)}"))
    return [(row["metric"], float(row["value"][1])) for row in answer["data"]["result"]]


def counted(host, url, pattern):
    """The sum of the samples at an address whose names and labels match."""
    lines = (line.rsplit(" ", 1) for line in get(host, url).splitlines() if not line.startswith("#"))
    return sum(float(value) for name, value in lines if re.fullmatch(pattern, name))


def of_clients(host):
    """Predictions of clients, as the edge has counted them."""
    return counted(host, EDGE, r'edge_requests_total\{code="200",.*environment="production",method="POST"\}')


def of_everybody(host):
    """Predictions of clients, tests and probes, as the edge has counted them."""
    return counted(host, EDGE, r'edge_requests_total\{code="200",.*method="POST"\}')


def by_the_service(host):
    """Predictions of both colours, as they have counted them themselves."""
    pattern = r'http_requests_total\{(?=.*code="200")(?=.*method="POST")(?=.*path="/predict").*\}'
    return sum(counted(host, f"http://127.0.0.1:9145/{colour}/metrics", pattern) for colour in ("blue", "green"))


@pytest.fixture
def settled(host, edge, eventually):
    """Wait until all that has been logged so far is counted: a request of a rare kind comes last in each log."""

    def wait():
        for environment, path in (("production", "/predict"), ("test", "/test/predict")):
            pattern = rf'edge_requests_total\{{.*environment="{environment}",method="PUT"\}}'
            before = counted(host, EDGE, pattern)
            edge.request("PUT", path)
            eventually(lambda: counted(host, EDGE, pattern) > before, seconds=SECONDS, what="what came last")  # noqa: B023

    return wait


def predict(edge, number, clients=4):
    """Ask for this many predictions, each of which must be answered."""
    failed = []

    def client():
        for _ in range(number // clients):
            if edge.predict("/predict").status != 200:
                failed.append(1)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    return threads, failed


def finish(threads, failed):
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("name", SERVICES)
def test_services_run_and_start_at_boot(host, name):
    service = host.service(name)
    assert service.is_running, host.run("journalctl -u %s -n 50 --no-pager", name).stdout
    assert service.is_enabled


@pytest.mark.parametrize("port", [9093, 9115, 3903])
def test_ports_are_on_loopback_only(host, port):
    addresses = [name for name in host.socket.get_listening_sockets() if name.endswith(f":{port}")]
    assert addresses == [f"tcp://127.0.0.1:{port}"]


@pytest.mark.parametrize(
    ("unit", "mebibytes"), [("prometheus", 1024), ("prometheus-node-exporter", 128), ("prometheus-nginx-exporter", 128)]
)
def test_where_memory_is_short_it_ends_before_a_model(host, unit, mebibytes):
    shown = host.check_output("systemctl show --property=MainPID,MemoryMax %s", unit).splitlines()
    about = dict(line.split("=") for line in shown)
    assert int(about["MemoryMax"]) == mebibytes * 2**20
    # Of the process that runs: the file alone says nothing about it.
    assert host.file(f"/proc/{about['MainPID']}/oom_score_adj").content_string.strip() == "500"


def test_the_journal_is_bounded(host):
    told = host.check_output("journalctl --no-pager -o cat SYSLOG_IDENTIFIER=systemd-journald").splitlines()
    sizes = [line for line in told if line.startswith("System Journal")]
    assert "max 1G" in sizes[-1].replace("1.0G", "1G"), sizes


def test_alertmanager_looks_for_no_peers(host):
    assert not [name for name in host.socket.get_listening_sockets() if name.endswith(":9094")]


@pytest.mark.parametrize("job", ["edge", "alertmanager", "probe"])
def test_prometheus_scrapes_it(host, eventually, job):
    def up():
        found = query(host, f'up{{job="{job}"}}')
        return found and all(value == 1 for _, value in found)

    eventually(up, seconds=SECONDS, what=f"up of {job}")


def test_alertmanager_gets_the_watchdog(host, eventually):
    def names():
        alerts = json.loads(get(host, "http://127.0.0.1:9093/api/v2/alerts"))
        return {alert["labels"]["alertname"]: alert["labels"] for alert in alerts}.get("Watchdog")

    labels = eventually(names, seconds=120, what="the watchdog in Alertmanager")
    assert labels["severity"] == "none"
    # So that whoever is told knows of which host.
    assert labels["appliance"]


@pytest.mark.parametrize(("severity", "receiver"), [("page", "page"), ("ticket", "ticket"), ("info", "none")])
def test_alerts_go_where_they_should(host, severity, receiver):
    file = "--config.file=/etc/prometheus/alertmanager.yml"
    assert host.run(f"amtool check-config {file.split('=')[1]}").rc == 0
    assert host.check_output(f"amtool config routes test {file} severity={severity} alertname=Some") == receiver


def test_only_alertmanager_can_read_its_receivers(host):
    file = host.file("/etc/prometheus/alertmanager.yml")
    assert (file.user, file.group, file.mode) == ("root", "prometheus", 0o640)


@pytest.mark.parametrize("probe", ["readiness", "prediction"])
def test_a_probe_succeeds(host, eventually, probe):
    eventually(
        lambda: [value for _, value in query(host, f'probe_success{{probe="{probe}"}}')] == [1],
        seconds=SECONDS,
        what=f"the probe {probe}",
    )


def test_a_probe_is_not_production(host, eventually, settled):
    def probed():
        return query(host, 'sum(edge_requests_total{environment="probe", method="POST", code="200"}) > 0')

    eventually(probed, seconds=SECONDS, what="probes in the metrics of the edge")
    assert '"environment":"probe"' not in host.file("/var/log/nginx/prod_access.log").content_string
    settled()
    before = of_clients(host)
    probes = query(host, 'sum(edge_requests_total{environment="probe"})')[0][1]
    more = f'sum(edge_requests_total{{environment="probe"}}) > {probes}'
    eventually(lambda: query(host, more), seconds=SECONDS, what="another probe")
    assert of_clients(host) == before


def test_every_request_is_counted_also_when_logs_rotate(host, edge, eventually, settled):
    settled()
    before = of_clients(host)
    in_prometheus = 'sum(edge_requests_total{environment="production", method="POST", code="200"})'
    for number in range(3):
        finish(*predict(edge, 100))
        host.check_output(ROTATE)
        settled()
        assert of_clients(host) == before + 100 * (number + 1)
    eventually(
        lambda: query(host, in_prometheus)[0][1] == before + 300, seconds=SECONDS, what="the requests in Prometheus"
    )


def test_the_edge_and_the_service_agree(host, edge, settled):
    """Within one in a thousand, and while logs rotate under load."""
    settled()
    clients, everybody, service = of_clients(host), of_everybody(host), by_the_service(host)
    threads, failed = predict(edge, REQUESTS)
    host.check_output(ROTATE)
    finish(threads, failed)
    settled()
    allowed = REQUESTS / 1000
    assert REQUESTS - allowed <= of_clients(host) - clients <= REQUESTS
    # Probes come in between.
    assert abs((of_everybody(host) - everybody) - (by_the_service(host) - service)) <= allowed


def test_the_test_environment_is_counted_apart(host, edge, settled):
    test = r'edge_requests_total\{code="200",.*environment="test",method="POST"\}'
    settled()
    clients, before = of_clients(host), counted(host, EDGE, test)
    assert edge.predict("/test/predict").status == 200
    settled()
    assert (of_clients(host), counted(host, EDGE, test)) == (clients, before + 1)


def test_no_line_of_the_logs_is_left_out(host):
    """The program, read once over everything that this host has logged; other tests write empty lines."""
    script = (
        "d=$(mktemp -d) && zgrep -h . /var/log/nginx/prod_access.log* /var/log/nginx/test_access.log* > $d/log"
        " && mtail --one_shot --one_shot_format=prometheus --emit_prog_label=false --logtostderr"
        " --address 127.0.0.1 --port 0 --progs /etc/mtail --logs $d/log; rc=$?; rm -r $d; exit $rc"
    )
    metrics = host.check_output("sh -c %s", script)
    assert re.search(r"^edge_requests_total\{.*\} [1-9]", metrics, re.MULTILINE)
    assert re.search(r"^edge_log_lines_unparsed_total 0$", metrics, re.MULTILINE)


def test_it_takes_little_memory(host):
    """Resident memory of the three together, in MiB."""
    pids = [host.check_output(f"systemctl show --property=MainPID --value {name}") for name in SERVICES]
    sizes = [int(host.check_output(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")) for pid in pids]
    assert sum(sizes) / 1024 < 120
