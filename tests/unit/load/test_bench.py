"""The benchmarks' arithmetic and writing; what they measure needs an appliance."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "appliance.py"
SPECIFICATION = importlib.util.spec_from_file_location("bench_appliance", PATH)
bench = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["bench_appliance"] = bench
SPECIFICATION.loader.exec_module(bench)

RECAP = """
PLAY RECAP *********************************************************************
lab                        : ok=41   changed=0    unreachable=0    failed=0    skipped=3    rescued=0    ignored=0
"""


def row(benchmark="memory", value=1.0, bar=None, figure="x"):
    return bench.Row(benchmark, figure, value, "MiB", bar, "note", "command", "1", "2026-01-31")


def test_changes_are_read_from_the_recap():
    assert bench.changed_in_recap(RECAP) == 0
    second = RECAP.splitlines()[-1].replace("changed=0", "changed=2")
    assert bench.changed_in_recap(RECAP.replace("changed=0", "changed=7") + second) == 9
    assert (
        bench.changed_in_recap("\n\x1b[0;32mlab\x1b[0m : \x1b[0;32mok=4\x1b[0m changed=2 unreachable=0 failed=0") == 2
    )


@pytest.mark.parametrize(
    "output", ["", "ok", RECAP.replace("failed=0", "failed=1"), RECAP.replace("unreachable=0", "unreachable=1")]
)
def test_a_run_without_a_good_recap_is_no_measurement(output):
    with pytest.raises(bench.BenchError):
        bench.changed_in_recap(output)


@pytest.mark.parametrize(
    ("value", "bar", "verdict"), [(0, 0, "PASS"), (1, 0, "MISS"), (45.0, 45, "PASS"), (9, None, "-")]
)
def test_a_bar_is_met_at_or_below_it(value, bar, verdict):
    assert row(value=value, bar=bar).verdict == verdict


def test_memory_is_summed_for_each_colour():
    assert bench.pss_by_colour("blue 10 1000\nblue 11 24\ngreen 12 5\n") == {"blue": [1000, 24], "green": [5]}


def test_new_rows_replace_their_own_benchmark_only():
    merged = bench.merge([row("swaps", 1), row("memory", 2)], [row("memory", 3), row("second-run", 4)])

    assert [(r.benchmark, r.value) for r in merged] == [("second-run", 4), ("swaps", 1), ("memory", 3)]


def test_figures_survive_writing_and_reading(tmp_path):
    path = tmp_path / "reports" / "bench.json"

    bench.write_figures(path, [row(bar=0)], {"CPU": "x"})

    assert json.loads(path.read_text())["rows"][0]["verdict"] == "MISS"
    assert bench.read_rows(path) == [row(bar=0)]
    assert bench.read_rows(tmp_path / "none.json") == []


def test_only_the_marked_section_of_the_document_changes():
    first = bench.with_section("# Benchmarks\n\nBefore.\n", "one")
    second = bench.with_section(first + "\nAfter.\n", "two")

    assert second.startswith("# Benchmarks\n\nBefore.\n")
    assert second.endswith("\nAfter.\n")
    assert "two" in second
    assert "one" not in second
    assert bench.with_section(second, "two") == second
    with pytest.raises(bench.BenchError):
        bench.with_section(bench.END_MARK, "x")


def test_the_table_shows_bars_and_verdicts():
    lines = bench.table([row(value=261.25, bar=260), row(value=3)]).splitlines()

    assert "261.2 MiB" in lines[2] and "<= 260 MiB" in lines[2] and "MISS" in lines[2]
    assert "| 3 MiB" in lines[3]
    assert len({len(line) for line in lines}) == 1


def summary(failed, source="reported"):
    switch = {"source": source}
    return bench.Summary(
        kind="naive", clients=30, think_max_ms=100, seconds=1, cpu_share=0.1, requests=1000, probes=10, failed=failed,
        failures={"reset": failed} if failed else {}, reconnects=0, wrong_colour=0, colours={}, versions={},
        latency_ms={"p50": 4.0, "p99": 9.0}, switch_count=1, first_new_ms={"p50": 5.0, "p99": 8.0}, switches=[switch],
    )  # fmt: skip


def test_swap_rows_put_the_controls_losses_beside_the_swaps():
    rows = {r.figure: r for r in bench.swap_rows(summary(0), summary(12))}

    lost = rows["failed requests over the swaps"]
    assert (lost.value, lost.verdict) == (0, "PASS")
    assert "control lost 12 of 1010" in lost.note
    assert rows["switch to first new answer, p50"].verdict == "PASS"


def test_a_time_counted_from_an_estimated_instant_says_so():
    def note(source):
        return bench.swap_rows(summary(0, source), summary(1))[0].note

    assert "upper bound" in note("begin")
    assert "change time" in note("link")
    assert note("reported") == "30 naive clients, think 0-100 ms"


def test_a_control_without_losses_proves_nothing():
    lost = next(r for r in bench.swap_rows(summary(0), summary(0)) if r.figure == "failed requests over the swaps")

    assert lost.verdict != "PASS"
    assert "proves nothing" in lost.note


def test_losses_in_the_swaps_are_a_miss_whatever_the_control_lost():
    for control in (0, 12):
        rows = bench.swap_rows(summary(1), summary(control))
        assert next(r for r in rows if r.figure == "failed requests over the swaps").verdict == "MISS"


def test_a_benchmark_that_cannot_be_measured_is_not_a_success(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise bench.BenchError("no lab")

    monkeypatch.setattr(bench, "BENCHMARKS", {"memory": broken})
    words = ["--only", "memory", "--reports", str(tmp_path), "--document", str(tmp_path / "benchmarks.md")]

    assert bench.main(words) == 2
    assert "no lab" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
