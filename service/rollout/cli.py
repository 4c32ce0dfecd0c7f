"""The command line of `appliance`."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rollout import config as configuration
from rollout.errors import ApplianceError, Interrupted, describe_os_error
from rollout.operations import Engine
from rollout.report import Result, print_result
from rollout.text import tidy

_DESCRIPTION = "Places model releases on two colours, blue and green, and decides which one answers /predict."
_EPILOG = """\
exit status:
  0  done, or nothing to do
  1  refused or failed; production is as it was
  2  wrong usage or configuration
  3  the live colour isn't healthy (status, verify)
  4  somebody else holds the lock
  5  needs root

a release goes live like this:
  appliance deploy green --bundle /var/lib/appliance/bundles/NAME/VERSION --image IMAGE
  appliance swap --dry-run
  appliance swap --reason "ticket 42"
  appliance rollback            # where it turns out wrong
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage as JSON too, where JSON was asked for."""

    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv[1:]:
            print_result(Result(f"{self.prog}: {message}", ok=False, exit_status=2), as_json=True)
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands. Common options may stand before or after the command."""
    common = _Parser(add_help=False)
    add = common.add_argument
    add("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object as the last line")
    add(
        "--config",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"configuration (default {configuration.DEFAULT_PATH})",
    )
    add("--who", default=argparse.SUPPRESS, help="who does this (default: the user who called sudo, or the login name)")
    add("--reason", default=argparse.SUPPRESS, help="why; kept in the records")
    add(
        "--lock-wait",
        type=_seconds,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help="how long to wait while another command is at work (default 0)",
    )
    parser = _Parser(
        prog="appliance",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, description: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=description or summary, parents=[common], prog=f"appliance {name}"
        )

    command(
        "status",
        "live colour, versions, health",
        "Shows which colour is live and how both are. Exit status 3 where the live colour isn't healthy.",
    )
    deploy = command(
        "deploy",
        "make a release and place it on a colour that isn't live",
        "Checks the bundle's checksums and the image, records a release, restarts the colour, and waits until it is "
        "ready and the bundle's examples reproduce. Where something fails, the colour's earlier release is put back. "
        "The live colour is never touched: the answer then says that the release is pending.",
    )
    deploy.add_argument("colour", metavar="COLOUR", help="the colour to place the release on")
    deploy.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="bundle directory, <state_dir>/bundles/NAME/VERSION"
    )
    deploy.add_argument("--image", required=True, help="image that docker has on this host")
    deploy.add_argument("--dry-run", action="store_true", help="check and compare, and change nothing")
    init = command(
        "init",
        "make the first colour live",
        "Makes COLOUR live where no colour has ever been live, after the same checks as a swap. Otherwise nothing.",
    )
    init.add_argument("colour", metavar="COLOUR")
    swap = command(
        "swap",
        "make the idle colour live",
        "Checks the idle colour (health, release, image, examples), switches, and verifies through the front door on "
        "fresh connections and on one that was open before. Where that fails, it switches back.",
    )
    swap.add_argument("--to", metavar="COLOUR", help="the colour that is to be live; nothing happens where it is")
    swap.add_argument("--dry-run", action="store_true", help="check, and change nothing")
    rollback = command(
        "rollback",
        "switch back to the colour that was live before",
        "Switches back to the colour that was live before the last switch, if it still holds that release and is "
        "healthy. A second rollback undoes the first.",
    )
    rollback.add_argument("--dry-run", action="store_true", help="check, and change nothing")
    verify = command(
        "verify",
        "check the live colour: health, examples, front door",
        "Checks the live colour's health, its examples, and its answers through the front door. Changes nothing.",
    )
    verify.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="time to become well (default 0)",
    )
    history = command("history", "what happened, newest last")
    history.add_argument("-n", type=_count, default=20, metavar="N", help="how many entries (default 20)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = build_parser().parse_args(arguments)
    as_json = getattr(options, "json", False)
    try:
        result = _run(options)
    except ApplianceError as fault:
        result = _failure(fault)
    except OSError as error:
        result = _failure(describe_os_error(error))
    except (KeyboardInterrupt, Interrupted):
        result = Result("interrupted", ok=False, exit_status=1)
    print_result(result, as_json)
    return result.exit_status


def _run(options: argparse.Namespace) -> Result:
    config = configuration.load(getattr(options, "config", configuration.DEFAULT_PATH))
    reason = getattr(options, "reason", None)
    engine = Engine(
        config,
        who=tidy(getattr(options, "who", None) or default_who(), 100),
        reason=tidy(reason, 500) if reason else None,
        lock_wait=getattr(options, "lock_wait", 0.0),
    )
    name = options.command
    if name == "status":
        return engine.status()
    if name == "verify":
        return engine.verify(options.wait)
    if name == "history":
        return engine.history(options.n)
    if name == "deploy":
        dry = options.dry_run
        command = f"deploy {tidy(options.colour, 40)}"
        return engine.run(
            command, lambda: engine.deploy(options.colour, options.bundle, options.image, dry_run=dry), dry_run=dry
        )
    if name == "init":
        return engine.run(f"init {tidy(options.colour, 40)}", lambda: engine.init(options.colour))
    if name == "swap":
        return engine.run("swap", lambda: engine.swap(options.to, dry_run=options.dry_run), dry_run=options.dry_run)
    dry = options.dry_run
    return engine.run("rollback", lambda: engine.rollback(dry_run=dry), dry_run=dry)


def default_who() -> str:
    """The person behind the command: who called sudo, or who is logged in."""
    sudo = os.environ.get("SUDO_USER")
    if sudo:
        return sudo
    try:
        return os.getlogin()
    except OSError:
        # No terminal: a timer, or a connection without one.
        try:
            return pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            return str(os.getuid())


def _failure(fault: ApplianceError) -> Result:
    return Result(fault.message, ok=False, exit_status=fault.exit_status, details=dict(fault.details))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("must be from 0 to 86400 seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
