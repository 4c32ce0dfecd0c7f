#!/usr/bin/env python3
"""Measure swaps and rollbacks under mixed load: a table, `reports/swaps_bench.json`, a part of `docs/benchmarks.md`.

Needs an appliance that runs, with a release ready on both colours, and wrk and ab. Places a bundle of its own on both
colours, one version on each, and leaves it there: the last lines say what is live. Nobody else should swap meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "load")]

from mixed_bundles import FACTORS, NAME, QUICK_PATH, SLEEPER_PATH, write_bundle  # noqa: E402
from mixed_load import MARGIN_S, MixedLoad, Tally, run_mixed_reloads, run_mixed_swaps  # noqa: E402
from swap_client import DEFAULT_BODY, Settings  # noqa: E402
from swap_runs import LOCK_WAIT_S, RELOAD_COMMAND, Host, write_report  # noqa: E402

from benchmarks import on_appliance, report  # noqa: E402
from benchmarks.generators import Body, ab, require, wrk  # noqa: E402
from benchmarks.on_appliance import deploy, described, without_rollout  # noqa: E402
from benchmarks.report import BenchError, Row  # noqa: E402
from benchmarks.servers import post  # noqa: E402

MARKS = ("<!-- swaps-bench:begin, written by `make bench-swaps` -->", "<!-- swaps-bench:end -->")
FIRST_ANSWER_BARS_MS = {"p50": 10.0, "p99": 50.0}
HOST_ROLLBACKS, HOST_ROLLBACK_BAR_S = 10, 0.1
PLAYBOOK_ROLLBACKS, PLAYBOOK_ROLLBACK_BAR_S = 5, 5.0
SLEEP_S = 2.0
THINKING, SLEEPING = "keep-alive, thinking", f"{SLEEP_S:g} s requests"
# JSON with much white space: what is large is the way there, not the work on it. The limit is 8 MiB.
LARGE_BODY = DEFAULT_BODY[:-1] + b" " * 8_000_000 + b"}"
# Sleepers and large bodies stay well below one request in a hundred: by the 99th percentile a bake judges a release.
CLIENTS = {
    THINKING: Settings(clients=30, think_max_s=0.2),
    "new connections": Settings(kind="closes", clients=8, think_max_s=0.2),
    "large bodies": Settings(body=LARGE_BODY, clients=2, think_max_s=6.0),
    SLEEPING: Settings(path=SLEEPER_PATH, body=json.dumps({"data": [SLEEP_S]}).encode(), clients=2, think_max_s=1.0),
}
# Without pauses, but few: the two cores are also the appliance's.
WRK_CONNECTIONS, WRK_SECONDS = 2, 2.0
AB_CONNECTIONS, AB_REQUESTS = 2, 500
PAUSE_S = 2.0
_TIMEOUT_S = 30.0

# Printed by the host's own Python, so that nothing of SSH is in the times.
ROLLBACKS = """
import json, subprocess, time
for _ in range({count}):
    time.sleep(0.2)
    started = time.perf_counter()
    done = subprocess.run(["appliance", "rollback", "--json", "--lock-wait", "{wait}"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    print(json.dumps({{"seconds": seconds, "status": done.returncode, "said": done.stdout + done.stderr}}))
"""


def measure_swaps(given: argparse.Namespace) -> list[Row]:
    """Requests lost or answered wrongly over many swaps, and in the control with reloads in their place."""
    for tool in ("wrk", "ab"):
        require(tool)
    return asyncio.run(_measure_swaps(given))


async def _measure_swaps(given: argparse.Namespace) -> list[Row]:
    host, url = Host(given.host_command), given.appliance_url
    await place(host, given.deploy_command)
    check_paths(url)
    print(f"  {given.swaps} swaps in {given.seconds:g} s under load …", flush=True)
    run = await run_mixed_swaps(host, mixed_load(url, given.seconds), given.swaps, given.seconds)
    write_report(given.reports / "mixed_swaps.json", "swaps under mixed load", run, url=url)
    reloads = max(1, round(given.swaps * given.control_seconds / given.seconds))
    print(f"  the control: {reloads} reloads in {given.control_seconds:g} s under the same load …", flush=True)
    load = mixed_load(url, given.control_seconds)
    control = await run_mixed_reloads(host, load, reloads, given.control_seconds, given.reload_command)
    write_report(given.reports / "mixed_reloads.json", "reloads under mixed load", control, url=url)
    return swap_rows(run.as_dict(), control.as_dict(), given.swaps)


async def place(host: Host, deploy_command: str) -> None:
    """Have the two versions of the benchmark's bundle on the two colours, whichever is live.

    Raises BenchError, HostError.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        for _ in FACTORS:
            status = await without_rollout(host)
            held = held_versions(status)
            if len(set(held.values())) == len(FACTORS):
                return
            live = status["live"]
            version = next(version for version in FACTORS if version != held.get(live))
            await deploy(deploy_command, write_bundle(Path(folder), version))
            if live not in held:
                await host.change("swap")
    status = await without_rollout(host)
    if len(set(held_versions(status).values())) < len(FACTORS):
        raise BenchError(f"the deploys went well, but the colours hold {described(status)}")


def held_versions(status: Mapping) -> dict[str, str]:
    """What each colour holds of the benchmark's bundle: version by colour."""
    colours = status["colours"].items()
    return {name: held["version"] for name, held in colours if held["model"] == NAME and held["version"] in FACTORS}


def check_paths(url: str) -> None:
    """Raise BenchError unless each kind of request is answered well when nothing else is going on."""
    for kind, settings in CLIENTS.items():
        try:
            status, answer, _ = post(f"{url}{settings.path}", Body(settings.body), _TIMEOUT_S)
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"{url}{settings.path} doesn't answer ({kind}): {error}") from error
        if status != 200:
            raise BenchError(f"{url}{settings.path} answers {status} ({kind}): {answer[:200]!r}")


def mixed_load(url: str, seconds: float) -> MixedLoad:
    """All kinds of clients, and wrk and ab in turns; it ends by itself a while after `seconds`."""
    limit = 2 * seconds + 300
    settings = {
        kind: replace(each, url=url, timeout_s=_TIMEOUT_S, max_duration_s=limit) for kind, each in CLIENTS.items()
    }
    return MixedLoad(settings, tools(url), PAUSE_S)


def tools(url: str) -> dict[str, Callable[[], Tally]]:
    """One short run of each tool, by name."""
    body = Body(DEFAULT_BODY)

    def one_wrk() -> Tally:
        found = wrk(f"{url}{QUICK_PATH}", body, WRK_CONNECTIONS, WRK_SECONDS)
        failures = Counter({"status": found.refused, "connection": found.broken})
        requests = found.answered + found.refused + found.broken
        return Tally(1, requests, failures.total(), +failures)

    def one_ab() -> Tally:
        # -r: a connection that breaks is counted, and doesn't end the run.
        found = ab(f"{url}{QUICK_PATH}", body, AB_REQUESTS, AB_CONNECTIONS, "-k", "-r")
        missing = max(0, AB_REQUESTS - found.requests)
        failures = Counter({"status or connection": found.failed, "never answered": missing})
        return Tally(1, AB_REQUESTS, failures.total(), +failures)

    return {"wrk": _counted(one_wrk), "ab -k": _counted(one_ab)}


def _counted(tool: Callable[[], Tally]) -> Callable[[], Tally]:
    """The same, but a tool that fails as a whole is a failed request as well."""

    def count() -> Tally:
        try:
            return tool()
        except BenchError as error:
            return Tally(1, 1, 1, Counter({str(error): 1}))

    return count


def swap_rows(run: Mapping, control: Mapping, wanted: int) -> list[Row]:
    """Rows of a run of swaps and of its negative control, from their figures."""
    rows: list[Row] = []

    def add(figure: str, value: float | None, unit: str, bar: float | None, note: str, at_least: bool = False) -> None:
        command, runs = "sudo appliance swap --json, over SSH", f"{run['made']} swaps"
        rows.append(Row("swaps", figure, value, unit, bar, note, command, runs, at_least=at_least))

    clients = ", ".join(f"{figures['clients']} {kind}" for kind, figures in run["kinds"].items())
    load = f"in {run['seconds']:.0f} s; clients: {clients}; {' and '.join(run['tools'])} in turns"
    add("swaps under mixed load", run["made"], "swaps", wanted, load + _stopped(run), at_least=True)
    for name, figures in _all_kinds(run).items():
        add(f"failed: {name}", figures["failed"], "requests", 0, _of(figures))
    answers = f"of {sum(figures['requests'] + figures['probes'] for figures in run['kinds'].values())}"
    latest = run["wrong_colour_latest_ms"]
    late = "" if latest is None else f"; the latest {latest:g} ms after it"
    add("sent after a switch, answered by the old colour", run["wrong_colour"], "requests", 0, answers + late)
    add("answered in a version that isn't the colour's", run["wrong_version"], "requests", 0, answers)
    crossed, well = run["crossing"][SLEEPING]
    # Where none was under way at a switch, nothing is known.
    bar = 0 if crossed else None
    note = f"of {crossed}, sent {MARGIN_S:g} s before it or earlier"
    add(f"{SLEEPING} across a switch, not answered well by the old colour", crossed - well, "requests", bar, note)
    note = run["unasked"][-1][:200] if run["unasked"] else "by a bake's watch, for example"
    add("switches that nobody asked for", len(run["unasked"]), "switches", 0, note)
    for where, key in (("by the engine", "engine_ms"), ("by a client without pauses", "first_new_ms")):
        for share, bar in FIRST_ANSWER_BARS_MS.items():
            note = f"worst {run[key]['max']} ms"
            add(f"switch to first new answer, {where}, {share}", run[key][share], "ms", bar, note)
    for share in ("p50", "p99"):
        add(f"latency, {THINKING}, {share}", run["kinds"][THINKING]["latency_ms"][share], "ms", None, "")
    lost = {name: figures["failed"] for name, figures in _all_kinds(control).items()}
    note = f"{control['made']} reloads of nginx in {control['seconds']:.0f} s under the same load: "
    note += ", ".join(f"{name} {count}" for name, count in lost.items() if count) or "none"
    add("failed in the control", sum(lost.values()), "requests", 1, note + _stopped(control), at_least=True)
    return rows


def _all_kinds(run: Mapping) -> Mapping[str, Mapping]:
    return run["kinds"] | run["tools"]


def _stopped(run: Mapping) -> str:
    return f"; stopped: {run['stopped'][:300]}" if run["stopped"] else ""


def _of(figures: Mapping) -> str:
    note = f"of {figures['requests'] + figures.get('probes', 0)}"
    note += f", {figures['probes']} of them without pauses" if figures.get("probes") else ""
    note += f" in {figures['runs']} runs" if "runs" in figures else ""
    return note + "".join(f"; {reason} {count}" for reason, count in figures["failures"].items())


def measure_rollback(given: argparse.Namespace) -> list[Row]:
    """Seconds that the host's own command takes, and the playbook on the controller; without load."""
    host = Host(given.host_command)
    asyncio.run(_ensure_previous(host))
    script = ROLLBACKS.format(count=HOST_ROLLBACKS, wait=LOCK_WAIT_S)
    done = asyncio.run(host.run("sudo", "python3", "-", stdin=script))
    on_host = rollback_seconds(done.stdout)
    from_controller = []
    for _ in range(PLAYBOOK_ROLLBACKS):
        started = time.perf_counter()
        report.run(shlex.split(given.rollback_command), 120, folder=ROOT)
        from_controller.append(time.perf_counter() - started)
    return [
        _rollback_row("rollback on the host, median", on_host, HOST_ROLLBACK_BAR_S, "appliance rollback --json"),
        _rollback_row(
            "rollback from the controller, median", from_controller, PLAYBOOK_ROLLBACK_BAR_S, given.rollback_command
        ),
    ]


async def _ensure_previous(host: Host) -> None:
    """Have a colour to go back to, and no rollout that a rollback would end."""
    if not (await without_rollout(host))["previous"]:
        await host.change("swap")
        await without_rollout(host)


def rollback_seconds(output: str) -> list[float]:
    """The times from what the host's script printed. Raises BenchError where a rollback failed."""
    found = [json.loads(line) for line in output.splitlines()]
    for one in found:
        if one["status"] != 0:
            raise BenchError(f"appliance rollback ended with exit status {one['status']}: {one['said'].strip()[-300:]}")
    return [one["seconds"] for one in found]


def _rollback_row(figure: str, seconds: Sequence[float], bar: float, command: str) -> Row:
    note = f"{min(seconds):.3f}-{max(seconds):.3f} s, without load"
    return Row("rollback", figure, statistics.median(seconds), "s", bar, note, command, str(len(seconds)))


BENCHMARKS = {"swaps": measure_swaps, "rollback": measure_rollback}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured, 130 interrupted.",
    )
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be repeated; default: all")
    parser.add_argument("--swaps", type=int, default=200, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=600, help="that they are spread over (%(default)s)")
    parser.add_argument(
        "--control-seconds", type=float, default=60, help="of reloads in as quick succession (%(default)s)"
    )
    on_appliance.add_arguments(parser)
    parser.add_argument(
        "--reload-command", default=os.environ.get("APPLIANCE_RELOAD_COMMAND", RELOAD_COMMAND), help="%(default)s"
    )
    parser.add_argument("--deploy-command", default="ansible-playbook playbooks/deploy.yml", help="%(default)s")
    parser.add_argument("--rollback-command", default="ansible-playbook playbooks/rollback.yml", help="%(default)s")
    given = parser.parse_args(arguments)
    if given.swaps < 1 or given.seconds <= 0 or given.control_seconds <= 0:
        parser.error("--swaps must be at least 1, --seconds and --control-seconds more than 0")
    on_appliance.check_arguments(parser, given)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    return on_appliance.run(
        BENCHMARKS,
        given,
        figures="swaps_bench.json",
        marks=MARKS,
        command=["benchmarks/swaps.py", *(sys.argv[1:] if arguments is None else arguments)],
        placed=[(NAME, version) for version in FACTORS],
    )


if __name__ == "__main__":
    sys.exit(main())
