"""The simulation for the rules of drift: what it sends, and how it reads promtool."""

import argparse
import sys

import pytest

from benchmarks import drift
from benchmarks.report import BenchError


@pytest.fixture(autouse=True)
def short_day(monkeypatch):
    monkeypatch.setattr(drift, "MINUTES", 30)
    monkeypatch.setattr(drift, "SHIFT_MINUTE", 15)


@pytest.fixture
def promtool(tmp_path):
    """Makes a program that prints a text and ends with a status, as promtool does."""

    def make(text: str, status: int) -> str:
        path = tmp_path / "promtool"
        path.write_text(f"#!{sys.executable}\nprint({text!r})\nraise SystemExit({status})\n")
        path.chmod(0o755)
        return str(path)

    return make


def last(series: dict, name: str, feature: str) -> float:
    [found] = [seen for key, seen in series.items() if key.startswith(f"{name}{{") and f'feature="{feature}"' in key]
    return float(found[-1])


def test_a_day_has_the_rows_and_the_shift_that_were_asked_for():
    series = drift.simulate(drift.Traffic(50.0, shift=1.0), seed=1)
    assert {len(seen) for key, seen in series.items() if "_total{" in key} == {30}
    rows = last(series, "model_feature_rows_total", "f00")
    assert rows == 30 * 60 * 50
    means = {
        feature: (
            last(series, "model_feature_deviation_positive_total", feature)
            - last(series, "model_feature_deviation_negative_total", feature)
        )
        / rows
        for feature in ("f00", "f04")
    }
    # Half of the time by one standard deviation.
    assert means["f00"] == pytest.approx(0.5, abs=0.05) and means["f04"] == pytest.approx(0, abs=0.05)


def test_rows_are_as_correlated_as_asked_for():
    [first, second, *_] = drift.Traffic(50.0, correlation=0.9).rows(seed=1)
    for earlier, later in ((first[:-1], first[1:]), (first[-1:], second[:1])):
        assert ((later - 0.9 * earlier).abs() < 5 * 0.19**0.5).all()
    assert float((first[:-1] * first[1:]).mean()) == pytest.approx(0.9, abs=0.1)


def test_the_answers_are_what_promtool_got(promtool):
    text = (
        "  FAILED:\n"
        '    expr: "a{b=\\"c\\"}", time: 29m,\n        exp: nil\n'
        '        got: {alertname="X", feature="f00"} 1.4E+01, {alertname="X", feature="f01"} 7E+00\n'
    )
    found = drift.judge({"x": ["1x30"]}, ['a{b="c"}', "none"], promtool(text, 1))
    assert found == [{'{alertname="X", feature="f00"}': 14.0, '{alertname="X", feature="f01"}': 7.0}, {}]


def test_rules_that_promtool_refuses_are_no_quiet_day(promtool):
    with pytest.raises(BenchError, match="promtool"):
        drift.judge({}, ["x"], promtool("  FAILED:\n    could not parse expression", 1))
    with pytest.raises(BenchError, match="promtool"):
        drift.judge({}, ["x"], "/nonexistent/promtool")


@pytest.mark.parametrize(("firing", "minutes"), [({'{alertname="FeatureDrift", feature="f00"}': 2.0}, 5.0), ({}, None)])
def test_a_shift_is_noticed_so_long_after_it_came(monkeypatch, firing, minutes):
    monkeypatch.setattr(drift, "simulate", lambda *_: {})
    monkeypatch.setattr(drift, "judge", lambda *_: [firing])
    given = drift.parse([])
    [noticed, others] = drift.shifted_day("a day", drift.Traffic(1.0))(given)
    assert (noticed.value, others.value) == (minutes, 0)


@pytest.mark.parametrize("judged", [12, 11, None])
def test_a_day_in_which_the_rules_judge_nothing_is_no_quiet_day(promtool, judged):
    got = "nil" if judged is None else f"{{}} {judged:E}"
    text = f'  FAILED:\n    expr: "count(feature:drift_state)", time: 29m,\n        exp: nil\n        got: {got}\n'
    given = argparse.Namespace(seed=1, promtool=promtool(text, 1))
    measured = drift.quiet_day("quiet", drift.Traffic(0.2))
    if judged == drift.FEATURES:
        [row] = measured(given)
        assert row.value == 0
    else:
        with pytest.raises(BenchError, match="the rules judge"):
            measured(given)
