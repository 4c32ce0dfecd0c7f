"""Where alerts go: the role's own template, checked and asked by amtool, for several settings."""

import json
import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles/alertmanager"
MESSAGES = ROLE / "files/appliance.tmpl"

EMAIL = {
    "alertmanager_email_to": "oncall@example.org",
    "alertmanager_email_from": "appliance@example.org",
    "alertmanager_email_smarthost": "mail.example.org:587",
}
LOGIN = {"alertmanager_email_username": "appliance", "alertmanager_email_password": 'a"b\\c: {{ d }} #e'}
SLACK = {"alertmanager_slack_api_url": "https://hooks.example.org/s", "alertmanager_slack_channel": "#on-call"}
WEBHOOK = {"alertmanager_webhook_url": "https://hooks.example.org/w?token=%7B"}
HEARTBEAT = {"alertmanager_heartbeat_url": "https://hooks.example.org/h"}
SETTINGS = {
    "nothing": {},
    "email": EMAIL,
    "login": EMAIL | LOGIN,
    "slack": SLACK,
    "webhook": WEBHOOK,
    "everything": EMAIL | LOGIN | SLACK | WEBHOOK | HEARTBEAT,
}


@pytest.fixture
def configuration(tmp_path):
    """Render the configuration with settings; returns its path."""

    def render(**settings):
        environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
        environment.filters["to_json"] = json.dumps
        defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
        template = environment.from_string((ROLE / "templates/alertmanager.yml.j2").read_text())
        path = tmp_path / "alertmanager.yml"
        path.write_text(template.render(**defaults | {"__alertmanager_messages_file": str(MESSAGES)} | settings))
        return path

    return render


def receivers(path):
    """What each receiver does, by name: {"page": {"email", …}}."""
    found = yaml.safe_load(path.read_text())["receivers"]
    return {entry["name"]: {key.removesuffix("_configs") for key in entry if key != "name"} for entry in found}


def route(path, **labels):
    """The receiver that amtool finds for an alert."""
    command = ["amtool", "config", "routes", "test", f"--config.file={path}"]
    command += [f"{name}={value}" for name, value in labels.items()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def inhibited(path, source, target):
    """Whether a firing alert keeps another one quiet."""

    def fits(matchers, labels):
        for matcher in matchers:
            name, operator, value = re.fullmatch(r'(\w+)(=~?)"(.*)"', matcher).groups()
            if not (re.fullmatch(value, labels.get(name, "")) if operator == "=~" else labels.get(name, "") == value):
                return False
        return True

    return any(
        fits(rule["source_matchers"], source)
        and fits(rule["target_matchers"], target)
        and all(source.get(name) == target.get(name) for name in rule.get("equal", []))
        for rule in yaml.safe_load(path.read_text())["inhibit_rules"]
    )


@pytest.mark.needs("amtool")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
class TestRouting:
    def test_amtool_accepts_the_configuration(self, configuration, settings):
        done = subprocess.run(
            ["amtool", "check-config", configuration(**settings)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 templates" in done.stdout

    @pytest.mark.parametrize(
        ("labels", "receiver"),
        [
            ({"severity": "page"}, "page"),
            ({"severity": "ticket"}, "ticket"),
            ({"severity": "info"}, "none"),
            ({"severity": "none"}, "none"),
            ({"severity": "critical"}, "ticket"),
            ({}, "ticket"),
            ({"alertname": "Watchdog", "severity": "none"}, "heartbeat"),
        ],
    )
    def test_the_severity_decides_who_is_told(self, configuration, settings, labels, receiver):
        assert route(configuration(**settings), **{"alertname": "Some"} | labels) == receiver


def test_without_settings_nobody_is_told(configuration):
    assert receivers(configuration()) == {"page": set(), "ticket": set(), "heartbeat": set(), "none": set()}


def test_pages_and_tickets_go_where_each_should(configuration):
    settings = SETTINGS["everything"] | {"alertmanager_ticket_channels": ["email"]}
    assert receivers(configuration(**settings)) == {
        "page": {"email", "slack", "webhook"},
        "ticket": {"email"},
        "heartbeat": {"webhook"},
        "none": set(),
    }


def test_a_secret_arrives_as_it_is(configuration):
    written = yaml.safe_load(configuration(**SETTINGS["login"]).read_text())
    email = next(entry for entry in written["receivers"] if entry["name"] == "page")["email_configs"][0]
    assert email["auth_password"] == LOGIN["alertmanager_email_password"]


def disk(name, device="/dev/vda1", instance="127.0.0.1:9100"):
    severity = "ticket" if name == "DiskFilling" else "page"
    return {"alertname": name, "severity": severity, "device": device, "instance": instance}


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        (disk("DiskAlmostFull"), disk("DiskFillingFast"), True),
        (disk("DiskAlmostFull"), disk("DiskFilling"), True),
        (disk("DiskFillingFast"), disk("DiskFilling"), True),
        (disk("DiskAlmostFull"), disk("DiskFillingFast", device="/dev/vdb"), False),
        (disk("DiskFillingFast"), disk("DiskFilling", instance="192.0.2.7:9100"), False),
        (disk("DiskFillingFast"), disk("DiskAlmostFull"), False),
        (disk("DiskFilling"), disk("DiskFillingFast"), False),
        (disk("DiskAlmostFull"), disk("InodesRunningOut"), False),
        ({"severity": "page", "model": "a"}, {"severity": "ticket", "model": "a"}, True),
        ({"severity": "page", "model": "a"}, {"severity": "ticket", "model": "b"}, False),
        ({"severity": "page"}, {"severity": "ticket"}, False),
        ({"severity": "page", "colour": "blue"}, {"severity": "ticket", "colour": "blue", "model": "a"}, True),
        ({"severity": "page", "colour": "blue"}, {"severity": "ticket", "colour": "green"}, False),
        ({"severity": "ticket", "model": "a"}, {"severity": "ticket", "model": "a"}, False),
        ({"severity": "page", "objective": "latency"}, {"severity": "ticket", "objective": "latency"}, True),
        ({"severity": "page", "alertname": "LiveColourDown"}, {"severity": "page", "alertname": "ProbeFailing"}, True),
        ({"severity": "page", "alertname": "ProbeFailing"}, {"severity": "page", "alertname": "LiveColourDown"}, False),
        ({"severity": "page", "alertname": "LiveColourDown"}, {"severity": "page", "alertname": "DiskFull"}, False),
        ({"severity": "page", "alertname": "EdgeDown"}, {"alertname": "JobDown", "job": "shadow"}, True),
        ({"severity": "page", "alertname": "EdgeDown"}, {"alertname": "TargetDown", "job": "model"}, True),
        ({"severity": "page", "alertname": "EdgeDown"}, {"alertname": "JobDown", "job": "node"}, False),
    ],
)
def test_a_cause_keeps_its_consequences_quiet(configuration, source, target, wanted):
    assert inhibited(configuration(), source, target) is wanted


def test_alerts_that_are_named_exist(configuration):
    """Whoever renames an alert must rename it here, too."""
    rules = [yaml.safe_load(path.read_text()) for path in (PROJECT / "roles/prometheus/files/rules").glob("*.yml")]
    alerts = {rule["alert"] for file in rules for group in file["groups"] for rule in group["rules"] if "alert" in rule}
    named = re.findall(r'alertname=~?"([^"]*)"', configuration().read_text())
    for pattern in (part for entry in named for part in entry.split("|")):
        assert any(re.fullmatch(pattern, alert) for alert in alerts), pattern
