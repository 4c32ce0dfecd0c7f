"""What the benchmarks' programs have in common: running, rows with a bar, and the files that keep them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a failing program prints that says why, whichever prefix its log puts before it.
_REASON = re.compile(r"\b(?:\w+Error|\w+Exception|ERROR): .+")


class BenchError(Exception):
    """A benchmark that could not be measured; the message says why."""


def reason(output: str) -> str:
    """What a failing program says about it, on one short line."""
    found = _REASON.search(output)
    line = found[0] if found else (output.strip().splitlines() or ["no reason given"])[-1]
    return line.strip()[:200]


def run(
    command: Sequence[str], limit_s: float, *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command, which gets `limit_s` seconds.

    The error's message is short and has no paths of this machine, for it may become a row's note; where the command
    failed, the end of what it printed goes to standard error.
    """
    name = " ".join(Path(word).name for word in command[:2])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            timeout=limit_s,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{name} didn't end within {limit_s:g} s") from error
    except OSError as error:
        raise BenchError(f"{name} could not be started: {error.strerror}") from error
    if done.returncode != 0:
        print(done.stdout[-1500:], done.stderr[-1500:], sep="\n", file=sys.stderr, flush=True)
        raise BenchError(f"{name}: exit status {done.returncode}: {reason(done.stderr or done.stdout)}")
    return done.stdout


@dataclass(slots=True)
class Row:
    """One figure. `value` and `bar` are in `unit`; without a bar there's no verdict, without a value the note says why.

    The bar is met at or below it, with `at_least` at or above it. `measured` says by which run and on what.
    """

    benchmark: str
    figure: str
    value: float | None
    unit: str
    bar: float | None
    note: str
    command: str
    runs: str
    date: str = ""
    at_least: bool = False
    measured: str = ""

    @property
    def verdict(self) -> str:
        if self.bar is None or self.value is None:
            return "-"
        met = self.value >= self.bar if self.at_least else self.value <= self.bar
        return "PASS" if met else "MISS"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, which reads well on a terminal too."""
    cells = [("figure", "value", "bar", "", "note", "runs", "date")]
    for row in rows:
        sign = ">=" if row.at_least else "<="
        bar = "-" if row.bar is None else f"{sign} {number(row.bar)} {row.unit}"
        value = "-" if row.value is None else f"{number(row.value)} {row.unit}"
        cells.append((row.figure, value, bar, row.verdict, row.note, row.runs, row.date))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def number(value: float) -> str:
    """At least one decimal, and three digits where the number is small; none for whole numbers."""
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def merge(earlier: Sequence[Row], new: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """New rows in place of the same benchmark's earlier ones; benchmarks that weren't run keep theirs, dated.

    The rows are in the order of `order`; benchmarks that it doesn't name are dropped.
    """
    measured = {row.benchmark for row in new}
    kept = [row for row in earlier if row.benchmark in order and row.benchmark not in measured]
    return sorted([*kept, *new], key=lambda row: order.index(row.benchmark))


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier file of figures; none where there's none or it's of another shape."""
    try:
        entries = json.loads(path.read_text())["rows"]
        return [Row(**{k: v for k, v in entry.items() if k != "verdict"}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_figures(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> None:
    """Write what `read_rows` reads, and what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{**asdict(row), "verdict": row.verdict} for row in rows]
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps({"machine": dict(where), "rows": entries}, indent=2, ensure_ascii=False) + "\n")
    shutil.move(partial, path)


def with_section(text: str, section: str, marks: tuple[str, str]) -> str:
    """A document with the part between the marks replaced, or put at its end where it has no marks yet."""
    begin_mark, end_mark = marks
    block = f"{begin_mark}\n\n{section}\n\n{end_mark}"
    begin, end = text.find(begin_mark), text.find(end_mark)
    if begin < 0 and end < 0:
        return f"{text.rstrip() or '# Benchmarks'}\n\n{block}\n"
    if begin < 0 or end < begin:
        raise BenchError(f"docs/benchmarks.md has one of the marks {marks} only, or in the wrong order")
    return text[:begin] + block + text[end + len(end_mark) :]


def section(rows: Sequence[Row]) -> str:
    """The generated part of the document; where the rows are from several runs, it says which are from which."""
    runs: dict[str, dict[str, None]] = {}
    for row in rows:
        runs.setdefault(row.measured or "an earlier run", {})[row.benchmark] = None
    measured = f"Measured by {next(iter(runs))}."
    if len(runs) > 1:
        measured = "Measured by several runs:\n\n" + "\n".join(f"- {', '.join(runs[run])}: by {run}." for run in runs)
    commands = "\n".join(f"- {name}: `{text}`" for name, text in dict.fromkeys((r.benchmark, r.command) for r in rows))
    return f"{measured}\n\n{table(rows)}\n\nWhat was timed:\n\n{commands}"


def measure(
    benchmarks: Mapping[str, Callable[[argparse.Namespace], list[Row]]],
    given: argparse.Namespace,
    *,
    figures: Path,
    order: Sequence[str],
    marks: tuple[str, str],
    where: Mapping[str, str],
    command: str,
    errors: tuple[type[Exception], ...] = (BenchError,),
) -> int:
    """Run the benchmarks that `given.only` names, else all, and put their rows into both files and on the terminal.

    :param figures: file of figures; `given.document` gets the section between the marks.
    :param order: the rows' benchmarks, in the order of the table.
    :param where: what it's measured on; `command` is the run's own command line.
    :param errors: what a benchmark raises that couldn't be measured.
    :returns: the exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured.
    """
    new: list[Row] = []
    failed = False
    for name in [name for name in benchmarks if name in (given.only or benchmarks)]:
        print(f"measuring {name} …", flush=True)
        try:
            new += benchmarks[name](given)
        except errors as error:
            failed = True
            print(f"{name} could not be measured: {error}", file=sys.stderr, flush=True)
    facts = "; ".join(f"{name}: {value}" for name, value in where.items())
    for row in new:
        row.date = time.strftime("%Y-%m-%d", time.gmtime())
        row.measured = f"`{command}` on: {facts}"
    if new:
        rows = merge(read_rows(figures), new, order)
        write_figures(figures, rows, where)
        text = given.document.read_text() if given.document.exists() else ""
        given.document.write_text(with_section(text, section(rows), marks))
        print(facts)
        print(table(new))
    if failed or any(row.value is None for row in new):
        return 2
    return 1 if any(row.verdict == "MISS" for row in new) else 0


def machine() -> dict[str, str]:
    """What the figures were measured on, for people to read; memory in GiB."""
    processor = next((v for k, v in _pairs("/proc/cpuinfo") if k == "model name"), platform.machine())
    memory_kib = next((int(v.split()[0]) for k, v in _pairs("/proc/meminfo") if k == "MemTotal"), 0)
    debian = Path("/etc/debian_version")
    return {
        "CPU": processor,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "kernel": platform.release(),
        "Debian of the controller": debian.read_text().strip() if debian.exists() else "not Debian",
    }


def _pairs(path: str) -> list[tuple[str, str]]:
    lines = Path(path).read_text().splitlines()
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
