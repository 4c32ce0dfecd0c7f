"""The dashboards against the Prometheus of a provisioned host: it understands every expression, and has an answer."""

import base64
import json
import random
import threading
from pathlib import Path

import pytest
import yaml

from roles.grafana.dashboards.promql import resolved

DASHBOARDS = sorted((Path(__file__).resolve().parents[3] / "roles/grafana/files/dashboards").glob("*.json"))
WITHOUT_DATA = yaml.safe_load(Path(__file__).with_name("without_data.yml").read_text(encoding="utf-8"))
# The rules of the objectives count five minutes at a time.
PATIENCE_SECONDS = 480
# One process on the host asks for all of a dashboard's expressions: those come in base64, and the numbers of those
# without data go back.
ASK = """
import base64, json, math, sys, urllib.parse, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
silent = []
for number, expression in enumerate(json.loads(base64.b64decode(sys.argv[1]))):
    body = urllib.parse.urlencode({"query": expression}).encode()
    answer = json.load(opener.open("http://127.0.0.1:9090/api/v1/query", body, timeout=60))
    if not any(not math.isnan(float(sample["value"][1])) for sample in answer["data"]["result"]):
        silent.append(number)
print(json.dumps(silent))
"""


def encoded(content):
    return base64.b64encode(json.dumps(content).encode()).decode()


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def traffic(edge):
    """Requests to both colours while the checks run: rows as in training, and now and then one that is refused."""
    over = threading.Event()

    def send():
        while not over.wait(0.1):
            rows = [[random.random(), random.random()] for _ in range(random.randint(1, 30))]
            for path in ("/predict", "/test/predict"):
                edge.predict(path, data={"data": rows})
            if random.random() < 0.1:
                edge.predict(data={"data": ["no number", None]})

    sender = threading.Thread(target=send)
    sender.start()
    yield
    over.set()
    sender.join()


def test_the_exceptions_name_panels_and_reasons():
    titles = {path.stem: {panel["title"] for panel in load(path)["panels"]} for path in DASHBOARDS}
    assert set(WITHOUT_DATA) == set(titles)
    for dashboard, panels in WITHOUT_DATA.items():
        assert set(panels) <= titles[dashboard], dashboard
        assert all(len(reason) > 20 for reason in panels.values()), dashboard


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_parses(host, path):
    """Every expression as a recording rule: promtool is of the version that has to evaluate it."""
    dashboard = load(path)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions += [entry["expr"] for entry in dashboard["annotations"]["list"]]
    rules = [
        {"record": f"dashboard:expression:{number}", "expr": resolved(expression)}
        for number, expression in enumerate(expressions)
    ]
    script = (
        'f=$(mktemp) && echo "$1" | base64 -d > "$f" && promtool check rules --lint=none "$f"; '
        'rc=$?; rm -f "$f"; exit $rc'
    )
    result = host.run("sh -c %s sh %s", script, encoded({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert result.rc == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_returns_data_under_load(host, eventually, path):
    asked = [
        (panel["title"], target["expr"])
        for panel in load(path)["panels"]
        for target in panel.get("targets", [])
        if panel["title"] not in WITHOUT_DATA[path.stem]
    ]
    expressions = [resolved(expression) for _, expression in asked]

    def answered():
        silent = json.loads(host.check_output("python3 -c %s %s", ASK, encoded(expressions)))
        # What was answered once is answered.
        missing[:] = [asked[number] for number in silent if asked[number] in missing]
        return not missing

    missing = list(asked)
    try:
        eventually(answered, PATIENCE_SECONDS, f"data for every expression of {path.stem}")
    except AssertionError as error:
        raise AssertionError(f"no data for {json.dumps(missing, indent=1)}") from error
