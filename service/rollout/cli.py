"""The command line of `appliance`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rollout import config as configuration
from rollout.errors import ApplianceError, Interrupted, NeedsRoot, UsageError, describe_os_error
from rollout.operations import Engine
from rollout.report import Result, print_result, progress
from rollout.text import tidy

if TYPE_CHECKING:
    from rollout.rollouts import Rollouts

_DESCRIPTION = "Places model releases on two colours, blue and green, and decides which one answers /predict."
_EPILOG = """\
exit status:
  0  done, or nothing to do
  1  refused or failed; production is as it was
  2  wrong usage or configuration
  3  the live colour isn't healthy (status, verify), or doesn't answer after traffic went back to it
  4  somebody else holds the lock
  5  needs root

a release goes live like this:
  appliance deploy green --bundle /var/lib/appliance/bundles/NAME/VERSION --image IMAGE
  appliance swap --dry-run
  appliance swap --reason "ticket 42"
  appliance rollback            # where it turns out wrong

or step by step, compared with the live colour, and back by itself where it does worse:
  appliance swap --strategy canary
"""


_TURN_SECONDS = 5.0
_URGENT = ("rollback", "abort", "pause", "resume", "promote", "maintenance")


def _no_arguments(_add: Callable[..., object]) -> None:
    """A command with the common options only."""


def _deploy_arguments(add: Callable[..., object]) -> None:
    add("colour", metavar="COLOUR", help="the colour to place the release on")
    add("--bundle", type=Path, required=True, metavar="DIR", help="bundle directory, <state_dir>/bundles/NAME/VERSION")
    add("--image", required=True, help="image that docker has on this host")
    add("--origin", metavar="TEXT", help="where the bundle came from; kept in the release's record")
    add("--revision", metavar="TEXT", help="the revision of its sources; kept likewise")
    add("--dry-run", action="store_true", help="check and compare, and change nothing")


def _init_arguments(add: Callable[..., object]) -> None:
    add("colour", metavar="COLOUR")


def _swap_arguments(add: Callable[..., object]) -> None:
    add("--to", metavar="COLOUR", help="the colour that is to be live; nothing happens where it is")
    add("--dry-run", action="store_true", help="check, and change nothing")
    add(
        "--strategy",
        choices=("at-once", "canary"),
        default="at-once",
        help="all users at once (default), or a rising share of them, judged at each step",
    )
    add("--steps", type=_steps, metavar="N,N,…", help="a canary's percentages; the last is 100")
    add("--detach", action="store_true", help="don't wait for a canary's end")


def _rollback_arguments(add: Callable[..., object]) -> None:
    add(
        "--to", type=int, metavar="RELEASE", help="a release by its number; it is placed again where no colour holds it"
    )
    add("--dry-run", action="store_true", help="check, and change nothing")


def _verify_arguments(add: Callable[..., object]) -> None:
    add("--wait", type=_seconds, default=0.0, metavar="SECONDS", help="time to become well (default 0)")


def _follow_arguments(add: Callable[..., object]) -> None:
    add("--seconds", type=_seconds, metavar="SECONDS", help="at most for so long (then exit status 0)")


def _percent_argument(add: Callable[..., object]) -> None:
    add("percent", type=int, metavar="PERCENT")


def _maintenance_arguments(add: Callable[..., object]) -> None:
    add("state", choices=("on", "off"))


def _unlock_arguments(add: Callable[..., object]) -> None:
    add("--force", action="store_true", help="also where it shows signs of life")


def _watch_arguments(add: Callable[..., object]) -> None:
    add("--settle", action="store_true", help="send traffic back where a rollout is left unwatched")


def _logs_arguments(add: Callable[..., object]) -> None:
    add("request_id", type=_request_id, metavar="REQUEST_ID")


def _history_arguments(add: Callable[..., object]) -> None:
    add("-n", type=_count, default=20, metavar="N", help="how many entries (default 20)")


# Its summary, its description where that says more, and what adds its own arguments.
_COMMANDS: dict[str, tuple[str, str, Callable[[Callable[..., object]], None]]] = {
    "status": (
        "live colour, versions, health",
        "Shows which colour is live and how both are. Exit status 3 where the live colour isn't healthy.",
        _no_arguments,
    ),
    "deploy": (
        "make a release and place it on a colour that isn't live",
        "Checks the bundle's checksums and the image, records a release, restarts the colour, and waits until it is "
        "ready and the bundle's examples reproduce. Where something fails, the colour's earlier release is put back. "
        "The live colour is never touched: the answer then says that the release is pending.",
        _deploy_arguments,
    ),
    "init": (
        "make the first colour live",
        "Makes COLOUR live where no colour has ever been live, after the same checks as a swap. Otherwise nothing.",
        _init_arguments,
    ),
    "swap": (
        "make the idle colour live",
        "Checks the idle colour (health, release, image, examples, and by a load test where its release hasn't passed "
        "it yet), switches, and verifies through the front door on fresh connections and on one that was open before. "
        "Where that fails, it switches back.",
        _swap_arguments,
    ),
    "rollback": (
        "switch back to the colour that was live before",
        "Switches back to the colour that was live before the last switch, if it still holds that release and is "
        "healthy. During a canary it sends everybody back. A second rollback undoes the first, but never brings back "
        "what a rollout has taken back: --to does.",
        _rollback_arguments,
    ),
    "verify": (
        "check the live colour: health, examples, front door",
        "Checks the live colour's health, its examples, and its answers through the front door. Changes nothing.",
        _verify_arguments,
    ),
    "follow": (
        "show how the rollout under way goes on, until it ends",
        "Exit status 0 where the new release stays live, 1 where traffic went back. The rollout doesn't need anybody "
        "who follows it.",
        _follow_arguments,
    ),
    "pause": (
        "keep a canary at the share that it has; it is judged all the same",
        "",
        _no_arguments,
    ),
    "resume": (
        "let a paused canary go on",
        "",
        _no_arguments,
    ),
    "promote": (
        "end the step that a rollout is at: a canary's colour goes live, a bake is over",
        "",
        _no_arguments,
    ),
    "abort": (
        "send everybody back to the colour that a rollout came from",
        "",
        _no_arguments,
    ),
    "split": (
        "give the idle colour a share of the users, by hand",
        "The share stays until it is changed, and nobody watches it: 'appliance swap --strategy canary' does. "
        "A user always gets the same colour.",
        _percent_argument,
    ),
    "shadow": (
        "copy a share of requests to the idle colour and compare the answers",
        "Clients don't wait for it. A rollout fails where too many answers differ.",
        _percent_argument,
    ),
    "maintenance": (
        "answer clients with 503, or serve them again",
        "In maintenance everything but /health, /test/ and requests with the header X-Model-Track gets 503.",
        _maintenance_arguments,
    ),
    "prune": (
        "remove releases, bundles and images that nothing needs any more",
        "Keeps what the colours hold, what a rollback returns to, and the last releases besides. A deploy does it too.",
        _no_arguments,
    ),
    "unlock": (
        "end a command that holds the lock and doesn't move",
        "A lock is freed by itself when its process dies, however it dies. This is for one that hangs.",
        _unlock_arguments,
    ),
    "watch": (
        "carry out the rollout under way",
        "appliance-rollout.service runs this. When it ends before the rollout has, traffic goes back.",
        _watch_arguments,
    ),
    "logs": (
        "one request in the logs of nginx and of the model",
        "Prints what nginx and the colours logged about a request, by its answer's X-Request-ID. Inputs aren't logged.",
        _logs_arguments,
    ),
    "history": (
        "what happened, newest last",
        "",
        _history_arguments,
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage as JSON too, where JSON was asked for."""

    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv[1:]:
            print_result(Result(f"{self.prog}: {message}", ok=False, exit_status=2), as_json=True)
        super().error(message)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser with all commands, or with `only` one of them. Common options may stand before or after the command.

    To make all takes longer than to switch back.
    """
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
        help="how long to wait while another command is at work (default 0; 10 where it is urgent, such as rollback)",
    )
    parser = _Parser(
        prog="appliance",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS if only is None else (only,):
        summary, description, arguments = _COMMANDS[name]
        command = commands.add_parser(
            name, help=summary, description=description or summary, parents=[common], prog=f"appliance {name}"
        )
        arguments(command.add_argument)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    only = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    options = build_parser(only).parse_args(arguments)
    as_json = getattr(options, "json", False)
    try:
        result = _run(options)
    except ApplianceError as fault:
        result = _failure(fault)
    except OSError as error:
        result = _failure(describe_os_error(error))
    except (KeyboardInterrupt, Interrupted):
        result = Result("interrupted", ok=False, exit_status=1)
    if print_result(result, as_json) or result.changed:
        return result.exit_status
    # Who asked has no answer. Where something was changed, its exit status is the answer.
    progress("the answer can't be written to standard output")
    return result.exit_status or 1


def run() -> NoReturn:
    """The whole program: `main`, and the end of the process."""
    status = main()
    # All is written and printed by now. Python would take itself apart piece by piece, which takes as long as a switch.
    os._exit(status)


def _run(options: argparse.Namespace) -> Result:
    config = configuration.load(getattr(options, "config", configuration.DEFAULT_PATH))
    reason = getattr(options, "reason", None)
    engine = Engine(
        config,
        who=tidy(getattr(options, "who", None) or default_who(), 100),
        reason=tidy(reason, 500) if reason else None,
        # A watch holds the lock for moments only, and nobody wants to say twice what is urgent.
        lock_wait=getattr(options, "lock_wait", 10.0 if options.command in _URGENT else 0.0),
    )
    name = options.command
    if name == "status":
        return engine.status()
    if name == "verify":
        return engine.verify(options.wait)
    if name == "history":
        return engine.history(options.n)
    if name == "logs":
        from rollout import requestlog

        return requestlog.find(config, options.request_id)
    if name in ("deploy", "swap", "split"):
        # They take long, and site.yml may put other modules in their place meanwhile.
        for late in ("drain", "gate", "judge"):
            importlib.import_module(f"rollout.{late}")
    if name == "deploy":
        dry = options.dry_run
        command = f"deploy {tidy(options.colour, 40)}"
        return engine.run(
            command,
            lambda: engine.deploy(
                options.colour,
                options.bundle,
                options.image,
                origin=_short(options.origin),
                revision=_short(options.revision),
                dry_run=dry,
            ),
            dry_run=dry,
        )
    if name == "init":
        return engine.run(f"init {tidy(options.colour, 40)}", lambda: engine.init(options.colour))
    if name == "unlock":
        return _unlock(config, engine, force=options.force)
    if name == "prune":
        return engine.run("prune", engine.prune)
    if name == "follow":
        from rollout.follow import follow

        return follow(config, options.seconds)
    if name == "watch":
        return _watch(config, engine, settle=options.settle)
    from rollout.rollouts import Rollouts

    rollouts = Rollouts(engine)
    if name == "swap":
        return _swap(config, rollouts, options)
    if name == "rollback":
        dry = options.dry_run
        return engine.run("rollback", lambda: rollouts.rollback(options.to, dry_run=dry), dry_run=dry)
    if name == "split":
        # It may begin with a load test, which a signal may end.
        return engine.run("split", lambda: rollouts.split(options.percent))
    commands = {
        "pause": lambda: rollouts.order("pause"),
        "resume": lambda: rollouts.order("resume"),
        "promote": lambda: rollouts.order("promote"),
        "abort": rollouts.abort,
        "shadow": lambda: rollouts.shadow(options.percent),
        "maintenance": lambda: rollouts.maintenance(options.state == "on"),
    }
    return engine.run(name, lambda: engine.whole(commands[name]))


def _swap(config: configuration.Config, rollouts: Rollouts, options: argparse.Namespace) -> Result:
    dry, engine = options.dry_run, rollouts.engine
    if options.strategy == "at-once":
        if options.steps or options.detach:
            raise UsageError(
                f"{'steps' if options.steps else '--detach'} without a canary: --strategy canary, and with a playbook "
                f"-e strategy=canary, goes live in steps"
            )
        result = engine.run("swap", lambda: rollouts.swap(options.to, dry_run=dry), dry_run=dry)
        return _drained(config, engine, result) if result.ok and result.changed else result
    begun = engine.run("canary", lambda: rollouts.canary(options.to, options.steps, dry_run=dry), dry_run=dry)
    if not begun.changed or options.detach:
        return begun
    from rollout.follow import follow

    progress(begun.message)
    result = follow(config, None)
    # However it ended, or whether anybody looked on: it has begun.
    result.changed = True
    return result


def _drained(config: configuration.Config, engine: Engine, result: Result) -> Result:
    """Wait for what the old colour still has to answer; without the lock, so that a rollback needn't wait."""
    from rollout.drain import drain

    old = engine.colour(config.other(result.details["live"]))
    try:
        drained = drain(old, config.drain_seconds, progress, lambda: None)
    except KeyboardInterrupt:
        result.message += f"; {old.name} wasn't waited for"
        return result
    # Of a colour that can't be asked nobody knows what is left.
    left = None if drained.note else drained.left
    result.details["drained"] = {"left": left, "seconds": drained.seconds, "note": drained.note}
    if drained.note:
        result.message += f"; what is still in progress on {old.name} isn't known: {drained.note}"
    elif drained.left:
        result.message += f"; {drained.left} requests are still in progress on {old.name} after {drained.seconds:g} s"
    return result


def _watch(config: configuration.Config, engine: Engine, *, settle: bool) -> Result:
    from rollout import host, plan
    from rollout.rollouts import Rollouts
    from rollout.watch import Watch

    if not settle:
        return Watch(config, engine.who).run()
    if host.shutting_down():
        return Result("the host shuts down; a rollout goes on after the boot")
    # One turn at the lock: a command may have started the watch in vain, since it was still ending, and may put its
    # rollout on record at this moment. Where the watch is started later, systemd waits with that for the end of this.
    Engine(config, engine.who, lock_wait=_TURN_SECONDS).run("watch", lambda: Result("waited"), quiet=True)
    ended = os.environ.get("SERVICE_RESULT")
    if ended == "success" and plan.under_way(config.rollout_file, engine.routing.read()):
        # A rollout that began while the last one's watch was just about to end.
        complaint = host.start_soon(config.rollout_unit)
        if complaint is None:
            return Result("the next rollout is under way", changed=True)
        progress(f"{config.rollout_unit} can't be started: {complaint}")
    why = f"its watch ended ({ended})" if ended else "its watch is gone"
    engine.lock_wait = max(engine.lock_wait, 60.0)
    if plan.under_way(config.rollout_file, engine.routing.read()) is None:
        return Result("no rollout is under way")
    return engine.run("rollback", lambda: Rollouts(engine).settle(why))


def _short(text: str | None) -> str | None:
    return tidy(text, 500) if text else None


def _unlock(config: configuration.Config, engine: Engine, *, force: bool) -> Result:
    if os.geteuid() != 0:
        raise NeedsRoot("'appliance unlock' needs root: run with sudo")
    from rollout.lock import break_stale

    message = break_stale(config.lock_file, force=force)
    engine.lock_wait = max(engine.lock_wait, 10.0)
    return engine.run("unlock", lambda: Result(message))


def default_who() -> str:
    """The person behind the command: who called sudo, or who is logged in."""
    sudo = os.environ.get("SUDO_USER")
    if sudo:
        return sudo
    try:
        return os.getlogin()
    except OSError:
        # No terminal: a timer, or a connection without one.
        import pwd

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


def _request_id(text: str) -> str:
    from rollout.requestlog import REQUEST_ID

    if not REQUEST_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("must be 1 to 64 letters, digits, dots, hyphens and underscores")
    return text


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = ()
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1 or steps[-1] != 100:
        raise argparse.ArgumentTypeError("must be rising percentages that end with 100, such as 5,50,100")
    return steps


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
