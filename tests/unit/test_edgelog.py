"""The program that counts nginx's access logs: every line that the log format can give is counted, and rightly."""

import itertools
import json
import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles/edgelog"

ANSWERED = {
    "time_iso8601": "2026-01-31T12:00:00+00:00",
    "appliance_environment": "prod",
    "appliance_request_id": "0123456789abcdef",
    "remote_addr": "192.0.2.7",
    "appliance_method": "POST",
    "appliance_path": "/predict",
    "status": "200",
    "request_length": "312",
    "bytes_sent": "401",
    "request_time": "0.012",
    "upstream_response_time": "0.011",
    "upstream_addr": "unix:/run/appliance/blue/worker-0.sock",
    "appliance_routed": "blue",
    "upstream_http_x_model_colour": "blue",
    "upstream_http_x_model_version": "1.0.0+cpu",
}


def line(**changes):
    """A line as nginx writes it: the edge's own log format, with these variables."""
    template = (PROJECT / "roles/edge/templates/nginx.conf.j2").read_text()
    declaration = re.search(r"log_format appliance escape=json(.*?);\n", template, re.DOTALL).group(1)
    log_format = "".join(re.findall(r"'([^']*)'", declaration))
    values = {**ANSWERED, **changes}
    # What escape=json does.
    values = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in values.items()}
    written = re.sub(r"\$(\w+)", lambda match: values[match.group(1)], log_format)
    json.loads(written)
    return written


@pytest.fixture
def count(tmp_path):
    """Let mtail read lines; returns its samples as {'name{label="value",…}': value}."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    settings = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    program = environment.from_string((ROLE / "templates/edge.mtail.j2").read_text()).render(**defaults, **settings)
    (tmp_path / "edge.mtail").write_text(program)

    def run(*lines):
        log = tmp_path / "access.log"
        log.write_text("".join(f"{text}\n" for text in lines))
        command = ["mtail", "--one_shot", "--one_shot_format=prometheus", "--emit_prog_label=false", "--logtostderr"]
        command += ["--address", "127.0.0.1", "--port", "0", "--progs", str(tmp_path), "--logs", str(log)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        samples = (text.rsplit(" ", 1) for text in done.stdout.splitlines() if re.match(r"edge_\w+(\{.*\})? ", text))
        return {name: float(value) for name, value in samples}

    return run


def requests(samples):
    """The requests that were counted, by (environment, colour, method, code)."""
    name = r'edge_requests_total\{code="(.*)",colour="(.*)",environment="(.*)",method="(.*)"\}'
    found = {match.groups(): value for key, value in samples.items() if (match := re.fullmatch(name, key)) and value}
    return {(environment, colour, method, code): n for (code, colour, environment, method), n in found.items()}


@pytest.mark.needs("mtail")
class TestCounting:
    def test_an_answer_is_counted_with_its_times(self, count):
        samples = count(line(), line(request_time="0.500"))

        assert requests(samples) == {("production", "blue", "POST", "200"): 2}
        labels = 'colour="blue",environment="production"'
        assert samples[f"edge_request_duration_seconds_sum{{{labels}}}"] == pytest.approx(0.512)
        assert samples[f'edge_request_duration_seconds_bucket{{{labels},le="0.01"}}'] == 0
        assert samples[f'edge_request_duration_seconds_bucket{{{labels},le="0.25"}}'] == 1
        # The threshold of the objective itself is fast enough.
        assert samples[f'edge_request_duration_seconds_bucket{{{labels},le="0.5"}}'] == 2
        assert samples[f"edge_upstream_duration_seconds_sum{{{labels}}}"] == pytest.approx(0.022)
        assert samples["edge_log_lines_unparsed_total"] == 0

    @pytest.mark.parametrize(
        ("changes", "environment"),
        [
            ({"appliance_environment": "test"}, "test"),
            ({"appliance_environment": "probe", "remote_addr": "127.0.0.1"}, "probe"),
            ({"appliance_request_id": "appliance-12-3", "remote_addr": "127.0.0.1"}, "probe"),
            ({"appliance_request_id": "appliance-12-3"}, "production"),
            ({"appliance_request_id": "my-appliance-1", "remote_addr": "127.0.0.1"}, "production"),
        ],
    )
    def test_who_asked_decides_what_it_counts_as(self, count, changes, environment):
        assert requests(count(line(**changes))) == {(environment, "blue", "POST", "200"): 1}

    @pytest.mark.parametrize(
        ("changes", "colour", "seconds"),
        [
            ({"upstream_http_x_model_colour": "", "upstream_response_time": "0.002"}, "blue", 0.002),
            ({"upstream_http_x_model_colour": "", "appliance_routed": "", "upstream_response_time": ""}, "none", None),
            ({"upstream_http_x_model_colour": "", "upstream_response_time": "-, -"}, "blue", None),
            ({"upstream_response_time": "0.001, 0.004"}, "blue", 0.004),
            ({"upstream_http_x_model_colour": "green", "upstream_response_time": "0.000 : 0.003"}, "green", 0.003),
        ],
    )
    def test_an_answer_belongs_to_a_colour_and_its_last_worker(self, count, changes, colour, seconds):
        samples = count(line(status="502", **changes))

        assert requests(samples) == {("production", colour, "POST", "502"): 1}
        name = f'edge_upstream_duration_seconds_sum{{colour="{colour}",environment="production"}}'
        assert samples.get(name) == seconds

    @pytest.mark.parametrize("method", ["-", "BREW", "POSTX"])
    def test_a_client_makes_no_series(self, count, method):
        assert requests(count(line(appliance_method=method))) == {("production", "blue", "other", "200"): 1}

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "-", "BREW", "POSTX"])
    def test_only_what_predicts_has_a_duration(self, count, method):
        fast = {"request_time": "0.001", "upstream_response_time": "0.001"}
        samples = count(line(), line(appliance_method="PUT"), *[line(appliance_method=method, **fast)] * 9)

        assert sum(requests(samples).values()) == 11
        for name in ("edge_request_duration_seconds", "edge_upstream_duration_seconds"):
            labels = 'colour="blue",environment="production"'
            assert samples[f"{name}_count{{{labels}}}"] == 2
            assert samples[f'{name}_bucket{{{labels},le="0.005"}}'] == 0

    @pytest.mark.parametrize("path", ["-", "/a%22b", '/a"b', "/a\\", '/","status":500,"colour":"x', "/" + "a" * 4000])
    def test_a_path_is_only_a_path(self, count, path):
        assert requests(count(line(appliance_path=path))) == {("production", "blue", "POST", "200"): 1}

    @pytest.mark.parametrize("other", ["", "rubbish", "{}", '{"time":"2026'])
    def test_a_line_that_is_none_is_counted_apart(self, count, other):
        samples = count(line(), other, line())

        assert requests(samples) == {("production", "blue", "POST", "200"): 2}
        assert samples["edge_log_lines_unparsed_total"] == 1

    def test_the_first_error_is_an_increase(self, count):
        samples = count(line())

        for colour, method in itertools.product(("blue", "green", "none"), ("POST", "PUT")):
            name = f'edge_requests_total{{code="500",colour="{colour}",environment="production",method="{method}"}}'
            assert samples[name] == 0


def test_a_bucket_ends_at_the_threshold_of_the_objective():
    buckets = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__edgelog_buckets"]
    assert "0.5" in buckets.split(", ")


def test_durations_are_of_the_methods_whose_requests_the_objectives_count():
    methods = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__edgelog_methods"]
    rules = (PROJECT / "roles/prometheus/files/rules/slo.yml").read_text()
    selectors = re.findall(r"edge_requests_total\{([^}]*)\}", rules)
    assert selectors
    assert [selector for selector in selectors if f'method=~"{"|".join(methods)}"' not in selector] == []
