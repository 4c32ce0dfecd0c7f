"""Runs of many swaps, or many reloads of the edge, under load: what the load tests assert and the benchmarks print.

Commands reach the host through a prefix, for example `ssh -F FILE lab`; an empty prefix means this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swap_client import Settings, Summary, SwapLoad, Switch, monotonic_from_wall, summarise

# Keys of `appliance swap --json`: epoch seconds of the rename, and the engine's own measurement in milliseconds.
SWITCHED_AT_KEY = "switched_at"
SWITCH_MS_KEY = "switch_ms"
# Where the engine doesn't report the instant, the change time of this link on the host stands in for it.
ROUTING_LINK = "/var/lib/appliance/routing/current"
APPLIANCE = ("sudo", "appliance")
RELOAD_COMMAND = "sudo systemctl reload nginx"
# Whoever watches what the last swap has brought takes the engine's lock for a moment now and then.
LOCK_WAIT_S = 10
# How far outside of its command's run an instant may lie before the two machines' clocks count as different.
CLOCK_SLACK_S = 0.005


def recorded_lab() -> dict[str, str]:
    """How the lab's machine is reached, where `make up` has made one: values for APPLIANCE_URL and …_HOST_COMMAND."""
    name = os.environ.get("LAB_NAME") or "appliance"
    try:
        lab = json.loads((Path(__file__).resolve().parents[2] / ".lab" / name / "lab.json").read_text())
    except FileNotFoundError:
        return {}
    return {
        "APPLIANCE_HOST_COMMAND": f"ssh -F {lab['directory']}/ssh_config lab",
        "APPLIANCE_URL": f"http://127.0.0.1:{lab['edge_port']}",
    }


class HostError(Exception):
    """A command on the host failed; the message says which, its status and what it printed."""


@dataclass(slots=True)
class Completed:
    """A command that ended. `begin` and `end`: monotonic seconds around it, as seen from here."""

    words: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    begin: float
    end: float

    def json(self) -> dict:
        """The JSON object on the last line of standard output."""
        lines = self.stdout.strip().splitlines()
        try:
            found = json.loads(lines[-1]) if lines else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise HostError(f"{shlex.join(self.words)}: no JSON object on the last line; {self.tail()}")
        return found

    def tail(self) -> str:
        return f"exit status {self.returncode}, stdout {self.stdout[-500:]!r}, stderr {self.stderr[-500:]!r}"


class Host:
    """Where the appliance runs."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = tuple(shlex.split(prefix))

    async def run(self, *words: str, timeout_s: float = 180, check: bool = True, stdin: str = "") -> Completed:
        """Run plain words (nothing a remote shell would change) and wait up to `timeout_s` seconds."""
        command = (*self._prefix, *words)
        begin = time.monotonic()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"{shlex.join(command)}: {error}") from error
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), timeout_s)
        except TimeoutError:
            raise HostError(f"{shlex.join(command)}: not done after {timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        done = Completed(command, process.returncode, out.decode(), err.decode(), begin, time.monotonic())
        if check and done.returncode != 0:
            raise HostError(f"{shlex.join(command)}: {done.tail()}")
        return done

    async def script(self, text: str, timeout_s: float = 60) -> str:
        """Standard output of a root shell that reads `text`: no quoting to lose on the way through SSH."""
        return (await self.run("sudo", "sh", "-s", stdin=text, timeout_s=timeout_s)).stdout

    async def change(self, command: str, check: bool = True) -> Completed:
        """Run a command of the engine's that changes something."""
        return await self.run(*APPLIANCE, command, "--json", "--lock-wait", str(LOCK_WAIT_S), check=check)

    async def status(self) -> dict:
        """`appliance status --json`, whatever its exit status says about health."""
        return (await self.run(*APPLIANCE, "status", "--json", check=False)).json()


def switch_from(done: Completed, to: str, link_changed: float | None = None) -> Switch:
    """The switch that a finished `swap --json` made.

    Its instant is the reported one, else `link_changed` (both epoch seconds), else the command's start: the first of
    them that lies inside the command's run, for one that doesn't was read from another clock.
    """
    answer = done.json()
    candidates = (("reported", answer.get(SWITCHED_AT_KEY)), ("link", link_changed))
    for source, wall in candidates:
        if isinstance(wall, (int, float)):
            instant = monotonic_from_wall(wall)
            if done.begin - CLOCK_SLACK_S <= instant <= done.end + CLOCK_SLACK_S:
                return Switch(to, done.begin, instant, done.end, source, answer.get(SWITCH_MS_KEY))
    return Switch(to, done.begin, done.begin, done.end, "begin", answer.get(SWITCH_MS_KEY))


async def link_changed_at(host: Host) -> float | None:
    """Epoch seconds of the last rename over the routing link, by its change time; None where it can't be read."""
    done = await host.run("sudo", "stat", "--format=%.9Z", ROUTING_LINK, check=False)
    try:
        return float(done.stdout)
    except ValueError:
        return None


async def settled_status(host: Host) -> dict:
    """The appliance's status, or an error that says what has to be done before swaps can be measured."""
    status = await host.status()
    colours = status.get("colours") or {}
    for colour in (status.get("live"), status.get("idle")):
        found = colours.get(colour) or {}
        if not colour or found.get("status") != "ready":
            raise HostError(
                f"both colours have to be ready before swaps are measured, but {colour} is {found.get('status')!r} "
                f"({status.get('message')}); deploy a release to it first"
            )
    return status


async def swap_once(host: Host, load: SwapLoad, idle: str) -> Switch:
    """Make the idle colour live, watched by the load's probe until a later request has its answer.

    `idle` is what that colour should be; the switch says what it was.
    """
    async with load.probing():
        done = await host.change("swap")
        answer = done.json()
        if not answer.get("ok") or not answer.get("changed"):
            raise HostError(f"the swap to {idle}: {answer.get('message')!r}")
        link_changed = None if SWITCHED_AT_KEY in answer else await link_changed_at(host)
        switch = switch_from(done, answer.get("live", idle), link_changed)
        # Requests that start after the command reported success are what the wrong-colour count is about.
        if not await load.first_answer_by(switch.to, done.end, timeout_s=5):
            raise HostError(f"the swap to {switch.to}: no answer by it within 5 s of its success")
    return switch


async def reload_once(host: Host, load: SwapLoad, command: str) -> None:
    """Reload the edge in place of a swap, watched by the load's probe."""
    async with load.probing():
        await host.run(*shlex.split(command))
        # A reload is asynchronous: old workers close their idle connections about 100 ms after the signal.
        await asyncio.sleep(0.3)


async def run_swaps(
    host: Host,
    settings: Settings,
    swaps: int = 20,
    pause_s: tuple[float, float] = (0.2, 1.0),
    seed: int | None = None,
) -> Summary:
    """`swaps` swaps to and fro under load, with a random pause of `pause_s` seconds between two."""
    status = await settled_status(host)
    initial, other = status["live"], status["idle"]
    pauses = random.Random(seed)
    switches: list[Switch] = []
    async with SwapLoad(settings) as load:
        await asyncio.sleep(1.0)
        for number in range(swaps):
            to = other if number % 2 == 0 else initial
            switches.append(await swap_once(host, load, to))
            if switches[-1].to != to:
                raise HostError(f"swap {number + 1} of {swaps} wasn't to {to}: somebody else swapped too")
            await asyncio.sleep(pauses.uniform(*pause_s))
    live = (await host.status()).get("live")
    expected = initial if swaps % 2 == 0 else other
    if live != expected:
        raise HostError(f"after {swaps} swaps {live} is live, not {expected}: somebody else swapped too")
    return summarise(load, switches, initial)


async def run_reloads(
    host: Host,
    settings: Settings,
    reloads: int = 20,
    pause_s: tuple[float, float] = (0.2, 1.0),
    seed: int | None = None,
    command: str = RELOAD_COMMAND,
) -> Summary:
    """The negative control: the same load and the same pauses, but the edge is reloaded in place of each swap."""
    pauses = random.Random(seed)
    async with SwapLoad(settings) as load:
        await asyncio.sleep(1.0)
        for _ in range(reloads):
            await reload_once(host, load, command)
            await asyncio.sleep(pauses.uniform(*pause_s))
    return summarise(load)


class Figures(Protocol):
    """What a report is made of."""

    def as_dict(self) -> dict:
        """Figures that JSON can hold, by name."""


def write_report(path: Path, name: str, summary: Figures, **more: object) -> None:
    """Write a run's figures as JSON; `reports/` isn't kept in version control."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"name": name, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **more, **summary.as_dict()}
    path.write_text(json.dumps(report, indent=2) + "\n")


def expected_seconds(swaps: int, pause_s: tuple[float, float]) -> int:
    """A generous limit for one run, in seconds, after which the load ends by itself."""
    return math.ceil(60 + swaps * (pause_s[1] + 30))
