"""The provisioned host, rung by rung: installed, running, ours, and doing its work."""

import json
import re

import pytest

UNITS = [
    *("nginx.service", "docker.service", "cron.service", "prometheus.service", "prometheus-node-exporter.service"),
    "prometheus-nginx-exporter.service",
    *("model@blue.service", "model@green.service", "appliance-verify.service", "appliance-shadow.service"),
]


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_active_and_enabled(host, unit):
    assert host.run(f"systemctl is-active {unit}").stdout.strip() == "active"
    assert host.run(f"systemctl is-enabled {unit}").stdout.strip() == "enabled"


def test_no_unit_has_failed(host):
    assert host.run("systemctl list-units --failed --plain --no-legend").stdout == ""


def test_nothing_but_ssh_and_the_edge_listens_off_loopback(host):
    rows = host.check_output("ss -Hltn").splitlines()
    addresses = {row.split()[3] for row in rows}
    outside = {address.rsplit(":", 1)[1] for address in addresses if not address.startswith(("127.", "[::1]"))}
    assert outside == {"22", "80"}, addresses


@pytest.mark.parametrize(
    ("path", "mode", "owner", "group"),
    [
        ("/etc/nginx/nginx.conf", 0o644, "root", "root"),
        ("/etc/appliance/appliance.json", 0o644, "root", "root"),
        ("/etc/systemd/system/model@.service", 0o644, "root", "root"),
        ("/etc/cron.d/appliance", 0o644, "root", "root"),
        ("/run/appliance/blue", 0o2750, "model", "www-data"),
        ("/var/log/nginx/prod_access.log", 0o640, "www-data", "adm"),
        ("/var/log/nginx/test_access.log", 0o640, "www-data", "adm"),
    ],
)
def test_file_has_its_mode_and_owner(host, path, mode, owner, group):
    file = host.file(path)
    assert (file.mode, file.user, file.group) == (mode, owner, group)


def test_programs_accept_their_files(host):
    for command in (
        "nginx -t",
        "promtool check config /etc/prometheus/prometheus.yml",
        "logrotate --debug /etc/logrotate.d/appliance",
        "systemd-analyze verify model@blue.service",
    ):
        result = host.run(command)
        assert result.rc == 0, f"{command}: {result.stdout}{result.stderr}"


def test_nginx_runs_our_configuration(host):
    shown = host.run("nginx -T").stdout
    assert "upstream model_blue" in shown
    assert shown.count("default_server") == 1
    # Wherever it is asked which colour is live, the first is looked at again after the second, or a rename between two
    # looks would find neither.
    asked = shown.split("set $appliance_live none;")[1:]
    looks = [re.findall(r"if \(-f /var/lib/appliance/routing/current/(blue|green)\)", part) for part in asked]
    assert looks == [["blue", "green", "blue"]] * 4
    # -T reads the file; the workers that serve must be younger than it (seconds are rounded).
    written = int(host.check_output("stat --format %Y /etc/nginx/nginx.conf"))
    rows = host.check_output("date +%s; ps -o etimes=,args= --ppid $(cat /run/nginx.pid)").splitlines()
    ages = [int(row.split()[0]) for row in rows[1:] if "shutting down" not in row]
    assert ages and int(rows[0]) - max(ages) >= written - 2


@pytest.mark.parametrize("colour", ["blue", "green"])
def test_container_is_confined(host, colour):
    inspected = json.loads(host.check_output(f"docker inspect model-{colour}"))[0]
    settings = inspected["HostConfig"]
    assert settings["NetworkMode"] == "none"
    assert settings["ReadonlyRootfs"] is True
    assert settings["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in settings["SecurityOpt"]
    assert settings["Memory"] > 0
    assert settings["PidsLimit"] > 0
    assert not inspected["Config"]["User"].startswith(("0", "root"))
    writable = {mount["Destination"] for mount in inspected["Mounts"] if mount["RW"]}
    assert writable == {"/run/appliance", "/jobs"}


def test_container_has_no_way_out(host):
    code = "import socket; print([name for _, name in socket.if_nameindex()])"
    assert host.check_output(f'docker exec model-blue /opt/venv/bin/python -c "{code}"').strip() == "['lo']"


def test_image_holds_nothing_of_the_build(host):
    image = host.check_output("docker inspect --format '{{.Image}}' model-blue")
    listing = host.check_output(
        f"docker run --rm --network none --entrypoint /bin/sh {image} -c "
        "'ls /etc/pip.conf /root/.config/pip /usr/local/share/ca-certificates /build /opt/build 2>/dev/null; true'"
    )
    assert "pip.conf" not in listing
    assert ".crt" not in listing


def test_nothing_is_left_of_the_build(host):
    assert host.run("ls -d /var/lib/appliance/image-build.*").rc != 0
    context = host.check_output("mktemp --directory /var/lib/appliance/image-build.XXXX").strip()
    # No Dockerfile in it.
    failed = host.run(f"CONTEXT={context} BASE_IMAGE=none IMAGE=none /usr/lib/appliance/build-image")
    assert failed.rc != 0 and not host.file(context).exists


def test_each_colour_answers_at_its_door(edge, engine):
    status = engine("status")
    for path, colour in (("/predict", status["live"]), ("/test/predict", status["idle"])):
        answer = edge.predict(path)
        assert answer.status == 200, answer.text
        assert answer.headers["x-model-colour"] == colour
        assert answer.headers["x-model-version"] == status["colours"][colour]["version"]
        assert answer.json["output"] == pytest.approx(0.65, abs=0.05)


def test_each_core_has_a_worker(host, engine):
    cores = int(host.check_output("nproc"))
    assert {colour["workers"]["wanted"] for colour in engine("status")["colours"].values()} == {cores}


def test_the_request_id_goes_all_the_way(host, edge, eventually):
    answer = edge.predict(**{"X-Request-ID": "follow-me-42"})
    assert answer.headers["x-request-id"] == "follow-me-42"
    assert '"request_id":"follow-me-42"' in host.file("/var/log/nginx/prod_access.log").content_string
    eventually(
        lambda: "follow-me-42" in host.run("journalctl --no-pager -o cat -u 'model@*' --since '-2 min'").stdout,
        seconds=10,
        what="the request id in the model's journal",
    )


def test_a_dangerous_request_id_is_replaced(edge):
    answer = edge.predict(**{"X-Request-ID": 'x"; drop'})
    assert answer.status == 200
    assert len(answer.headers["x-request-id"]) == 32


def test_access_logs_are_json_and_apart(host, edge):
    edge.predict("/predict", **{"X-Request-ID": "goes-to-prod"})
    edge.predict("/test/predict", **{"X-Request-ID": "goes-to-test"})
    for name, other in (("prod", "test"), ("test", "prod")):
        lines = host.file(f"/var/log/nginx/{name}_access.log").content_string.splitlines()
        entries = [json.loads(line) for line in lines]
        mine = [entry for entry in entries if entry["request_id"] == f"goes-to-{name}"]
        assert mine and {(entry["environment"], entry["status"]) for entry in mine} == {(name, 200)}
        assert not [entry for entry in entries if entry["request_id"] == f"goes-to-{other}"]


def test_inputs_are_not_logged(host, edge):
    edge.predict(data={"data": [0.1234567, 0.6]})
    edge.request("GET", "/predict?secret=0.1234567")
    logged = host.file("/var/log/nginx/prod_access.log").content_string
    journal = host.run("journalctl --no-pager -o cat -u 'model@*' --since '-1 min'").stdout
    assert "0.1234567" not in logged + journal


def test_prometheus_scrapes_everything(host, eventually):
    def up():
        text = host.check_output("curl -sf 'http://127.0.0.1:9090/api/v1/query?query=up'")
        series = json.loads(text)["data"]["result"]
        found = {(row["metric"]["job"], row["metric"].get("colour", "")): row["value"][1] for row in series}
        wanted = {
            ("prometheus", ""),
            ("node", ""),
            ("nginx", ""),
            ("shadow", ""),
            ("edge", ""),
            ("alertmanager", ""),
            ("probe", ""),
            ("model", "blue"),
            ("model", "green"),
        }
        return found if wanted <= set(found) and set(found.values()) == {"1"} else None

    eventually(up, what="every target up")


def test_a_failed_check_of_the_boot_would_raise_an_alert(host, eventually):
    query = 'node_systemd_unit_state{name="appliance-verify.service",state="failed"}'

    def found():
        text = host.check_output(f"curl -sf http://127.0.0.1:9090/api/v1/query --data-urlencode 'query={query}'")
        return json.loads(text)["data"]["result"]

    eventually(found, what="the state of appliance-verify in Prometheus")


def test_prometheus_counts_predictions(host, edge, live, eventually):
    def count():
        query = f'sum(predictions_total{{colour="{live}",status="ok"}})'
        text = host.check_output(f"curl -sf http://127.0.0.1:9090/api/v1/query --data-urlencode 'query={query}'")
        result = json.loads(text)["data"]["result"]
        return float(result[0]["value"][1]) if result else 0.0

    before = count()
    for _ in range(7):
        edge.predict()
    eventually(lambda: count() >= before + 7, seconds=30, what="seven more predictions in Prometheus")


def test_rotation_is_scheduled(host):
    assert "logrotate /etc/logrotate.d/appliance" in host.file("/etc/cron.d/appliance").content_string
    text = host.file("/etc/logrotate.d/appliance").content_string
    for word in ("daily", "maxsize 1M", "rotate 7", "compress", "delaycompress", "missingok", "create 0640"):
        assert word in text


def test_the_whole_of_logrotate_is_consistent(host):
    result = host.run("logrotate --debug /etc/logrotate.conf")
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == []


def test_status_playbook_tells_the_same_as_the_engine(playbook, engine, tmp_path):
    result = playbook("status", "-e", f"status_json_file={tmp_path / 'status.json'}")
    assert result.returncode == 0, result.stdout
    written = json.loads((tmp_path / "status.json").read_text())
    assert written["live"] == engine("status")["live"]
    assert written["message"] in result.stdout


def test_a_swap_and_back(engine, edge, live):
    other = {"blue": "green", "green": "blue"}[live]
    for command, colour in (("swap", other), ("rollback", live)):
        assert engine(command)["rc"] == 0
        assert edge.predict().headers["x-model-colour"] == colour
