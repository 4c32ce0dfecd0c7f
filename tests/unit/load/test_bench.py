"""The benchmarks' arithmetic and writing; what they measure needs an appliance."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report import merge, read_rows, run, section, table, with_section, write_figures

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


PROGRAMS = sorted(path for path in PATH.parent.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_starts(program):
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


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


def test_monitoring_is_measured_between_two_looks(monkeypatch):
    looks = iter(["prometheus 7 1000 2048\nmtail 8 10 1024\n100\n", "prometheus 7 1100 4096\nmtail 8 30 1024\n100\n"])
    clock = iter([50.0, 90.0])

    class Host:
        def __init__(self, command):
            pass

        async def script(self, text):
            return next(looks)

    monkeypatch.setattr(bench, "Host", Host)
    # The module as the benchmark sees it: asyncio has the real one.
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    cpu, memory = bench.measure_monitoring(bench.parse(["--host-command", "x"]))
    # 120 ticks of 10 ms in 40 s.
    assert (cpu.value, cpu.verdict) == (3.0, "PASS") and "prometheus 2.5 of it" in cpu.note
    assert (memory.value, memory.unit) == (5.0, "MiB")


def test_new_rows_replace_their_own_benchmark_only():
    merged = merge(
        [row("swaps", 1), row("memory", 2)], [row("memory", 3), row("second-run", 4)], list(bench.BENCHMARKS)
    )

    assert [(r.benchmark, r.value) for r in merged] == [("second-run", 4), ("swaps", 1), ("memory", 3)]


def test_figures_survive_writing_and_reading(tmp_path):
    path = tmp_path / "reports" / "bench.json"

    write_figures(path, [row(bar=0)], {"CPU": "x"})

    assert json.loads(path.read_text())["rows"][0]["verdict"] == "MISS"
    assert read_rows(path) == [row(bar=0)]
    assert read_rows(tmp_path / "none.json") == []


def test_only_the_marked_section_of_the_document_changes():
    first = with_section("# Benchmarks\n\nBefore.\n", "one", bench.MARKS)
    second = with_section(first + "\nAfter.\n", "two", bench.MARKS)

    assert second.startswith("# Benchmarks\n\nBefore.\n")
    assert second.endswith("\nAfter.\n")
    assert "two" in second
    assert "one" not in second
    assert with_section(second, "two", bench.MARKS) == second
    with pytest.raises(bench.BenchError):
        with_section(bench.MARKS[1], "x", bench.MARKS)


def test_the_table_shows_bars_and_verdicts():
    lines = table([row(value=261.25, bar=260), row(value=3)]).splitlines()

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


def test_rows_that_were_kept_say_by_which_run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.on_appliance, "host_facts", lambda given: {})
    document = tmp_path / "benchmarks.md"

    def measured(**values):
        measures = {name: lambda given, name=name, value=value: [row(name, value)] for name, value in values.items()}
        monkeypatch.setattr(bench, "BENCHMARKS", {"swaps": None, "memory": None} | measures)
        only = [word for name in values for word in ("--only", name)]
        assert bench.main([*only, "--host-command", "x", "--reports", str(tmp_path), "--document", str(document)]) == 0
        return document.read_text()

    assert "Measured by `benchmarks/appliance.py --only swaps --only memory` on: CPU" in measured(swaps=1, memory=2)
    text = measured(memory=3)
    assert "- swaps: by `benchmarks/appliance.py --only swaps --only memory` on: CPU" in text
    assert "- memory: by `benchmarks/appliance.py --only memory` on: CPU" in text
    assert "Measured by `" not in text


def test_rows_from_before_runs_were_kept_are_of_an_earlier_run():
    text = section([replace(row("swaps"), measured="`make bench`"), row("memory")])
    assert "- memory: by an earlier run." in text


def test_a_program_that_fails_says_why_without_paths(tmp_path, capfd):
    script = tmp_path / "load.py"
    script.write_text("import sys; print('much'); sys.exit('ValueError: too slow')")
    with pytest.raises(bench.BenchError, match=r"^python\S* load.py: exit status 1: ValueError: too slow$"):
        run([sys.executable, str(script)], 20)
    assert "much" in capfd.readouterr().err
    for command, limit, why in (
        (["no-such-program"], 1, "No such file"),
        (["sleep", "9"], 0.1, "didn't end within 0.1 s"),
    ):
        with pytest.raises(bench.BenchError, match=why):
            run(command, limit)


def test_a_clone_that_found_something_here_gets_no_verdict():
    assert bench.provision_row(300.0, [], "make up").verdict == "PASS"
    cached = bench.provision_row(300.0, ["Docker", "the lab's image"], "make up")
    assert cached.verdict == "-"
    assert "not downloaded: Docker, the lab's image" in cached.note


def test_a_benchmark_that_cannot_be_measured_is_not_a_success(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise bench.BenchError("no lab")

    monkeypatch.setattr(bench, "BENCHMARKS", {"memory": broken})
    monkeypatch.setattr(bench.on_appliance, "host_facts", lambda given: {})
    words = ["--reports", str(tmp_path), "--document", str(tmp_path / "benchmarks.md")]

    assert bench.main(["--only", "memory", "--host-command", "x", *words]) == 2
    assert "no lab" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
