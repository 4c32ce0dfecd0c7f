"""nginx's log as it grows, rotates and tears."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest
from rollout import accesslog
from rollout.accesslog import AccessLog


@pytest.fixture
def path(tmp_path):
    (tmp_path / "log").touch()
    return tmp_path / "log"


def moment(ago):
    return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat(timespec="seconds")


def line(
    routed="green", status=200, request_id="r1", method="POST", path="/predict", upstream="0.020", seconds=1.5, ago=0
):
    time = moment(ago)
    about = {"time": time, "method": method, "path": path, "status": status, "request_id": request_id}
    return json.dumps(about | {"routed": routed, "upstream_seconds": upstream, "request_seconds": seconds}) + "\n"


def write(path, *lines):
    with path.open("a") as stream:
        stream.write("".join(lines))


def numbers(log, colour="green"):
    window = log.clients(colour, 0)
    return window.requests, window.errors, window.seconds


def test_only_what_is_written_from_now_on_counts(path):
    write(path, line())
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line(), line("blue", 502, upstream="-"))
    log.read()
    assert numbers(log) == (1, 0, [0.02])
    assert numbers(log, "blue") == (1, 1, [])


def test_colours_statuses_and_our_own_are_kept_apart(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(
        path,
        line(),
        line(status=500),
        line(status=404),
        line(status=429),
        line(status=499),
        line(method="GET"),
        line(request_id="appliance-word-7-1"),
    )
    write(path, line(request_id="appliance-word-fresh-1"), "not json\n", "{}\n")
    log.read()
    assert numbers(log) == (4, 1, [0.02])
    assert log.clients("green", 0).refused == 1
    assert log.own("green", 0).requests == 1


@pytest.mark.parametrize("request_id", ["appliance-1", "appliance-fresh-1", "appliance-word", "xappliance-word-7-1"])
def test_a_clients_id_hides_no_request(path, request_id):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line(status=500, request_id=request_id))
    log.read()
    assert numbers(log) == (1, 1, []) and log.own("green", 0).requests == 0
    window = accesslog.before(path, "green", 60, "appliance-word-7-", "appliance-word-")
    assert (window.requests, window.errors) == (1, 1)


def test_what_was_put_is_a_prediction_too(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line(method="PUT", status=500), line(method="PUT"))
    log.read()
    assert numbers(log) == (2, 1, [0.02])


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_who_asks_for_no_prediction_isnt_refused_one(path, method):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    refused = [line(method=method, path=asked, status=404) for asked in ("/wp-login.php", "/v2/predict", "-")]
    renamed = "/predictions/of-another-name"
    write(path, *refused, line(method="PUT", path=renamed, status=404), line(path="/jobs", status=500))
    log.read()
    window = log.clients("green", 0)
    assert (window.requests, window.refused, window.errors) == (2, 1, 1)


def test_who_went_away_is_kept_apart_with_the_time_waited(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    gone = [line(status=499, upstream=str(seconds)) for seconds in (0.1, 2.0, 2.5)]
    write(path, line(), *gone, line(status=499, upstream="-", seconds=3.0))
    log.read()
    for window in (log.clients("green", 0), accesslog.before(path, "green", 60)):
        assert (window.requests, window.errors, window.gone) == (1, 0, [0.1, 2.0, 2.5, 3.0])
        counted = window.with_given_up(2.5)
        assert (counted.requests, counted.errors, counted.given_up, counted.seconds) == (3, 2, 2, [0.02])


def test_a_line_that_is_half_written_counts_once(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    whole = line()
    write(path, whole[:30])
    log.read()
    assert numbers(log)[0] == 0
    write(path, whole[30:])
    log.read()
    assert numbers(log)[0] == 1


@pytest.mark.parametrize("gap", [False, True], ids=["at once", "after a while"])
def test_rotation_loses_nothing(path, gap):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line())
    log.read()
    write(path, line())
    os.rename(path, path.with_suffix(".1"))
    if gap:
        log.read()
    write(path.with_suffix(".1"), line())  # nginx goes on with the old file until it is told
    path.touch()
    write(path, line())
    log.read()
    write(path, line())
    log.read()
    assert numbers(log)[0] == 5


def test_a_truncated_log_is_read_from_its_beginning(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line(), line())
    log.read()
    os.truncate(path, 0)
    write(path, line())
    log.read()
    assert numbers(log)[0] == 3


def test_the_time_of_all_workers_that_were_tried_counts(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, line(upstream="0.001, 0.004"))
    log.read()
    assert numbers(log)[2] == [pytest.approx(0.005)]


def test_a_busy_second_keeps_a_fair_sample_of_times(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 60)
    write(path, *[line(upstream=f"{0.001 * (i % 10):.3f}") for i in range(5000)])
    log.read()
    requests, _, seconds = numbers(log)
    assert requests == 5000 and len(seconds) == 500
    assert {round(s, 3) for s in seconds} == {round(0.001 * i, 3) for i in range(10)}


def test_what_is_too_old_goes(path):
    log = AccessLog(path, "appliance-word-7-", "appliance-word-", 0)
    write(path, line())
    log.read()
    log.read()
    assert numbers(log)[0] == 0


def test_before_looks_back_by_the_logs_own_time(path):
    write(path, line(ago=300), line(ago=1), line("blue", ago=1), line(status=500, ago=1))
    window = accesslog.before(path, "green", 60)
    assert (window.requests, window.errors, window.seconds) == (2, 1, [0.02])
    assert accesslog.before(path, "green", 600).requests == 3
    assert accesslog.before(path, "green", 600, not_before=moment(ago=100)).requests == 2
    write(path, line(request_id="appliance-word-fresh-1"), line(request_id="appliance-old-3"))
    assert accesslog.before(path, "green", 60, "appliance-old-", "appliance-word-").requests == 2
    assert accesslog.before(path.with_suffix(".none"), "green", 60).requests == 0
