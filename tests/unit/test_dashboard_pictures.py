"""Pictures of the dashboards: whatever Prometheus answers becomes a well-formed drawing that shows it."""

import json
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ElementTree
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from roles.grafana.dashboards import drawing, pictures
from roles.grafana.dashboards.drawing import Series

LABELS = {"colour": "blue", "model": "<m&m>", "le": "0.5", "severity": "page", "alertname": "It burns"}


class Prometheus(BaseHTTPRequestHandler):
    """Answers every query with one series of the value 0.25, but those that begin with a metric of nginx."""

    def do_POST(self):
        query = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        expression = query["query"][0]
        self.server.asked.append(expression)
        points = {"value": [time.time(), "0.25"]}
        if self.path.endswith("query_range"):
            start, end, step = (int(query[key][0]) for key in ("start", "end", "step"))
            points = {"values": [[at, "0.25"] for at in range(start, end + 1, step)]}
        refused = self.server.refuse and self.server.refuse in expression
        result = [] if expression.startswith("nginx") else [{"metric": LABELS, **points}]
        body = json.dumps({"error": "it is too much"} if refused else {"data": {"result": result}}).encode()
        self.send_response(422 if refused else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def prometheus():
    with ThreadingHTTPServer(("127.0.0.1", 0), Prometheus) as server:
        server.asked, server.refuse = [], None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def draw(server, *arguments):
    return pictures.main([f"http://127.0.0.1:{server.server_port}", *map(str, arguments)])


def texts(path):
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_every_dashboard_is_drawn_with_every_panel(prometheus, tmp_path):
    assert draw(prometheus, tmp_path) == 0
    for dashboard in pictures.DASHBOARDS:
        shown = texts(tmp_path / f"{dashboard.uid}.svg")
        assert dashboard.title in shown
        for panel in dashboard.model()["panels"]:
            assert any(panel["title"].startswith(text.rstrip("…")) for text in shown if text), panel["title"]
    assert not [expression for expression in prometheus.asked if "$" in expression.replace('"$1"', "")]


def test_values_and_their_absence_are_shown(prometheus, tmp_path):
    assert draw(prometheus, tmp_path, "--only", "appliance-edge") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["appliance-edge.svg"]
    shown = texts(tmp_path / "appliance-edge.svg")
    assert "25%" in shown and "250 ms" in shown
    # Connections: every one of its expressions begins with nginx_.
    assert shown.count("No data") == 1


def test_a_refused_query_is_told(prometheus, tmp_path, capsys):
    prometheus.refuse = "edge_log_lines_unparsed_total"
    assert draw(prometheus, tmp_path, "--only", "appliance-edge") == 1
    message = capsys.readouterr().err
    assert "appliance-edge.svg can't be drawn" in message and "it is too much" in message
    assert prometheus.refuse in message


def test_an_unknown_dashboard_is_refused(prometheus, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(prometheus, tmp_path, "--only", "nothing")
    assert "appliance-overview" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0125, "s", "12.5 ms"),
        (7200, "s", "2 h"),
        (0.5, "percentunit", "50%"),
        (1536 * 1024, "bytes", "1.5 MiB"),
        (12345, "short", "12.3K"),
        (-3.5, "short", "-3.5"),
        (1, "bool_yes_no", "Yes"),
        (0, "reqps", "0 req/s"),
    ],
)
def test_quantities_have_their_unit(value, unit, shown):
    assert drawing.quantity(value, {"unit": unit}) == shown


def test_a_moment_is_told_from_now():
    assert drawing.quantity((time.time() - 3600) * 1000, {"unit": "dateTimeFromNow"}) == "1 h ago"
    assert drawing.quantity((time.time() + 86410) * 1000, {"unit": "dateTimeFromNow"}) == "in 1 d"


def test_ticks_are_round():
    assert drawing.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert drawing.ticks(-30, 70) == [-25, 0, 25, 50]


def test_a_flat_line_has_an_axis():
    low, high = drawing.scale([5.0, 5.0], {})
    assert low < high


def test_stacked_series_lie_on_top_of_each_other():
    series = [Series(name, {}, [(0, 1.0), (1, 2.0)]) for name in "ab"]
    assert drawing.stack(series) == [[(0, 1.0), (1, 2.0)], [(0, 2.0), (1, 4.0)]]


def test_states_are_stretches_that_a_gap_ends():
    points = [(0, 1.0), (10, 1.0), (20, 0.0), (50, 0.0)]
    assert drawing.runs(points, 10) == [(0, 10, 1.0), (20, 20, 0.0), (50, 50, 0.0)]


def test_a_name_comes_from_the_template_or_from_all_labels():
    labels = {"__name__": "up", "job": "node"}
    assert pictures.legend("{{job}} {{colour}}", labels) == "node"
    assert pictures.legend("__auto", labels) == "up{job=node}"
