#!/usr/bin/env python3
"""Measure how far releases that do worse get: a table, `reports/releases_bench.json`, a part of `docs/benchmarks.md`.

Needs an appliance that runs, with a release ready on both colours. Places bundles of its own and leaves them there: the
last line says what is live. Nobody else should deploy or swap meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "load")]

from swap_runs import APPLIANCE, LOCK_WAIT_S, Host  # noqa: E402
from user_traffic import Answer, UserTraffic  # noqa: E402
from worse_releases import ALSO_GOOD, DIFFERING, FAILING, GOOD, NAME, RELEASES, SLOW, write_release  # noqa: E402

from benchmarks import on_appliance  # noqa: E402
from benchmarks.on_appliance import deploy, described, without_rollout  # noqa: E402
from benchmarks.report import BenchError, Row  # noqa: E402

MARKS = ("<!-- releases-bench:begin, written by `make bench-releases` -->", "<!-- releases-bench:end -->")
BACK_BAR_S = 30.0
# "Before a quarter of the users": a canary's steps are 1, 5, 25, 50 and 100.
USERS_BAR = 24.0
_BACK_LIMIT_S = 180.0
_ROLLOUT_LIMIT_S = 1800.0
_FEW = 100
_RECORD_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a release: largest share of the users in percent, seconds until it was over, and in words."""

    percent: float
    seconds: float
    text: str


def measure_failing(given: argparse.Namespace) -> list[Row]:
    """A release that answers 500 to a fifth of its requests and is live at once."""
    return asyncio.run(_measure_failing(given))


async def _measure_failing(given: argparse.Namespace) -> list[Row]:
    host = Host(given.host_command)
    live, idle = await place(host, given, FAILING)
    before = await history(host)
    with UserTraffic(given.appliance_url) as traffic:
        await few_more(traffic)
        async with back_where_lost(host, live):
            done = await host.change("swap")
            while not (back := await is_back(host, live)) and time.monotonic() < done.end + _BACK_LIMIT_S:
                await asyncio.sleep(0.2)
            cause = await cause_since(host, before, ("errors",)) if back else "nothing, until it was sent back"
            if not back:
                await send_back(host, live)
            # What was on its way there has been answered by then.
            await few_more(traffic)
    return [failing_row(traffic.answers, idle, cause)]


def failing_row(answers: Sequence[Answer], bad: str, cause: str) -> Row:
    """For how long clients were sent to the colour `bad`, from their own view."""
    sent = [answer.begin for answer in answers if answer.colour == bad]
    if not sent:
        raise BenchError(f"no client has seen {bad}: nothing is known")
    failed = sum(answer.status != 200 for answer in answers)
    note = f"{failed} of {len(answers)} requests failed; back for: {cause}"
    figure = "a fifth of its requests fail: for how long it was live"
    return Row("failing", figure, max(sent) - min(sent), "s", BACK_BAR_S, note, "sudo appliance swap", "1")


def measure_slow(given: argparse.Namespace) -> list[Row]:
    """A release that needs three times as long for an answer, by canary."""
    outcome = asyncio.run(_canary(given, SLOW, ("p50", "p95", "p99")))
    return [
        users_row(
            "slow", "three times as slow: users that it was given", outcome, "sudo appliance swap --strategy canary"
        )
    ]


def measure_differing(given: argparse.Namespace) -> list[Row]:
    """A release that answers otherwise on a tenth of the inputs, by canary with a shadow before."""
    host = Host(given.host_command)

    async def shadowed() -> Outcome:
        await place(host, given, DIFFERING)
        try:
            await host.run(*APPLIANCE, "shadow", "100", "--json", "--lock-wait", str(LOCK_WAIT_S))
            return await _canary(given, DIFFERING, ("shadow",))
        finally:
            await host.run(*APPLIANCE, "shadow", "0", "--json", "--lock-wait", str(LOCK_WAIT_S))

    command = "sudo appliance shadow 100; sudo appliance swap --strategy canary"
    outcome = asyncio.run(shadowed())
    return [users_row("differing", "other answers on a tenth of the inputs: users that it was given", outcome, command)]


def measure_good(given: argparse.Namespace) -> list[Row]:
    """The control: a release that is as good as the live one goes all the way."""
    live = held(asyncio.run(Host(given.host_command).status()), "live")
    version = GOOD if live == ALSO_GOOD else ALSO_GOOD
    outcome = asyncio.run(_canary(given, version, (), "--steps", "1,5,100"))
    command = "sudo appliance swap --strategy canary --steps 1,5,100"
    row = users_row("good", "as good as the live one: users that it was given", outcome, command)
    row.bar, row.at_least = 100.0, True
    return [row]


async def _canary(given: argparse.Namespace, version: str, causes: Sequence[str], *options: str) -> Outcome:
    """Have a canary of that version judged, under traffic. Where there are `causes`, it goes back for one."""
    host = Host(given.host_command)
    live, idle = await place(host, given, version)
    before = await history(host)
    words = (*APPLIANCE, "swap", "--strategy", "canary", *options, "--json", "--lock-wait", str(LOCK_WAIT_S))
    with UserTraffic(given.appliance_url) as traffic:
        await few_more(traffic)
        async with back_where_lost(host, live):
            done = await host.run(*words, check=False, timeout_s=_ROLLOUT_LIMIT_S)
            said, now_live = done.json()["message"], (await host.status())["live"]
    lost = f"{traffic.failed()} of {len(traffic.answers)} requests failed"
    if now_live == idle:
        return Outcome(100.0, done.end - done.begin, f"{said}; {lost}")
    cause = await cause_since(host, before, causes, said)
    percent = largest_share(newer(await history(host), before))
    return Outcome(percent, done.end - done.begin, f"back for: {cause}; {lost}")


@contextlib.asynccontextmanager
async def back_where_lost(host: Host, live: str) -> AsyncIterator[None]:
    """Send traffic back where nobody is left to see what becomes of a release: an error, or an interrupt."""
    try:
        yield
    except BaseException:
        await send_back(host, live)
        raise


async def send_back(host: Host, live: str) -> None:
    """End the rollout under way, and have that colour live."""
    # Twice, since what was asked for over SSH may begin after the first.
    for _ in range(2):
        await host.change("abort", check=False)
        await asyncio.sleep(1.0)
    if (await host.status())["live"] != live:
        await host.change("rollback", check=False)


async def is_back(host: Host, live: str) -> bool:
    """Whether that colour has all the users."""
    status = await host.status()
    return status["live"] == live and status["split"] == 0


async def few_more(traffic: UserTraffic) -> None:
    """Wait for some more answers. Raises BenchError where they don't come."""
    try:
        await asyncio.to_thread(traffic.more, _FEW)
    except TimeoutError as error:
        raise BenchError(str(error)) from error


def users_row(benchmark: str, figure: str, outcome: Outcome, command: str) -> Row:
    """The largest share of the users that a release was given."""
    note = f"over after {outcome.seconds:.0f} s; {outcome.text}"
    return Row(benchmark, figure, outcome.percent, "%", USERS_BAR, note, command, "1")


async def place(host: Host, given: argparse.Namespace, version: str) -> tuple[str, str]:
    """Have that version on the idle colour and a good one live; return the live and the idle colour.

    Raises BenchError, HostError.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        status = await without_rollout(host)
        if held(status, "live") not in (GOOD, ALSO_GOOD):
            await deploy(given.deploy_command, write_release(Path(folder), GOOD))
            # Slower than what was live, which a bake might find out: ended by without_rollout.
            await host.change("swap")
            status = await without_rollout(host)
        if held(status, "live") == version:
            raise BenchError(f"{NAME} {version} is live already: swap first")
        if held(status, "idle") != version:
            await deploy(given.deploy_command, write_release(Path(folder), version))
            status = await without_rollout(host)
    if held(status, "idle") != version or held(status, "live") not in (GOOD, ALSO_GOOD):
        raise BenchError(f"the deploy went well, but the colours hold {described(status)}")
    return status["live"], status["idle"]


def held(status: dict, role: str) -> str | None:
    """The version that the live or the idle colour has of the benchmark's releases."""
    about = status["colours"][status[role]]
    return about["version"] if about["model"] == NAME else None


async def history(host: Host) -> list[dict]:
    """The latest entries of the audit log, oldest first."""
    return (await host.run(*APPLIANCE, "history", "-n", "50", "--json")).json()["entries"]


def newer(entries: Sequence[dict], before: Sequence[dict]) -> Sequence[dict]:
    """Those entries that came after the last one of an earlier look."""
    return entries[entries.index(before[-1]) + 1 :] if before and before[-1] in entries else entries


def largest_share(entries: Sequence[dict]) -> float:
    """The largest percentage of the users that a canary gave the new colour."""
    found = (
        re.search(r"serves (\d+) % of users", entry["message"]) for entry in entries if entry["command"] == "canary"
    )
    return max((float(match[1]) for match in found if match), default=0.0)


async def cause_since(host: Host, before: Sequence[dict], causes: Sequence[str], said: str = "") -> str:
    """Why traffic went back after `before`; its record is written a moment after the switch.

    Raises BenchError where there is no newer record, as of a canary that was refused, or where there are `causes` and
    it isn't one of them: a release that went back for something else was not found out.
    """
    limit = time.monotonic() + _RECORD_LIMIT_S
    while not (found := [entry for entry in newer(await history(host), before) if entry["command"] == "rollback"]):
        if time.monotonic() > limit:
            raise BenchError(f"no rollback is on record: {said}")
        await asyncio.sleep(0.2)
    if causes and found[-1]["cause"] not in causes:
        raise BenchError(f"it went back for {found[-1]['cause']!r}: {found[-1]['message']}")
    return found[-1]["cause"]


# The good one last: it is live from then on.
BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "failing": measure_failing,
    "slow": measure_slow,
    "differing": measure_differing,
    "good": measure_good,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured, 130 interrupted.",
    )
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be repeated; default: all")
    on_appliance.add_arguments(parser)
    parser.add_argument("--deploy-command", default="ansible-playbook playbooks/deploy.yml", help="%(default)s")
    given = parser.parse_args(arguments)
    on_appliance.check_arguments(parser, given)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    return on_appliance.run(
        BENCHMARKS,
        given,
        figures="releases_bench.json",
        marks=MARKS,
        command=["benchmarks/releases.py", *(sys.argv[1:] if arguments is None else arguments)],
        placed=[(NAME, version) for version in RELEASES],
    )


if __name__ == "__main__":
    sys.exit(main())
