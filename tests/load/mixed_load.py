"""Clients of several kinds at the same time, while colours are swapped, or the edge is reloaded, at a steady pace."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from swap_client import (
    PROBE,
    Record,
    Settings,
    SwapLoad,
    Switch,
    describe_switches,
    percentiles_ms,
    summarise,
    wrong_colour,
)
from swap_runs import APPLIANCE, Host, HostError, reload_once, settled_status, swap_once

# The edge chooses the colour when it has read a request's head: what was sent so shortly before may go either way.
MARGIN_S = 0.1
_TELL_EVERY_S = 15.0
# Of wrong answers, in reports.
_SHOWN = 20
# What `summarise` says of one kind of clients; the rest is about all of them.
_OF_A_KIND = ("clients", "think_max_ms", "requests", "probes", "failed", "failures", "reconnects")
_OF_A_KIND += ("colours", "versions", "latency_ms")


@dataclass
class Tally:
    """What a tool that runs for a moment and then counts has counted: requests, and those without a good answer."""

    runs: int = 0
    requests: int = 0
    failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count another run."""
        self.runs += other.runs
        self.requests += other.requests
        self.failed += other.failed
        self.failures += other.failures


class MixedLoad:
    """Clients by kind, and tools that take turns with pauses of `pause_s` seconds, as an asynchronous context.

    `settings` are those of each kind's clients; the probe that watches switches is the first kind's. A tool blocks for
    some seconds. All of it ends with the context.
    """

    def __init__(
        self, settings: Mapping[str, Settings], tools: Mapping[str, Callable[[], Tally]], pause_s: float
    ) -> None:
        self.loads = {kind: SwapLoad(each) for kind, each in settings.items()}
        self.probed = next(iter(self.loads.values()))
        self.tallies = {tool: Tally() for tool in tools}
        self._tools = tools
        self._pause_s = pause_s
        self._over = asyncio.Event()

    @property
    def requests(self) -> int:
        """Requests so far, of all clients and tools."""
        return sum(len(load.records) for load in self.loads.values()) + sum(t.requests for t in self.tallies.values())

    @property
    def failed(self) -> int:
        """Those of them without a good answer."""
        return sum(each.failed for each in (*self.loads.values(), *self.tallies.values()))

    async def __aenter__(self) -> MixedLoad:
        async with contextlib.AsyncExitStack() as stack:
            # A look at all the records would stop every client for some hundredths of a second.
            gc.disable()
            stack.callback(gc.enable)
            for load in self.loads.values():
                await stack.enter_async_context(load)
            stack.push_async_callback(self._end, asyncio.create_task(self._use_tools()))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.__aexit__(*error)

    async def _end(self, tools: asyncio.Task[None]) -> None:
        self._over.set()
        await tools

    async def _use_tools(self) -> None:
        while self._tools:
            for name, tool in self._tools.items():
                self.tallies[name].add(await asyncio.to_thread(tool))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), self._pause_s)
                    return


@dataclass
class Run:
    """What happened under a mixed load; `seconds` is how long it was on.

    `made`: swaps or reloads; `stopped`: why there were fewer than wanted; `unasked`: what the engine says of switches
    that somebody else made. Where swaps were made, `colours` are the live and the idle one of the beginning, and
    `versions` what each holds.
    """

    load: MixedLoad
    colours: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    made: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    unasked: list[str] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)

    @property
    def live(self) -> str:
        """The colour that is live, as far as this run knows."""
        return self.switches[-1].to if self.switches else self.colours[0]

    @property
    def idle(self) -> str:
        """The other one."""
        return next(colour for colour in self.colours if colour != self.live)

    def add_unasked(self, until: float, why: str) -> None:
        """Somebody else switched at some time between the last switch and `until`, in monotonic seconds."""
        since = self.switches[-1].instant if self.switches else -math.inf
        self.switches.append(Switch(self.idle, since, until, until, "unasked"))
        self.unasked.append(why)

    def wrong_colour(self) -> list[Record]:
        """Good answers by the colour of before, to requests that were sent after the instant of a switch."""
        exact = [replace(s, done=s.instant) if s.source == "reported" else s for s in self.switches]
        return wrong_colour(self._records(), exact, self.colours[0])

    def wrong_version(self) -> list[Record]:
        """Good answers whose version isn't the one that their colour holds."""
        return [r for r in self._records() if r.failure is None and r.version != self.versions.get(str(r.colour))]

    def _records(self) -> list[Record]:
        return [record for load in self.load.loads.values() for record in load.records]

    def as_dict(self) -> dict:
        """Figures that JSON can hold; names that end in `_ms` are milliseconds."""
        figures = {
            "made": self.made,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            "unasked": self.unasked,
            "cpu_share": round(self.load.probed.cpu_share, 3),
            "kinds": {kind: _of_a_kind(load) for kind, load in self.load.loads.items()},
            "tools": {tool: vars(tally) for tool, tally in self.load.tallies.items()},
        }
        return figures | self._of_switches() if self.colours else figures

    def _of_switches(self) -> dict:
        probes = [record for record in self.load.probed.records if record.kind == PROBE]
        seen = describe_switches(probes, self.switches, self.colours[0])
        seen = [switch for switch in seen if switch["source"] != "unasked"]
        wrong = self.wrong_colour()
        instants = [switch.instant for switch in self.switches]
        late = [record.start - instants[max(0, bisect_right(instants, record.start) - 1)] for record in wrong]
        return {
            "wrong_colour": len(wrong),
            "wrong_colour_latest_ms": round(max(late) * 1000, 3) if late else None,
            "wrong_colour_first": [asdict(record) for record in wrong[:_SHOWN]],
            "wrong_version": len(self.wrong_version()),
            "crossing": {
                kind: crossing(load.records, self.switches, self.colours[0]) for kind, load in self.load.loads.items()
            },
            "first_new_ms": _percentiles(switch["first_new_ms"] for switch in seen),
            "engine_ms": _percentiles(switch["reported_ms"] for switch in seen),
            "switches": seen,
        }


def _of_a_kind(load: SwapLoad) -> dict:
    figures = summarise(load).as_dict()
    return {name: figures[name] for name in _OF_A_KIND}


def _percentiles(milliseconds: Iterable[float | None]) -> dict[str, float | None]:
    return percentiles_ms([value / 1000 for value in milliseconds if value is not None])


def crossing(records: Iterable[Record], switches: Sequence[Switch], initial: str) -> tuple[int, int]:
    """How many requests were sent well before a switch and over after it, and how many of these were answered well by
    the colour that was live when they were sent.
    """
    instants = [switch.instant for switch in switches]
    found = well = 0
    for record in records:
        number = bisect_right(instants, record.start + MARGIN_S)
        if number and instants[number - 1] > record.start:
            continue
        if number == len(instants) or record.end < instants[number] or switches[number].source == "unasked":
            continue
        found += 1
        well += record.failure is None and record.colour == (switches[number - 1].to if number else initial)
    return found, well


async def run_mixed_swaps(host: Host, load: MixedLoad, swaps: int, seconds: float) -> Run:
    """`swaps` swaps to and fro, spread over `seconds`. Where one fails, the run ends there and says why.

    Raises HostError where the host isn't fit for swaps at all.
    """
    status = await settled_status(host)
    colours = (status["live"], status["idle"])
    run = Run(load, colours, {colour: status["colours"][colour].get("version") for colour in colours})

    async def swap() -> None:
        switch = await swap_once(host, load.probed, run.idle)
        if switch.to == run.live:
            run.add_unasked(switch.instant, await _why_unasked(host))
        run.switches.append(switch)

    await _repeat(run, "swaps", swap, swaps, seconds)
    try:
        if (await host.status()).get("live") != run.live:
            run.add_unasked(time.monotonic(), await _why_unasked(host))
    except HostError as error:
        run.stopped = run.stopped or str(error)
    return run


async def run_mixed_reloads(host: Host, load: MixedLoad, reloads: int, seconds: float, command: str) -> Run:
    """The negative control: the edge is reloaded in place of each swap."""
    run = Run(load)
    await _repeat(run, "reloads", lambda: reload_once(host, load.probed, command), reloads, seconds)
    return run


async def _repeat(run: Run, what: str, act: Callable[[], Awaitable[None]], count: int, seconds: float) -> None:
    begin = time.monotonic()
    async with run.load:
        telling = asyncio.create_task(_tell(run, what, begin))
        try:
            for number in range(count):
                await _sleep_until(begin + (number + 0.5) * seconds / count)
                await act()
                run.made += 1
            await _sleep_until(begin + seconds)
        except HostError as error:
            run.stopped = str(error)
        finally:
            telling.cancel()
    run.seconds = time.monotonic() - begin


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


async def _tell(run: Run, what: str, begin: float) -> None:
    while True:
        await asyncio.sleep(_TELL_EVERY_S)
        unasked = f", {len(run.unasked)} switches unasked" if run.unasked else ""
        print(
            f"  {time.monotonic() - begin:4.0f} s: {run.made} {what}{unasked}; "
            f"{run.load.requests} requests, {run.load.failed} failed",
            flush=True,
        )


async def _why_unasked(host: Host) -> str:
    """What the engine says of the last switch that brought a colour back."""
    entries = (await host.run(*APPLIANCE, "history", "-n", "5", "--json")).json()["entries"]
    back = [entry["message"] for entry in entries if entry["command"] == "rollback"]
    return back[-1] if back else "the engine's history doesn't say"
