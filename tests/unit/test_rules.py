"""Prometheus's rules: each alert is explained, tested both ways, and asks for metrics and thresholds that exist.

The rules' own tests run here with the promtool of the controller's distribution, and in molecule/monitoring with
the host's.
"""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml
from model_server.logs import Log

from tests.unit.exported import known, metrics, unknown_labels

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles/prometheus"
RUNBOOKS = PROJECT / "docs/runbooks"
FILES = sorted((ROLE / "files/rules").glob("*.yml"))
TESTS = sorted((ROLE / "tests").glob("*_test.yml"))
SEVERITIES = {"page", "ticket", "info", "none"}
LABELS = {"severity", "objective"}


@functools.cache
def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(path):
    return [rule for group in load(path)["groups"] for rule in group["rules"]]


ALERTS = {
    f"{path.stem}-{rule['alert']}-{rule['labels']['severity']}": rule
    for path in FILES
    for rule in rules(path)
    if "alert" in rule
}
NAMES = sorted({rule["alert"] for rule in ALERTS.values()})


def runbook(alert):
    return RUNBOOKS / (re.sub(r"(?<!^)(?=[A-Z])", "-", alert).lower() + ".md")


def rendered_objectives(**variables):
    internal = load(ROLE / "vars/main.yml")
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["combine"] = lambda first, second: first | second
    template = environment.from_string((ROLE / "templates/objectives.yml.j2").read_text(encoding="utf-8"))
    values = {"prometheus_objectives": {}, "prometheus_thresholds": {}, **variables}
    return template.render(**internal, **values)


def recorded(text):
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", ALERTS.values(), ids=ALERTS)
def test_an_alert_says_how_bad_what_and_what_to_do(rule):
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(rule["labels"]) <= LABELS
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert all(rule["annotations"].values())
    assert rule["annotations"]["runbook_url"] == str(runbook(rule["alert"]).relative_to(PROJECT))


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_has_its_page(name):
    text = runbook(name).read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    severities = sorted({rule["labels"]["severity"] for rule in ALERTS.values() if rule["alert"] == name})
    assert f"Severity: {' or '.join(severities)}." in text
    for part in ("What it means.", "What users feel.", "Look here first", "What to do."):
        assert f"**{part}" in text, part
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (RUNBOOKS / target).exists(), target
    assert f"({runbook(name).name})" in (RUNBOOKS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_looks_at_both_colours_for_what_the_service_logs(name, tmp_path):
    """What a command looks for in vain seems to say that nothing is wrong."""
    text = runbook(name).read_text(encoding="utf-8")
    followed = {tuple(re.findall(r"-u model@(\w+)", line)) for line in text.splitlines() if "journalctl" in line}
    assert followed <= {(), ("blue", "green")}
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "service/model_server").glob("*.py"))
    logged = set(re.findall(r'\.(?:info|warning|error|failure)\(\s*"(\w+)"', sources))
    searches = re.findall(r"""\| grep ((?:-E )?'"event":"\(?([a-z_|]+)[^']*')""", text)
    assert len(searches) == text.count('"event"')
    for arguments, events in searches:
        assert set(events.split("|")) <= logged
        with (tmp_path / "log").open("wb") as file:
            for event in events.split("|"):
                Log(file.fileno(), colour="blue").error(event, "what happened")
        found = subprocess.run(["grep", "-c", *shlex.split(arguments), file.name], capture_output=True, text=True)
        assert int(found.stdout) == len(events.split("|")), arguments


def test_no_page_is_left_over():
    assert {path.name for path in RUNBOOKS.glob("*.md")} - {"README.md"} == {runbook(name).name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_tested_both_ways(name):
    cases = [
        case
        for path in TESTS
        for test in load(path)["tests"]
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == name
    ]
    assert any(case["exp_alerts"] for case in cases), "no case in which it fires"
    # The watchdog's one purpose is never to be silent.
    assert name == "Watchdog" or any(not case["exp_alerts"] for case in cases), "no case in which it is silent"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_test_names_rules_by_where_they_lie(path):
    """On a host the same relative path is made to lead to the rules in use."""
    for name in load(path)["rule_files"]:
        assert name in ("thresholds.yml", "short_windows.yml") or (path.parent / name).resolve() in FILES


def unknown_metrics(expression):
    return metrics(expression) - set(known()) - {rule["record"] for rule in recorded(rendered_objectives())}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rules_use_only_metrics_and_labels_that_somebody_exports_or_records(path):
    for rule in rules(path):
        assert unknown_metrics(rule["expr"]) == set(), rule
        assert unknown_labels(rule["expr"]) == set(), rule


@pytest.mark.parametrize(
    "name", ["node_filesystem_avail", "training_feature_var", "appliance_maintenence", "nginx_down"]
)
def test_a_metric_that_nobody_exports_is_noticed(name):
    """Its alert would be silent for ever."""
    assert unknown_metrics(f'max(rate({name}{{job="x"}}[5m])) > 0 and on () vector(1)') == {name}


def test_a_series_is_recorded_once():
    names = [
        (rule["record"], tuple(rule.get("labels", {}).items()))
        for path in FILES
        for rule in rules(path)
        if "record" in rule
    ]
    assert sorted(set(names)) == sorted(names)


def test_every_threshold_is_used_and_explained():
    used = {name for path in FILES for rule in rules(path) for name in metrics(rule["expr"])}
    assert {rule["record"] for rule in recorded(rendered_objectives())} - used == set()
    internal = load(ROLE / "vars/main.yml")
    options = load(ROLE / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    for name in ("objectives", "thresholds"):
        described = options[f"prometheus_{name}"]["options"]
        assert {key: option["default"] for key, option in described.items()} == internal[f"__prometheus_{name}"]


def test_objectives_follow_the_variables():
    text = rendered_objectives(
        prometheus_objectives={"latency_seconds": 1.0, "availability": 0.99},
        prometheus_thresholds={"queue_ratio": 0.5, "pressure_cpu_ratio": 0.9},
    )
    values = {(rule["record"], *rule.get("labels", {}).values()): rule["expr"] for rule in recorded(text)}
    assert values["appliance:objective_availability:ratio",] == "vector(0.99)"
    assert values["appliance:objective_latency:ratio",] == "vector(0.99)"
    # As the edge's histogram writes it.
    assert values["appliance:objective_latency_bucket", "1"] == "vector(1)"
    assert values["appliance:threshold_queue:ratio",] == "vector(0.5)"
    assert values["appliance:threshold_pressure:ratio", "cpu"] == "vector(0.9)"


def test_the_tests_of_drift_go_by_the_roles_thresholds():
    ours = {rule["record"]: rule["expr"] for rule in rules(ROLE / "tests/thresholds.yml")}
    assert ours.items() <= {rule["record"]: rule["expr"] for rule in recorded(rendered_objectives())}.items()


def test_the_role_deploys_every_file():
    files = load(ROLE / "defaults/main.yml")["prometheus_rule_files"]
    assert {entry["name"]: entry["src"] for entry in files} == {path.stem: f"rules/{path.name}" for path in FILES}


@pytest.mark.needs("promtool")
class TestWithPromtool:
    def test_rules_are_accepted(self, tmp_path):
        objectives = tmp_path / "objectives.yml"
        objectives.write_text(rendered_objectives(), encoding="utf-8")
        result = promtool("check", "rules", "--lint=all", "--lint-fatal", objectives, *FILES)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
    def test_alerts_fire_when_they_should(self, path):
        result = promtool("test", "rules", path)
        assert result.returncode == 0, result.stdout + result.stderr


def promtool(*arguments):
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=600)
