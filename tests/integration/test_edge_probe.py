"""The appliance's own requests at the edge: told from clients', logged and handed on as such."""

from __future__ import annotations

import http.client
import json
import time

import pytest

pytestmark = pytest.mark.needs("nginx")

PROBE = {"X-Appliance-Probe": "1"}
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def logged(edge, log, found):
    """The line of an access log that tells of an answer, once it is there."""
    end = time.monotonic() + 30
    while True:
        lines = [line for line in edge.log(log) if line["request_id"] == found.headers["x-request-id"]]
        if lines:
            return lines[0]
        assert time.monotonic() < end, "the request isn't logged"
        time.sleep(0.01)


def arrived(found):
    """The headers that the colour was sent."""
    return json.loads(found.body)["headers"]


@pytest.mark.parametrize(("path", "method"), [("/predict", "POST"), ("/health", "GET")])
def test_a_probe_is_not_in_the_log_of_production(edge, path, method):
    found = edge.ask(path, PROBE, method)

    line = logged(edge, "test", found)
    assert (line["environment"], line["path"], line["colour"], line["routed"]) == ("probe", path, "blue", "blue")
    # Lines are written in turn: whatever came before a later request is there with it.
    logged(edge, "prod", edge.ask())
    assert found.headers["x-request-id"] not in {line["request_id"] for line in edge.log("prod")}


def test_a_probe_of_a_colour_that_is_down_is_none_of_production_either(edge, colours):
    with colours["blue"].down():
        found = edge.ask(headers=PROBE)

    line = logged(edge, "test", found)
    assert (line["environment"], line["status"], line["routed"]) == ("probe", 502, "blue")


@pytest.mark.parametrize("headers", [{}, {"X-Appliance-Probe": "2"}, {"X-Appliance-Probe": ""}])
def test_any_other_request_is_production(edge, headers):
    found = edge.ask(headers=headers)

    assert logged(edge, "prod", found)["environment"] == "prod"
    assert "x-appliance-probe" not in arrived(found)


@pytest.mark.parametrize("headers", [PROBE, {"X-Request-ID": "appliance-from-elsewhere"}])
def test_from_another_address_it_is_a_clients(edge, headers):
    elsewhere = http.client.HTTPConnection("127.0.0.1", edge.port, source_address=("127.0.0.2", 0))
    found = edge.ask(headers=headers, connection=elsewhere)
    elsewhere.close()

    assert logged(edge, "prod", found)["environment"] == "prod"
    assert "x-appliance-probe" not in arrived(found)


def test_a_test_stays_a_test(edge):
    found = edge.ask("/test/predict", PROBE)

    line = logged(edge, "test", found)
    assert (line["environment"], line["routed"]) == ("test", "green")


def test_a_probe_is_told_to_the_model(edge):
    assert arrived(edge.ask(headers=PROBE))["x-appliance-probe"] == "example"
    # Where clients try a release, an empty body is a mistake.
    assert arrived(edge.ask("/test/predict", PROBE))["x-appliance-probe"] == "1"


def test_a_rollouts_own_request_is_logged_as_production_and_told_to_the_model(edge):
    found = edge.ask(headers={"X-Request-ID": "appliance-0123-1"})

    assert logged(edge, "prod", found)["environment"] == "prod"
    assert arrived(found)["x-appliance-probe"] == "1"


def test_a_probe_is_not_copied(edge):
    edge.route("blue", shadow=100)
    copies = []
    with edge.shadow(lambda request: copies.append(request) or NO_CONTENT):
        for number in range(10):
            edge.ask(headers={**PROBE, "X-Request-ID": f"probe-{number}"})
        client = edge.ask(headers={"X-Request-ID": "client"})
        logged(edge, "prod", client)

    assert [copy.headers["x-request-id"] for copy in copies] == ["client"]


def test_a_probe_sees_maintenance_as_clients_do(edge):
    edge.route("blue", maintenance=True)

    assert edge.ask(headers=PROBE).status == 503
