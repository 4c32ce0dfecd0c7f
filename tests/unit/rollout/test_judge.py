"""The verdicts: what fails, what passes, and what says nothing."""

import re

import pytest
from rollout import judge
from rollout.config import Config
from rollout.judge import FAIL, NO_DATA, PASS, Check, Window, verdict_of

CONFIG = Config()


def window(requests=0, errors=0, ms=5.0, spread=0.2):
    good = requests - errors
    return Window(requests, errors, [ms / 1000 * (1 + spread * i / max(1, good)) for i in range(good)])


def latency(new, old, config=CONFIG):
    return {check.name: check.verdict for check in judge.latencies(new, old, config)}


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        (window(29, 29), window(1000), NO_DATA),
        (window(30, 0), window(0), PASS),
        (window(30, 1), window(1000), PASS),  # one failed request condemns nobody
        (window(30, 6), window(1000), FAIL),  # a fifth of all
        (window(1000, 25), window(1000), FAIL),
        (window(30, 2), window(1000, 10), PASS),  # twice the other's share, but of two requests
        (window(1000, 9), window(1000), PASS),
        (window(1000, 100), window(1000, 90), PASS),  # a fault that both share
        (window(1000, 100), window(20, 2), FAIL),  # too few of the other colour to excuse it
        (window(500, 500), window(500, 250), FAIL),  # whatever the other does, a colour must answer
        (window(1000, 600), window(1000, 600), FAIL),
        (window(30, 15), window(1000, 400), PASS),
    ],
)
def test_errors(new, old, verdict):
    assert judge.errors(new, old, CONFIG, 30).verdict == verdict


@pytest.mark.parametrize("count", [3, 5, 500])
def test_without_one_good_answer_it_never_passes(count):
    lenient = CONFIG._replace(judge_error_ceiling=1.0)
    check = judge.errors(window(count, count), window(500, 250), lenient, 3)
    assert check.verdict == NO_DATA and f"{count} of {count} requests failed" in check.text


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        (Window(29, refused=29), window(1000), None),
        (window(1000), window(1000), PASS),
        (Window(1000, refused=1000), window(1000), FAIL),
        (Window(30, refused=15), window(1000), FAIL),
        (Window(30, refused=6), window(1000), PASS),  # one client's mistake
        (Window(1000, refused=150), Window(1000, refused=100), PASS),  # mistakes that both are sent
        (Window(1000, refused=1000), Window(1000, refused=900), NO_DATA),  # nor did it answer anybody well
        (Window(1000, 100, refused=900), Window(1000, refused=900), NO_DATA),
        (Window(1000, refused=900), Window(1000, refused=700), PASS),  # no share is larger than all
        (Window(100, refused=40), window(20), PASS),  # with nothing to compare with
        (Window(100, refused=90), window(20), FAIL),
    ],
)
def test_refusals(new, old, verdict):
    check = judge.refusals(new, old, CONFIG)
    assert (check and check.verdict) == verdict
    assert check is None or check.limit <= 1


@pytest.mark.parametrize(("ms", "seconds"), [(1, 0.25), (100, 0.3), (1000, 3.0), (2000, 5.0), (4000, 5.0), (8000, 8.0)])
def test_who_gives_up_has_waited_longer_than_nearly_all_others(ms, seconds):
    assert judge.given_up_after(window(1000, ms=ms, spread=0), CONFIG) == pytest.approx(seconds)
    assert judge.given_up_after(window(3, ms=ms), CONFIG) == 5.0


def test_times_that_dont_compare_have_their_absolute_limit_only():
    fast, slow, never = (window(200, ms=ms) for ms in (5, 500, 9000))
    for new, verdicts in ((slow, {"p95": PASS}), (never, {"p95": FAIL}), (window(3), {"p50": NO_DATA})):
        checks = judge.latencies(new, fast, CONFIG, comparable=False)
        assert {check.name: check.verdict for check in checks} == verdicts
    [check] = judge.latencies(never, fast, CONFIG, comparable=False)
    assert re.fullmatch(r"\d{5} ms or more, 5000 ms allowed", check.text)


def test_no_time_is_a_power_of_ten():
    times = {
        0.0123: "0.0123 ms",
        1.234: "1.23 ms",
        99.94: "99.9 ms",
        250.4: "250 ms",
        999.7: "1000 ms",
        5000: "5000 ms",
    }
    assert {value: judge._milliseconds(value) for value in times} == times


def test_three_times_slower_fails_at_every_quantile():
    assert latency(window(1000, ms=60), window(1000, ms=20)) == {"p50": FAIL, "p95": FAIL, "p99": FAIL}


def test_as_fast_passes_at_every_quantile():
    assert latency(window(1000, ms=21), window(1000, ms=20)) == {"p50": PASS, "p95": PASS, "p99": PASS}


def test_few_requests_have_a_median_and_no_tail():
    assert latency(window(40, ms=20), window(40, ms=20)) == {"p50": PASS}
    assert latency(window(40, ms=60), window(40, ms=20)) == {"p50": FAIL}


def test_without_the_other_colour_nothing_is_said_of_the_median():
    assert latency(window(40), window(3)) == {"p50": NO_DATA}
    assert latency(window(3), window(40)) == {"p50": NO_DATA}


def test_a_small_difference_is_tolerated_whatever_the_ratio_is():
    assert latency(window(40, ms=2.9, spread=0), window(40, ms=1, spread=0)) == {"p50": PASS}


def test_an_absolute_limit_holds_whatever_the_other_colour_does():
    assert latency(window(200, ms=9000), window(200, ms=9000))["p95"] == FAIL


def test_a_slow_tail_alone_fails():
    new = Window(200, 0, [0.02] * 170 + [0.2] * 30)
    assert latency(new, window(200, ms=20)) == {"p50": PASS, "p95": FAIL}


@pytest.mark.parametrize(
    ("agree", "differ", "silent", "verdict"),
    [
        (99, 0, 0, NO_DATA),
        (100, 0, 0, PASS),
        (95, 5, 0, PASS),
        (90, 10, 0, FAIL),
        (0, 0, 100, FAIL),
        (94, 0, 6, PASS),  # one of them is tolerated as an error, five as differing
        (93, 0, 7, FAIL),
        (93, 5, 1, NO_DATA),
        (94, 5, 1, PASS),
        (92, 5, 3, FAIL),
    ],
)
def test_shadow(agree, differ, silent, verdict):
    assert judge.shadow(agree, differ, silent, CONFIG).verdict == verdict


def test_no_data_is_neither_pass_nor_fail():
    checks = {verdict: Check("x", verdict, "") for verdict in (PASS, FAIL, NO_DATA)}
    assert verdict_of([checks[PASS], checks[NO_DATA]]) == NO_DATA
    assert verdict_of([checks[PASS], checks[NO_DATA], checks[FAIL]]) == FAIL
    assert verdict_of([checks[PASS]]) == PASS
    assert verdict_of([]) == NO_DATA


def test_a_quantile_is_a_value_that_was_seen():
    assert [judge.quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.75, 0.99, 1.0)] == [1, 2, 3, 4, 4]
