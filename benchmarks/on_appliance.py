"""What benchmarks of an appliance that runs have in common: how it's reached, what its colours hold, a whole run."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "load")]

from swap_client import DEFAULT_URL, loopback_address  # noqa: E402
from swap_runs import Host, HostError, recorded_lab, settled_status  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.report import BenchError, Row, machine  # noqa: E402

_DEPLOY_LIMIT_S = 1200.0
_BAKE_END_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How the appliance is reached, and where the figures go."""
    known = {**recorded_lab(), **os.environ}
    parser.add_argument("--appliance-url", default=known.get("APPLIANCE_URL", DEFAULT_URL), help="%(default)s")
    parser.add_argument(
        "--host-command",
        default=known.get("APPLIANCE_HOST_COMMAND", ""),
        help="prefix that runs a command on the host, for example 'ssh -F FILE lab', or 'env' where that is this "
        "machine; default: APPLIANCE_HOST_COMMAND, else the lab that `make up` made",
    )
    parser.add_argument("--reports", type=Path, default=ROOT / "reports", help="%(default)s")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md", help="%(default)s")


def check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace, *, needs_host: bool = True) -> None:
    """End with a sentence and exit status 2 where no host is known, or where the load would go elsewhere."""
    if needs_host and not given.host_command:
        parser.error("there is no appliance to measure: run `make up`, or give --host-command")
    try:
        loopback_address(given.appliance_url)
    except ValueError as error:
        parser.error(str(error))


def host_facts(given: argparse.Namespace) -> dict[str, str]:
    """Debian's, nginx's and Docker's versions on the host; without a host, nothing."""
    script = "cat /etc/debian_version; nginx -v 2>&1; docker --version"
    try:
        lines = asyncio.run(Host(given.host_command).script(script)).splitlines()
    except HostError:
        return {}
    return dict(zip(("Debian of the host", "nginx", "Docker"), (line.strip() for line in lines), strict=False))


async def deploy(command: str, bundle: Path) -> None:
    """Place a bundle on the idle colour. Raises BenchError."""
    print(f"  placing {bundle.name} …", flush=True)
    words = [*shlex.split(command), "-e", f"bundle={bundle}"]
    await asyncio.to_thread(report.run, words, _DEPLOY_LIMIT_S, folder=ROOT)


async def without_rollout(host: Host) -> Mapping:
    """The appliance's status, once no bake is under way any more. Raises BenchError, HostError."""
    limit = time.monotonic() + _BAKE_END_S
    while (status := await settled_status(host)).get("rollout"):
        text = status["rollout"]["text"]
        if status["rollout"]["phase"] == "canary":
            raise BenchError(f"{text}; end it first: 'appliance promote' or 'appliance abort' on the host")
        if time.monotonic() > limit:
            raise BenchError(f"{text}; 'appliance promote' hasn't ended it within {_BAKE_END_S:g} s")
        # It may be over by itself in between, and then there is nothing to promote.
        await host.change("promote", check=False)
        await asyncio.sleep(1.0)
    return status


def described(status: Mapping) -> str:
    """What each colour holds, in words."""
    return "; ".join(
        f"{'live' if name == status['live'] else 'idle'} {name}: {about['model']} {about['version']}, {about['status']}"
        for name, about in status["colours"].items()
    )


def left(status: Mapping, placed: Collection[tuple[str, str]]) -> str:
    """What is on the colours; where that is among `placed`, names and versions, how the inventory's come back."""
    text = f"Left on the host: {described(status)}"
    for share, what in (
        (status["split"], "of users go to the idle colour"),
        (status["shadow"], "of requests are copied"),
    ):
        text += f"; {share} % {what}" if share else ""
    text += f"; {status['rollout']['text']}." if status["rollout"] else "."
    if any((about["model"], about["version"]) in placed for about in status["colours"].values()):
        text += (
            "\nThe inventory's bundles come back with playbooks/site.yml --tags releases, then playbooks/swap.yml, and "
            "the first again when the bake is over ('appliance promote' on the host ends it)."
        )
    return text


def run(
    benchmarks: Mapping[str, Callable[[argparse.Namespace], list[Row]]],
    given: argparse.Namespace,
    *,
    figures: str,
    marks: tuple[str, str],
    command: Sequence[str],
    placed: Collection[tuple[str, str]],
) -> int:
    """Measure an appliance on which both colours are ready, and tell what is left on it.

    :param figures: name of the file of figures in `given.reports`.
    :param command: the run's own command line.
    :param placed: names and versions of the bundles that the benchmarks place.
    :returns: the exit status, that of `report.measure` or 130 where it was interrupted.
    """
    host = Host(given.host_command)
    try:
        asyncio.run(settled_status(host))
    except HostError as error:
        print(f"the appliance isn't fit to be measured: {error}\n`make up` starts the lab again.", file=sys.stderr)
        return 2
    try:
        return report.measure(
            benchmarks,
            given,
            figures=given.reports / figures,
            order=list(benchmarks),
            marks=marks,
            where={**machine(), **host_facts(given), "load before": f"{os.getloadavg()[0]:.2f}"},
            command=shlex.join(command),
            errors=(BenchError, HostError),
        )
    except KeyboardInterrupt:
        print("interrupted: all clients have ended, nothing was written", file=sys.stderr)
        return 130
    finally:
        try:
            print(left(asyncio.run(host.status()), placed), flush=True)
        except HostError as error:
            print(f"what is left on the host can't be told: {error}", file=sys.stderr)
