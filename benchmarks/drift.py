#!/usr/bin/env python3
"""Simulate traffic for the rules of drift: a table, `reports/drift_bench.json`, a part of `docs/benchmarks.md`.

Rows are counted by the model service's own code and judged by the rules that the role prometheus installs, in
`promtool test rules`; only time is simulated. Needs promtool (Debian's package prometheus) and no appliance.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from prometheus_client.core import Metric

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "service")]

from model_server import features, reference  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.report import BenchError, Row, machine  # noqa: E402

MARKS = ("<!-- drift-bench:begin, written by benchmarks/drift.py -->", "<!-- drift-bench:end -->")
RULES = ROOT / "roles" / "prometheus" / "files" / "rules" / "drift.yml"
DEFAULTS = ROOT / "roles" / "prometheus" / "vars" / "main.yml"
THRESHOLDS = ROOT / "roles" / "prometheus" / "tests" / "thresholds.yml"
MODEL, COLOUR = "simulated", "blue"
FEATURES = 12
TRAINING_ROWS = 20_000
MINUTES = 24 * 60
# How often the rules are evaluated. On the host that is each minute, which takes promtool five times as long.
EVALUATION_MINUTES = 5
# Correlation of a row with the one before it: a chatty client asks nearly the same again.
AUTOCORRELATION = 0.9
BUSY, QUIET = 50.0, 0.2
SHIFT_MINUTE, SHIFT = 8 * 60, 1.0
# Both windows together, of six hours and one.
NOTICED_BAR_MINUTES = 7 * 60
COUNT_BAR_US = 1.0
COUNT_ROUNDS, COUNT_ROWS = 15, 40_960
PROMTOOL_LIMIT_S = 1800


@dataclass(frozen=True)
class Traffic:
    """A day of rows. From `SHIFT_MINUTE` on, the first feature is `shift` standard deviations larger."""

    rows_per_second: float
    correlation: float = 0.0
    shift: float = 0.0

    def rows(self, seed: int) -> Iterator[torch.Tensor]:
        """What comes in each minute: normal values of shape [rows, features], each row correlated with the last."""
        generator = torch.Generator().manual_seed(seed)
        count = round(60 * self.rows_per_second)
        noise = (1 - self.correlation**2) ** 0.5
        # Of the last row before, and of the new ones' noise, in each of the new rows.
        powers = self.correlation ** torch.arange(count + 1, dtype=torch.float64)
        weights = torch.stack(
            [torch.cat([powers[:row].flip(0), torch.zeros(count - row)]) for row in range(1, count + 1)]
        )
        last = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        for minute in range(MINUTES):
            drawn = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
            if self.correlation:
                drawn = weights @ (noise * drawn) + powers[1:, None] * last
            last = drawn[-1].clone()
            if minute >= SHIFT_MINUTE:
                drawn[:, 0] += self.shift
            yield drawn


def values(normal: torch.Tensor) -> torch.Tensor:
    """Features of four kinds, in turn: normal, uniform, lognormal, and one of two values."""
    made = normal.clone()
    made[:, 1::4] = torch.special.ndtr(normal[:, 1::4])
    made[:, 2::4] = normal[:, 2::4].exp()
    made[:, 3::4] = (normal[:, 3::4] > 1).double()
    return made


def training() -> reference.Reference:
    """The reference of rows that come from where live ones do."""
    rows = values(torch.randn(TRAINING_ROWS, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    columns = {f"f{index:02}": column for index, column in enumerate(rows.T.tolist())}
    return reference.parse(reference.to_text(reference.measure(columns)).encode())


Series = dict[str, list[str]]


def simulate(traffic: Traffic, seed: int) -> Series:
    """A day of what Prometheus scrapes once a minute, by series."""
    known = training()
    counters = features.FeatureCounters()
    counts = features.FeatureCounts(counters, MODEL, "float64", known)
    series: Series = {}
    defaults = yaml.safe_load(DEFAULTS.read_text())["__prometheus_thresholds"]
    constant = list(features.reference_metrics([SimpleNamespace(name=MODEL, reference=known)]))
    for rows in traffic.rows(seed):
        counts.add(values(rows))
        counts.fold()
        _scrape(series, [metric for counter in (*counters.by_feature, counters.bins) for metric in counter.collect()])
    _scrape(series, constant)
    live = f'appliance_release_info{{colour="{COLOUR}",role="live"}}'
    fixed = {live: ["1"], "appliance:threshold_drift_rows_long:count": [str(defaults["drift_rows_long_count"])]}
    return {name: seen if len(seen) > 1 else [f"{seen[0]}x{MINUTES}"] for name, seen in {**series, **fixed}.items()}


def _scrape(series: Series, metrics: Sequence[Metric]) -> None:
    for metric in metrics:
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                labels = ",".join(f'{key}="{value}"' for key, value in {**sample.labels, "colour": COLOUR}.items())
                series.setdefault(f"{sample.name}{{{labels}}}", []).append(f"{sample.value:.10g}")


def judge(series: Series, queries: Sequence[str], promtool: str) -> list[dict[str, float]]:
    """What Prometheus answers to each of `queries` at the end of the day, by the labels in it. Raises BenchError.

    promtool only tells an answer from an expected one: where nothing is expected, it prints what it got.
    """
    end = f"{MINUTES - 1}m"
    document = {
        "rule_files": [str(THRESHOLDS), str(RULES)],
        "group_eval_order": ["thresholds", "drift", "training"],
        "evaluation_interval": f"{EVALUATION_MINUTES}m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": " ".join(seen)} for name, seen in series.items()],
                "promql_expr_test": [{"expr": query, "eval_time": end, "exp_samples": []} for query in queries],
            }
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        try:
            done = subprocess.run(
                [promtool, "test", "rules", file.name], capture_output=True, text=True, timeout=PROMTOOL_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"promtool: {error}") from error
    printed = done.stdout + done.stderr
    if done.returncode not in (0, 1) or "parse" in printed:
        raise BenchError(f"promtool: {report.reason(printed)}")
    answers: list[dict[str, float]] = [{} for _ in queries]
    for expression, got in re.findall(r'expr: "(.*)", time: .*,\s+exp: nil\s+got: (.*)', printed):
        found = re.findall(r"(\{[^}]*\}) ([^\s,]+)", got)
        answers[queries.index(expression.replace('\\"', '"'))] = {labels: float(value) for labels, value in found}
    return answers


FIRING = 'sum by (alertname, feature) (count_over_time(ALERTS{alertstate="firing"}[1d]))'
JUDGED = "count(feature:drift_state)"
LARGEST = (
    "max(feature:smd:1h)",
    "max(feature:smd:6h)",
    "max(feature:psi:6h)",
    "max(feature:ks:6h)",
)


def quiet_day(name: str, traffic: Traffic) -> Callable[[argparse.Namespace], list[Row]]:
    """Nothing drifts: how many alerts fire nevertheless."""

    def measured(given: argparse.Namespace) -> list[Row]:
        fired, judged, *largest = judge(simulate(traffic, given.seed), [FIRING, JUDGED, *LARGEST], given.promtool)
        # Rules that judge nothing raise nothing either.
        if list(judged.values()) != [FEATURES]:
            raise BenchError(f"at the end of the day the rules judge {judged or 'no'} features, not {FEATURES}")
        smd1, smd6, psi6, ks6 = (next(iter(answer.values()), float("nan")) for answer in largest)
        note = f"largest at the end: SMD {smd1:.2f} (1 h), {smd6:.2f} (6 h), PSI {psi6:.3f}, KS {ks6:.3f}"
        return [_row(name, f"{name}: alerts in 24 h", float(len(fired)), "alerts", 0.0, note, given)]

    return measured


def shifted_day(name: str, traffic: Traffic) -> Callable[[argparse.Namespace], list[Row]]:
    """One feature moves by one standard deviation: when that is noticed, and whether others are accused."""

    def measured(given: argparse.Namespace) -> list[Row]:
        [fired] = judge(simulate(traffic, given.seed), [FIRING], given.promtool)
        minutes = {labels: value for labels, value in fired.items() if "FeatureDrift" in labels and '"f00"' in labels}
        fired_minutes = EVALUATION_MINUTES * next(iter(minutes.values()), 0.0)
        noticed = MINUTES - SHIFT_MINUTE - fired_minutes if minutes else None
        others = [labels for labels in fired if '"f00"' not in labels]
        return [
            _row(name, f"{name}: alert after", noticed, "min", NOTICED_BAR_MINUTES, "30 min of it pending", given),
            _row(name, f"{name}: alerts about other features", float(len(others)), "alerts", 0.0, "", given),
        ]

    return measured


def counting(given: argparse.Namespace) -> list[Row]:
    """What it costs a worker to count a row of two features, adding up included."""
    known = training()
    counts = features.FeatureCounts(
        features.FeatureCounters(), "counted", "float32", replace(known, features=known.features[:2])
    )
    rows = [[0.2, 0.6]]
    took = []
    for _ in range(COUNT_ROUNDS):
        started = time.thread_time()
        for _ in range(COUNT_ROWS):
            counts.add(rows)
        took.append((time.thread_time() - started) / COUNT_ROWS * 1e6)
    note = f"CPU time; of {COUNT_ROUNDS} rounds the best, the median {sorted(took)[COUNT_ROUNDS // 2]:.2f}"
    return [_row("counting", "counting a row of 2 features", min(took), "us", COUNT_BAR_US, note, given)]


def _row(
    benchmark: str, figure: str, value: float | None, unit: str, bar: float | None, note: str, given: argparse.Namespace
) -> Row:
    command = "FeatureCounts.add" if benchmark == "counting" else f"promtool test rules, seed {given.seed}"
    return Row(benchmark, figure, value, unit, bar, note, command, "1")


BENCHMARKS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    **{
        name: quiet_day(name, traffic)
        for name, traffic in (
            ("50 rows/s", Traffic(BUSY)),
            ("50 rows/s, autocorrelated", Traffic(BUSY, AUTOCORRELATION)),
            ("0.2 rows/s", Traffic(QUIET)),
        )
    },
    # Rows that say so little beside each other that an hour of them is few.
    "0.2 rows/s, autocorrelated": quiet_day("0.2 rows/s, autocorrelated", Traffic(QUIET, AUTOCORRELATION)),
    "50 rows/s, one feature 1 sd up": shifted_day("50 rows/s, one feature 1 sd up", Traffic(BUSY, shift=SHIFT)),
    "0.2 rows/s, one feature 1 sd up": shifted_day("0.2 rows/s, one feature 1 sd up", Traffic(QUIET, shift=SHIFT)),
    "counting": counting,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured.",
    )
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be repeated; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (%(default)s)")
    parser.add_argument("--promtool", default="promtool", metavar="PROGRAM", help="%(default)s")
    parser.add_argument("--reports", type=Path, default=ROOT / "reports", help="%(default)s")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md", help="%(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    torch.set_num_threads(1)
    words = list(sys.argv[1:] if arguments is None else arguments)
    return report.measure(
        BENCHMARKS,
        given,
        figures=given.reports / "drift_bench.json",
        order=list(BENCHMARKS),
        marks=MARKS,
        where={**machine(), "PyTorch": importlib.metadata.version("torch"), "load before": f"{os.getloadavg()[0]:.2f}"},
        command=shlex.join(["benchmarks/drift.py", *words]),
    )


if __name__ == "__main__":
    sys.exit(main())
