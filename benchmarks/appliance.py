#!/usr/bin/env python3
"""Measure the appliance against its bars: a table, `reports/bench.json`, and the marked part of `docs/benchmarks.md`.

Everything but `provision` needs an appliance that runs, with a release ready on both colours.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "load")]

from swap_client import DEFAULT_BODY, Settings, Summary  # noqa: E402
from swap_runs import (  # noqa: E402
    RELOAD_COMMAND,
    Host,
    HostError,
    expected_seconds,
    run_reloads,
    run_swaps,
    settled_status,
    write_report,
)

from benchmarks import on_appliance, report  # noqa: E402
from benchmarks.report import BenchError, Row, machine  # noqa: E402
from lab import console, image  # noqa: E402

MARKS = ("<!-- bench:begin, written by `make bench` -->", "<!-- bench:end -->")
PAUSE_S = (0.2, 1.0)
PROVISION_BAR_S = 360.0
SECOND_RUN_BAR_S = 45.0
SWITCH_BAR_MS = 50.0
MEMORY_BAR_MIB = 260.0
MEMORY_WORKERS = 2
MONITORING_CPU_BAR_PERCENT = 3.0
MONITORING_MEMORY_BAR_MIB = 250.0
MONITORING_UNITS = (
    *("prometheus", "prometheus-node-exporter", "prometheus-nginx-exporter", "prometheus-alertmanager"),
    *("prometheus-blackbox-exporter", "mtail"),
)
# So that a clean clone doesn't meet the lab that is there already: other names, other ports. Nor pip's cache.
CLONE_ENVIRONMENT = {
    "PIP_NO_CACHE_DIR": "1",
    "LAB_NAME": "appliance-bench",
    "LAB_EDGE_PORT": "18080",
    "LAB_PROMETHEUS_PORT": "19090",
    "LAB_GRAFANA_PORT": "13000",
    "LAB_SSH_PORT": "12222",
}


def measure_provision(given: argparse.Namespace) -> list[Row]:
    """Seconds from `git clone` of the last commit to the first 200 of `POST /predict`, on a lab of its own.

    The bar is for a run that downloads everything; one that finds something here already gets no verdict.
    """
    environment = {**os.environ, **CLONE_ENVIRONMENT}
    url = f"http://127.0.0.1:{environment['LAB_EDGE_PORT']}/predict"
    if first_status(url) is not None:
        raise BenchError(f"{url} answers already: something else uses that port")
    there = found_here(environment.get("LAB_SUITE") or "trixie")
    with tempfile.TemporaryDirectory(prefix="appliance-bench-", dir="/var/tmp") as folder:
        clone = Path(folder) / "clone"
        begin = time.monotonic()
        report.run(["git", "clone", "--quiet", str(ROOT), str(clone)], 300)
        try:
            command = shlex.split(given.provision_command)
            report.run(command, given.provision_limit, folder=clone, environment=environment)
            while (status := first_status(url)) != 200:
                if time.monotonic() - begin > given.provision_limit:
                    raise BenchError(f"{url} answers {status}, not 200, after {given.provision_limit:g} s")
                time.sleep(0.2)
            seconds = time.monotonic() - begin
        finally:
            report.run(shlex.split(given.teardown_command), 600, folder=clone, environment=environment)
    return [provision_row(seconds, there, given.provision_command)]


def provision_row(seconds: float, there: Sequence[str], command: str) -> Row:
    """The row of a provisioning run that found what `there` names instead of downloading it."""
    note = f"last commit; not downloaded: {', '.join(there)}" if there else "last commit; everything downloaded"
    bar = None if there else PROVISION_BAR_S
    command = f"git clone … && {command}"
    return Row("provision", "clean clone to first prediction", seconds, "s", bar, note, command, "1")


def found_here(suite: str) -> list[str]:
    """What a clean clone finds on this machine, and so doesn't download."""
    found = {"Docker": ["dockerd", "--version"], "the lab's image": ["docker", "image", "inspect", image.tag(suite)]}
    return [name for name, command in found.items() if console.succeeds(command)]


def measure_second_run(given: argparse.Namespace) -> list[Row]:
    """Seconds of a provisioning run that has nothing to change, and the number of changes that its recap counts."""
    seconds, changes = [], []
    for _ in range(given.runs):
        begin = time.monotonic()
        output = report.run(shlex.split(given.site_command), 1800, folder=ROOT)
        seconds.append(time.monotonic() - begin)
        changes.append(changed_in_recap(output))
    middle = statistics.median(seconds)
    spread = f"{min(seconds):.1f}-{max(seconds):.1f} s"
    runs = str(given.runs)
    return [
        Row("second-run", "second run of site.yml", middle, "s", SECOND_RUN_BAR_S, spread, given.site_command, runs),
        Row("second-run", "changed in its recap", max(changes), "tasks", 0, "worst run", given.site_command, runs),
    ]


def measure_swaps(given: argparse.Namespace) -> list[Row]:
    """Time from the switch to the first answer of the new colour, and requests lost, with the control beside them."""
    host, settings = Host(given.host_command), load_settings(given)
    summary = asyncio.run(run_swaps(host, settings, given.swaps, PAUSE_S))
    write_report(given.reports / "bench_swaps.json", "swaps under load", summary, url=given.appliance_url)
    control = asyncio.run(run_reloads(host, settings, given.swaps, PAUSE_S, command=given.reload_command))
    write_report(given.reports / "bench_reloads.json", "reloads under load", control, url=given.appliance_url)
    return swap_rows(summary, control)


def swap_rows(summary: Summary, control: Summary) -> list[Row]:
    """Rows of a run of swaps and of its negative control."""
    command = "sudo appliance swap"
    runs = f"{summary.switch_count} swaps"
    load = f"{summary.clients} {summary.kind} clients, think 0-{summary.think_max_ms:g} ms"
    switch_note = load
    if unknown := sum(switch["source"] == "begin" for switch in summary.switches):
        switch_note = f"upper bound: {unknown} instants unknown, counted from the command's start"
    elif any(switch["source"] == "link" for switch in summary.switches):
        switch_note = f"{load}; instants from the link's change time, up to 4 ms early"
    if summary.first_new_ms["p50"] is None:
        raise BenchError("no answer by a new colour was seen")
    lost_note = f"of {summary.requests + summary.probes}; control lost {control.lost()} of "
    lost_note += f"{control.requests + control.probes} in as many reloads"
    lost_bar: float | None = 0
    if control.lost() == 0 and summary.failed == 0:
        # A client that doesn't see a reload's losses wouldn't see a swap's either: a figure, but no verdict.
        lost_bar = None
        lost_note += ": proves nothing"
    rows = [
        ("switch to first new answer, p50", summary.first_new_ms["p50"], "ms", SWITCH_BAR_MS, switch_note),
        ("switch to first new answer, p99", summary.first_new_ms["p99"], "ms", None, switch_note),
        ("failed requests over the swaps", summary.failed, "requests", lost_bar, lost_note),
        ("answered by the old colour after a swap", summary.wrong_colour, "requests", 0, load),
        ("latency across the swaps, p50", summary.latency_ms["p50"], "ms", None, load),
        ("latency across the swaps, p99", summary.latency_ms["p99"], "ms", None, load),
        ("lost in the control (reloads)", control.lost(), "requests", None, "must exceed 0"),
    ]
    return [Row("swaps", *row, command, runs) for row in rows]


PSS_SCRIPT = r"""
set -eu
for id in $(docker ps -q); do
    colour=$(docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$id" | sed -n 's/^MODEL_COLOUR=//p')
    [ -n "$colour" ] || continue
    for pid in $(docker top "$id" -eo pid | tail -n +2); do
        pss=$(sed -n 's/^Pss: *\([0-9]*\) kB$/\1/p' "/proc/$pid/smaps_rollup")
        echo "$colour $pid ${pss:-0}"
    done
done
"""


def measure_memory(given: argparse.Namespace) -> list[Row]:
    """Memory of each colour: PSS, so that pages the workers share are counted once, over the container's processes."""
    host = Host(given.host_command)
    status = asyncio.run(settled_status(host))
    by_colour = pss_by_colour(asyncio.run(host.script(PSS_SCRIPT)))
    rows = []
    for colour in (status["live"], status["idle"]):
        if colour not in by_colour:
            raise BenchError(f"no running container has MODEL_COLOUR={colour} in its environment")
        workers = ((status["colours"].get(colour) or {}).get("workers") or {}).get("ready")
        role = "live" if colour == status["live"] else "idle"
        mib, processes = sum(by_colour[colour]) / 1024, len(by_colour[colour])
        # The bar was set for two workers: another number is a figure, not a verdict.
        bar = MEMORY_BAR_MIB if workers in (None, MEMORY_WORKERS) else None
        note = f"{processes} processes, {workers if workers is not None else 'unknown number of'} workers"
        rows.append(Row("memory", f"memory of {colour} ({role})", mib, "MiB", bar, note, "smaps_rollup, Pss", "1"))
    return rows


def pss_by_colour(output: str) -> dict[str, list[int]]:
    """KiB of PSS for each process of each colour, from lines `COLOUR PID KIB`."""
    found: dict[str, list[int]] = {}
    for line in output.splitlines():
        colour, _, kib = line.split()
        found.setdefault(colour, []).append(int(kib))
    return found


# Each unit is one process. After the name in brackets, fields 12 and 13 of /proc/PID/stat are its user and system time,
# 14 and 15 those of its children that have ended.
MONITORING_SCRIPT = f"""
for unit in {" ".join(MONITORING_UNITS)}; do
    pid=$(systemctl show --property=MainPID --value "$unit")
    [ "$pid" -gt 0 ] || {{ echo "$unit doesn't run" >&2; exit 1; }}
    ticks=$(sed 's/.*) //' "/proc/$pid/stat" | awk '{{ print $12 + $13 + $14 + $15 }}')
    pss=$(sed -n 's/^Pss: *\\([0-9]*\\) kB$/\\1/p' "/proc/$pid/smaps_rollup")
    echo "$unit $pid $ticks $pss"
done
getconf CLK_TCK
"""


def measure_monitoring(given: argparse.Namespace) -> list[Row]:
    """What monitoring takes of a host at rest: its share of one core over a while, and its memory (PSS) at the end."""
    host = Host(given.host_command)

    def look() -> tuple[dict[str, tuple[str, int, int]], int, float]:
        *lines, hertz = asyncio.run(host.script(MONITORING_SCRIPT)).splitlines()
        return monitoring_processes(lines), int(hertz), time.monotonic()

    first, hertz, began = look()
    time.sleep(given.rest_seconds)
    last, _, ended = look()
    if {unit: row[0] for unit, row in first.items()} != {unit: row[0] for unit, row in last.items()}:
        raise BenchError("a unit of monitoring was restarted while it was measured")
    percent = {unit: 100 * (last[unit][1] - first[unit][1]) / hertz / (ended - began) for unit in last}
    mib = {unit: row[2] / 1024 for unit, row in last.items()}
    command, runs = f"/proc/PID/stat and smaps_rollup of {', '.join(MONITORING_UNITS)}", f"{ended - began:.0f} s"

    def row(figure: str, values: dict[str, float], unit: str, bar: float) -> Row:
        most = max(values, key=lambda name: values[name])
        note = f"without Grafana; {most} {values[most]:.1f} of it"
        return Row("monitoring", figure, sum(values.values()), unit, bar, note, command, runs)

    return [
        row("monitoring at rest, of one core", percent, "%", MONITORING_CPU_BAR_PERCENT),
        row("memory of monitoring", mib, "MiB", MONITORING_MEMORY_BAR_MIB),
    ]


def monitoring_processes(lines: Sequence[str]) -> dict[str, tuple[str, int, int]]:
    """Process id, clock ticks and KiB of PSS of each unit, from lines `UNIT PID TICKS KIB`."""
    rows = (line.split() for line in lines)
    return {unit: (pid, int(ticks), int(kib)) for unit, pid, ticks, kib in rows}


BENCHMARKS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "provision": measure_provision,
    "second-run": measure_second_run,
    "swaps": measure_swaps,
    "memory": measure_memory,
    "monitoring": measure_monitoring,
}


def changed_in_recap(output: str) -> int:
    """The sum of `changed=` over the hosts of an Ansible recap; an error where a host failed or there's no recap."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    recap = re.findall(r"^\S+\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", plain, re.MULTILINE)
    if not recap:
        raise BenchError(f"no recap in the playbook's output: {plain[-500:]!r}")
    if any(int(unreachable) or int(failed) for _, unreachable, failed in recap):
        raise BenchError(f"the playbook failed: {plain[-500:]!r}")
    return sum(int(changed) for changed, _, _ in recap)


def first_status(url: str) -> int | None:
    """Status of one `POST /predict`, or None where nobody answers within 5 s."""
    request = urllib.request.Request(url, DEFAULT_BODY, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def load_settings(given: argparse.Namespace) -> Settings:
    return Settings(
        url=given.appliance_url,
        clients=given.clients,
        think_max_s=given.think_max_ms / 1000,
        max_duration_s=expected_seconds(given.swaps, PAUSE_S),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured.",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(BENCHMARKS),
        help="may be repeated; default: all. provision builds everything again, in a clean clone beside the lab",
    )
    on_appliance.add_arguments(parser)
    parser.add_argument("--swaps", type=int, default=20, help="swaps, and reloads in the control (%(default)s)")
    parser.add_argument("--clients", type=int, default=30, help="clients under the swaps (%(default)s)")
    parser.add_argument("--think-max-ms", type=float, default=100, help="their longest pause in ms (%(default)s)")
    parser.add_argument(
        "--reload-command",
        default=os.environ.get("APPLIANCE_RELOAD_COMMAND", RELOAD_COMMAND),
        help="%(default)s",
    )
    parser.add_argument("--rest-seconds", type=float, default=120, help="of monitoring at rest (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of second-run (%(default)s)")
    parser.add_argument("--site-command", default="ansible-playbook playbooks/site.yml", help="%(default)s")
    parser.add_argument("--provision-command", default="make up", help="run in the clean clone (%(default)s)")
    parser.add_argument("--teardown-command", default="make down", help="run in it afterwards (%(default)s)")
    parser.add_argument("--provision-limit", type=float, default=1800, help="seconds (%(default)s)")
    given = parser.parse_args(arguments)
    # A clean clone's provisioning needs none.
    on_appliance.check_arguments(parser, given, needs_host=given.only != ["provision"])
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    only = (part for name in given.only or () for part in ("--only", name))
    return report.measure(
        BENCHMARKS,
        given,
        figures=given.reports / "bench.json",
        order=list(BENCHMARKS),
        marks=MARKS,
        where={**machine(), **on_appliance.host_facts(given)},
        command=shlex.join(["benchmarks/appliance.py", *only]),
        errors=(BenchError, HostError),
    )


if __name__ == "__main__":
    sys.exit(main())
