"""The commands: what is checked, in which order things change, and what is put back when something fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout import audit, bundles, host, plan, requestmark, textfile
from rollout.bundles import Example
from rollout.colour import HEALTHY, Colour
from rollout.config import Config
from rollout.errors import (
    ApplianceError,
    Failed,
    Interrupted,
    LockHeld,
    NeedsRoot,
    NotHealthy,
    Refused,
    UsageError,
    describe_os_error,
)
from rollout.frontdoor import FrontDoor, FrontDoorGone, Verification
from rollout.interrupts import Interrupts
from rollout.lock import exclusive
from rollout.releases import (
    GATE_DISABLED,
    GATE_FAILED,
    GATE_PASSED,
    GATE_SKIPPED,
    IMAGE,
    Release,
    Releases,
    settings_digest,
)
from rollout.report import Result, history_lines, progress, status_table
from rollout.routing import Routing, RoutingBroken, State
from rollout.text import now

# The colour to leave may hang, and so may Docker: a rollback waits no longer for what they say.
_URGENT_SECONDS = 1.0


class Engine:
    """The commands of `appliance`. Each returns a Result or raises ApplianceError or OSError.

    `who` and `reason` go into every record; `lock_wait` is in seconds.
    """

    def __init__(self, config: Config, who: str, reason: str | None = None, lock_wait: float = 0.0) -> None:
        self.config = config
        self.who = who
        self.reason = reason
        self.lock_wait = lock_wait
        self.routing = Routing(config.routing_dir, config.colours)
        self.releases = Releases(config.releases_dir, config.config_dir)
        self.front_door = FrontDoor(
            config.front_door, config.request_timeout_seconds, lambda: requestmark.of(config.runtime_dir)
        )
        self.interrupts = Interrupts()

    def colour(self, name: str) -> Colour:
        """One of the configured colours. Raises UsageError."""
        if name not in self.config.colours:
            raise UsageError(f"there is no colour {name}: choose {' or '.join(self.config.colours)}")
        return Colour(self.config, self.releases, name)

    # Commands that only look.

    def status(self) -> Result:
        """Live colour, versions, health; exit status 3 where the live colour isn't healthy."""
        try:
            state, broken = self.routing.read(), None
        except RoutingBroken as fault:
            state, broken = None, fault.message
        live = state.live if state else None
        colours = {name: self.colour(name).describe() for name in self.config.colours}
        about = colours[live] if live else None
        present = plan.under_way(self.config.rollout_file, state)
        if about is None:
            message = broken or "no colour is live: deploy a release and run 'appliance init COLOUR'"
        else:
            release = f"release {about['release']}" if about["release"] else "no release"
            reason = f" ({about['reason']})" if about["reason"] else ""
            message = f"{live} is live: {about['model']} {about['version']}, {release}, {about['status']}{reason}"
        if present is not None:
            message += f"; {present.describe(state)}"
        elif state is not None and state.split:
            message += f"; {self.config.other(state.live)} serves {state.split} % of users"
        if state is not None and state.shadow:
            message += f"; {state.shadow} % of requests are copied and compared"
        if state is not None and state.maintenance:
            message += "; IN MAINTENANCE: clients get 503"
        healthy = about is not None and about["status"] in HEALTHY
        table = status_table(colours, live)
        return Result(
            message=message,
            ok=healthy,
            exit_status=0 if healthy else 3,
            details={
                "live": live,
                "idle": self.config.other(live) if live else None,
                "previous": state.previous if state else None,
                "state": state.number if state else None,
                "since": state.since if state else None,
                "split": state.split if state else 0,
                "shadow": state.shadow if state else 0,
                "maintenance": state.maintenance if state else False,
                "rollout": plan.as_details(present, state),
                "colours": colours,
                "table": table,
            },
            lines=table,
        )

    def verify(self, wait: float = 0.0) -> Result:
        """Check the live colour: health, examples, front door; give it up to `wait` seconds to be well.

        Raises NotHealthy, NeedsRoot.
        """
        deadline = time.monotonic() + wait
        while True:
            try:
                return self._verify()
            except NotHealthy as fault:
                if time.monotonic() >= deadline:
                    raise
                progress(f"not yet: {fault.message}")
                time.sleep(1)

    def _verify(self) -> Result:
        try:
            state = self.routing.read()
            if state is None:
                raise NotHealthy("no colour is live: deploy a release and run 'appliance init COLOUR'")
            release, examples = self.check(state.live, HEALTHY)
            body = _request_body(examples)
            held = self.front_door.open_held(body)
            try:
                found = self.front_door.verify(state.live, body, self.config.verify_requests, held)
            finally:
                held.close()
        except (NeedsRoot, NotHealthy):
            raise
        except ApplianceError as fault:
            raise NotHealthy(fault.message) from fault
        return Result(
            f"{state.live} is live and well: {title_of(release)}; {len(examples)} examples reproduce, "
            f"{found.requests} requests through {self.config.front_door} verified",
            details={"live": state.live, "release": release.number, "requests": found.requests},
        )

    def history(self, last: int) -> Result:
        """The last `last` entries of the audit log, oldest first."""
        entries = audit.read(self.config.audit_file, last)
        return Result(
            f"{len(entries)} entries", details={"entries": entries}, lines=history_lines(entries), headline=False
        )

    # The frame of every command that changes something.

    def run(
        self, command: str, function: Callable[[], Result], *, dry_run: bool = False, quiet: bool = False
    ) -> Result:
        """Run one changing command as root, under the lock, with its line in the audit log unless `quiet`.

        A dry run takes no lock and leaves no line. Raises nothing foreseeable: faults become the Result.
        """
        if os.geteuid() != 0:
            raise NeedsRoot(f"'appliance {command}' needs root: run with sudo")
        if dry_run:
            result = function()
            result.details["dry_run"] = True
            return result
        started = time.monotonic()
        with self.interrupts:
            before = None
            try:
                with exclusive(self.config.lock_file, who=self.who, command=command, wait=self.lock_wait):
                    before = self._live()
                    result = self._guard(function)
                    # What has happened is recorded while the lock is held, so that the log has the order of events.
                    self.interrupts.disarm()
                    if not quiet:
                        self._record(command, result, before, started)
                        self.write_metrics()
                    return result
            except LockHeld as fault:
                result = _as_result(fault)
            except Interrupted as signal:
                result = _as_result(Failed(f"interrupted by {signal.signal_name}; nothing was changed"))
            self.interrupts.disarm()
            if not quiet:
                self._record(command, result, self._live(), started)
            return result

    def whole(self, function: Callable[[], Result]) -> Result:
        """Call `function` so that no signal breaks it off: what it does belongs together."""
        with self.interrupts.hold():
            result = function()
            self.interrupts.disarm()
        return result

    def _guard(self, function: Callable[[], Result]) -> Result:
        try:
            return function()
        except ApplianceError as fault:
            return _as_result(fault)
        except OSError as error:
            return _as_result(describe_os_error(error))
        except Interrupted as signal:
            return _as_result(Failed(f"interrupted by {signal.signal_name}; nothing was changed"))

    def _live(self) -> str | None:
        state = self.routing.known()
        return state.live if state else None

    def _record(self, command: str, result: Result, before: str | None, started: float) -> None:
        details = result.details
        entry = {
            "time": now(),
            "who": self.who,
            "command": command,
            "outcome": result.outcome,
            "message": result.message,
            "reason": self.reason,
            "live_before": before,
            "live_after": self._live(),
            "state": details.get("state"),
            "release": details.get("release"),
            "cause": details.get("cause"),
            "switched_at": details.get("switched_at"),
            "durations": {"total_s": round(time.monotonic() - started, 3), "switch_ms": details.get("switch_ms")},
        }
        try:
            audit.append(self.config.audit_file, entry)
        except OSError as error:
            # The thing itself has happened: its result must not be turned into a failure by its record.
            fault = describe_os_error(error)
            details["warning"] = f"no line was written to the audit log: {fault.message}"
            progress(details["warning"])

    def write_metrics(self) -> None:
        """Renew the metrics file, as far as that is possible."""
        try:
            textfile.write(
                self.config.metrics_file,
                self.config,
                self.routing,
                self.releases,
                lambda: plan.with_checks(self.config.rollout_file, self.config.rollout_report_file),
            )
        except (OSError, ApplianceError) as error:
            progress(f"the metrics weren't written: {error}")

    # deploy

    def deploy(
        self,
        name: str,
        directory: Path,
        image: str,
        *,
        origin: str | None = None,
        revision: str | None = None,
        gated: bool = True,
        dry_run: bool = False,
    ) -> Result:
        """Make a release of a bundle and an image, place it on a colour that isn't live, and put load on it."""
        colour = self.colour(name)
        if not IMAGE.fullmatch(image):
            raise UsageError(f"{image!r} isn't the name of an image")
        bundle = bundles.verify(self.config.bundles_dir, directory)
        examples = bundles.load_examples(bundle.directory, bundle.digest)
        image_id = host.image_id(image)
        state = self.routing.read()
        live = state is not None and state.live == name
        placed = self._placed(name)
        settings = self.releases.settings()
        wanted = (bundle.digest, image_id, settings_digest(settings))
        same = placed is not None and (placed.bundle_digest, placed.image_id, placed.settings_digest) == wanted
        details: dict[str, Any] = {"colour": name, "release": placed.number if placed else None, "pending": False}
        title = f"{bundle.name} {bundle.version}"
        if live:
            if placed is not None and placed.settings_digest != settings_digest(settings):
                title += f" with the changed settings in {self.releases.settings_path}"
            return self._deploy_on_live(name, placed, same, title, details)
        present = plan.under_way(self.config.rollout_file, state)
        ready = placed if same and placed and self._is_well(colour, placed, examples) else None
        # Not under a share of users or as the way back: then it has been let through.
        spare = state is not None and present is None and not state.split
        owed = ready is not None and gated and spare and self.owes_gate(ready.number)
        if ready and not owed and host.unit_enabled(colour.unit):
            return Result(f"{name} holds {title_of(ready)} already and is ready", outcome="nothing", details=details)
        if present is not None:
            return Result(
                f"{title} isn't placed: a rollout is under way, {present.describe(state)}; run this again when that is "
                f"over ('appliance promote' or 'appliance abort' ends it)",
                outcome="nothing",
                details=details | {"pending": True},
            )
        if state is not None and state.split:
            return Result(
                f"{title} isn't placed: {name} serves {state.split} % of users; 'appliance split 0' ends that; "
                f"then run this again",
                outcome="nothing",
                details=details | {"pending": True},
            )
        if ready and owed:
            return self._gate_placed(colour, ready, dry_run, details)
        if dry_run:
            number = self.releases.next_number()
            return Result(
                f"would place {title} with the image {image} on {name} as release {number} and restart {colour.unit}",
                details=details | {"would_change": True},
            )
        # Whoever breaks this off has changed nothing.
        if placed is not None:
            self._drain(colour)
        earlier = self.releases.env(name)
        release = self.releases.create(
            Release(
                colour=name,
                name=bundle.name,
                version=bundle.version,
                bundle=str(bundle.directory),
                bundle_digest=bundle.digest,
                image=image,
                image_id=image_id,
                settings_digest=settings_digest(settings),
                who=self.who,
                when=now(),
                reason=self.reason,
                origin=origin,
                revision=revision,
            )
        )
        details["release"] = release.number
        progress(f"placing {title_of(release)} on {name}")
        try:
            self.releases.place(name, release, settings)
            health = colour.restart_and_wait(release, self.config.ready_timeout_seconds, progress)
            colour.run_examples(examples, health)
            self._record_examples(release, examples)
            # Where nobody is live yet, nobody could get worse answers than before, and /test/ leads nowhere.
            tested = gated and state is not None and self.config.gate.enabled
            if tested:
                self._pass_gate(colour, release)
            elif not gated:
                self.releases.set_gate(release.number, GATE_SKIPPED, self.who)
            elif not self.config.gate.enabled:
                self.releases.set_gate(release.number, GATE_DISABLED, self.who)
            if not host.unit_enabled(colour.unit):
                host.enable_unit(colour.unit)
            self.interrupts.disarm()
        except BaseException as fault:
            reason = _why(fault)
            self.interrupts.disarm()
            progress(f"failed: {reason}; putting back what was on {name}")
            restored = self._restore(colour, earlier, placed, wait=not isinstance(fault, Interrupted))
            if not isinstance(fault, ApplianceError | OSError | Interrupted):
                raise
            raise Failed(f"{title_of(release)} can't be placed on {name}: {reason}; {restored}", **details) from fault
        pruned = self.prune()
        if pruned.outcome != "nothing" or pruned.details["problems"]:
            progress(pruned.message)
        return Result(
            f"{name} holds {title_of(release)}, ready; {len(examples)} examples reproduce"
            f"{', the load test is passed' if tested else ''}. "
            + ("'appliance swap' makes it live" if state else f"'appliance init {name}' makes it live"),
            changed=True,
            details=details,
        )

    def _record_examples(self, release: Release, examples: list[Example]) -> None:
        # What only a deploy needs is loaded by it alone: a rollback is sooner done without.
        from dataclasses import asdict

        from rollout.judge import PASS, Check

        passed = Check("examples", PASS, f"{len(examples)} examples reproduce on each worker")
        self.releases.add_checks(release.number, "deploy", [asdict(passed)])

    def owes_gate(self, number: int) -> bool:
        """Whether a release must pass the load test before users get it.

        Not where they have had it already: an earlier engine kept no verdicts, and the first release has none.
        """
        if not self.config.gate.enabled or self.releases.gate(number) == GATE_PASSED:
            return False
        return not self.routing.has_been_live(number)

    def demand_gate(self, name: str) -> None:
        """Load-test a colour that users are about to get, where that is owed. Raises ApplianceError, OSError.

        The power may have failed during the deploy's own load test, or no colour was live then.
        """
        number = self.number_on(name)
        if number is None or not self.owes_gate(number):
            return
        release, _ = self.check(name, ("ready",))
        progress(f"{title_of(release)} hasn't passed the load test yet, which comes first")
        try:
            self._pass_gate(self.colour(name), release)
        except Refused as fault:
            raise Refused(f"{title_of(release)} doesn't go live: {fault.message}; production is as it was") from fault

    def _gate_placed(self, colour: Colour, release: Release, dry_run: bool, details: dict[str, Any]) -> Result:
        """What is left of a deploy whose release is in its place and well, and only lacks the load test."""
        holds = f"{colour.name} holds {title_of(release)} already and is ready"
        if dry_run:
            return Result(f"{holds}; would put the load test on it, which it hasn't passed yet", details=details)
        progress(f"{holds}, and hasn't passed the load test yet")
        try:
            self._pass_gate(colour, release)
        except Refused as fault:
            # What the colour held before was lost with the deploy that was broken off.
            raise Refused(f"{holds}, but {fault.message}; it doesn't go live: deploy another", **details) from fault
        # Nothing that serves has changed: for site.yml this is a run that changes nothing.
        return Result(f"{holds}; the load test is passed. 'appliance swap' makes it live", details=details)

    def _pass_gate(self, colour: Colour, release: Release) -> None:
        """Load-test a colour that isn't live, and record the verdict. Raises Refused where it isn't passed."""
        from rollout import gate

        outcome = gate.run(self.config, release, f"{self.config.front_door}/test/predict")
        self.releases.add_checks(release.number, "gate", outcome.criteria)
        # A deploy that was broken off in its load test hasn't come to this; before the verdict, which ends it.
        if outcome.passed and not host.unit_enabled(colour.unit):
            host.enable_unit(colour.unit)
        verdict = GATE_PASSED if outcome.passed else GATE_FAILED
        self.releases.set_gate(release.number, verdict, self.who, outcome.reasons)
        if not outcome.passed:
            evaluation = self.config.releases_dir / str(release.number) / "load_test_evaluation.json"
            raise Refused(f"it doesn't pass the load test: {'; '.join(outcome.reasons)} ({evaluation})")

    def _drain(self, colour: Colour) -> None:
        from rollout.drain import drain

        drained = drain(colour, self.config.drain_seconds, progress, lambda: None)
        if drained.note:
            progress(f"what is still in progress on {colour.name} isn't known: {drained.note}")
        elif drained.left:
            progress(f"{drained.left} requests are still in progress on {colour.name} after {drained.seconds} s")

    def prune(self) -> Result:
        """Remove releases, bundles and images that nothing needs any more."""
        from dataclasses import asdict

        from rollout import prune

        present = plan.under_way(self.config.rollout_file, self.routing.read())
        named = {present.source_release, present.target_release} if present else set()
        pruned = prune.Pruned()
        interrupted = None
        try:
            # Docker may take minutes, and for as long as they have the lock nobody could send traffic back.
            prune.prune(
                self.config,
                self.releases,
                self.routing,
                self.config.keep_releases,
                {n for n in named if n},
                pruned,
                images=present is None,
            )
        except Interrupted as signal:
            interrupted = signal.signal_name
            pruned.problems.append(f"interrupted by {interrupted}: run it again for the rest")
        problems = f"; {'; '.join(pruned.problems)}" if pruned.problems else ""
        later = "" if present is None else "; images aren't looked at before the rollout has ended"
        removed = bool(pruned.releases or pruned.bundles or pruned.images)
        if interrupted and not removed:
            raise Failed(f"interrupted by {interrupted}; nothing was removed yet")
        return Result(
            pruned.describe() + later + problems,
            ok=interrupted is None,
            changed=removed,
            outcome="done" if removed else "nothing",
            exit_status=0 if interrupted is None else 1,
            details=asdict(pruned),
        )

    def _deploy_on_live(
        self, name: str, placed: Release | None, same: bool, title: str, details: dict[str, Any]
    ) -> Result:
        holds = title_of(placed) if placed else "its release"
        if same:
            return Result(f"{holds} is live already, on {name}: nothing to do", outcome="nothing", details=details)
        return Result(
            f"{name} is live and keeps {holds}; {title} isn't placed: swap to {self.config.other(name)} first, "
            f"then run this again",
            outcome="nothing",
            details=details | {"pending": True},
        )

    def _placed(self, name: str) -> Release | None:
        """The release that a colour holds, as far as it can be read: a deploy replaces what can't."""
        try:
            number = self.releases.placed(name)
            return self.releases.get(number) if number else None
        except Failed as fault:
            progress(fault.message)
            return None

    def _is_well(self, colour: Colour, placed: Release, examples: list[Example]) -> bool:
        try:
            colour.check(placed, examples, ("ready",))
            return True
        except Refused as fault:
            progress(f"{colour.name} holds {title_of(placed)} already, but: {fault.message}")
            return False

    def _restore(self, colour: Colour, earlier: bytes | None, placed: Release | None, wait: bool) -> str:
        """Put the colour's earlier release back; returns what came of it in words, and raises nothing foreseeable."""
        timeout = self.config.ready_timeout_seconds
        try:
            if earlier is None:
                host.stop_unit(colour.unit, timeout)
                host.run(["systemctl", "reset-failed", colour.unit])
                self.releases.put_back(colour.name, None)
                return f"{colour.name} is empty again and its unit is stopped"
            self.releases.put_back(colour.name, earlier)
            if placed is None or not wait:
                complaint = host.restart_unit(colour.unit, timeout)
                title = title_of(placed) if placed else "the earlier env file"
                return f"{title} was put back" + (f", but doesn't start: {complaint}" if complaint else " and started")
            colour.restart_and_wait(placed, timeout, progress)
            return f"{title_of(placed)} was put back and is ready"
        except ApplianceError as fault:
            return f"putting the earlier release back failed too: {fault.message}"
        except OSError as error:
            return f"putting the earlier release back failed too: {describe_os_error(error).message}"

    # init, swap, rollback

    def init(self, name: str) -> Result:
        """Make a colour live where none has ever been live; otherwise do nothing."""
        self.colour(name)
        state = self.routing.read()
        if state is not None:
            advice = "" if state.live == name else "; 'appliance swap' changes the live colour"
            return Result(
                f"{state.live} is live already{advice}",
                outcome="nothing",
                details={"live": state.live, "state": state.number},
            )
        release, examples = self.check(name, ("ready",))
        return self.switch("init", name, release, examples, None)

    def swap(self, to: str | None = None, *, dry_run: bool = False) -> Result:
        """Check the idle colour, make it live, verify through the front door; switch back where that fails."""
        if to is not None:
            self.colour(to)
        state = self.routing.read()
        if state is None:
            raise Refused(f"no colour is live: run 'appliance init {to or self.config.colours[0]}' first")
        target = to or self.config.other(state.live)
        if target == state.live:
            return Result(
                f"{target} is live already",
                outcome="nothing",
                details={"live": target, "state": state.number},
            )
        if not dry_run:
            self.demand_gate(target)
        release, examples = self.check(target, ("ready",))
        if dry_run:
            owed = self.owes_gate(release.number)
            return self.would_switch("swap", target, release, examples, state, owed=owed)
        return self.switch("swap", target, release, examples, state)

    def would_switch(
        self, command: str, target: str, release: Release, examples: list[Example], state: State, *, owed: bool = False
    ) -> Result:
        """What a dry run of a switch answers, once all checks have passed; `owed`: but for the load test."""
        self.front_door.open_held(_request_body(examples), _patience(command)).close()
        first = "put the load test on it, which it hasn't passed yet, and " if owed else ""
        return Result(
            f"would {first}make {target} live: {title_of(release)}, ready, {len(examples)} examples reproduce",
            details={"live": state.live, "state": state.number, "release": release.number, "would_change": True},
        )

    def rollback(self, *, dry_run: bool = False) -> Result:
        """Switch back to the colour, with the release, that was live before the last switch."""
        state = self.routing.read()
        if state is None:
            raise Refused("nothing to roll back to: no colour has ever been live")
        if state.previous is None:
            raise Refused(f"nothing to roll back to: {state.live} is the only colour that has been live")
        target = state.previous
        holds = self.releases.placed(target)
        if holds != state.previous_release:
            raise Refused(
                f"can't roll back: {target} was live with release {state.previous_release} and now holds "
                f"{f'release {holds}' if holds else 'nothing'}; 'appliance rollback --to {state.previous_release}' "
                f"(playbooks/rollback.yml -e to={state.previous_release}) places that one there again, as long as it "
                f"is kept, and makes it live"
            )
        try:
            release, examples = self.check(target, HEALTHY, urgent=True)
        except Refused as fault:
            raise Refused(f"can't roll back to {target}: {fault.message}") from fault
        if dry_run:
            return self.would_switch("rollback", target, release, examples, state)
        became_live = self.routing.became_live(state.live)
        result = self.switch("rollback", target, release, examples, state)
        if became_live is not None and became_live.command == "rollback":
            result.message += (
                f"; {target} HAD BEEN LEFT by a rollback at {became_live.since}, which this one undoes: another one "
                f"goes back to {state.live}"
            )
        return result

    def check(self, name: str, accept: tuple[str, ...], *, urgent: bool = False) -> tuple[Release, list[Example]]:
        """All that must be true of a colour before it becomes live. Raises ApplianceError.

        Where it is `urgent`, it is enough that Docker doesn't deny the image: a colour that serves can do without.
        """
        colour = self.colour(name)
        number = self.releases.placed(name)
        if number is None:
            raise Refused(f"{name} is empty: deploy a release to it first")
        release = self.releases.get(number)
        progress(f"checking {name}: {title_of(release)}")
        directory = Path(release.bundle)
        examples = bundles.load_examples(directory, release.bundle_digest)
        colour.check(release, examples, accept)
        try:
            if urgent:
                host.image_id(release.image_id, _URGENT_SECONDS)
            else:
                host.image_id(release.image_id)
        except Refused:
            raise Refused(
                f"{name}: the image {release.image} of release {number} ({release.image_id[:19]}) isn't on this host "
                f"any more, so {name} couldn't start again: deploy to {name} again"
            ) from None
        except Failed as fault:
            if not urgent:
                raise
            progress(f"going on although {fault.message}")
        return release, examples

    def switch(
        self, command: str, target: str, release: Release, examples: list[Example], state: State | None
    ) -> Result:
        """Make `target` live and verify it; `state` is the present state. Raises Failed after switching back."""
        started = time.monotonic()
        body = _request_body(examples)
        held = self.front_door.open_held(body, _patience(command))
        numbers = {name: self.number_on(name) for name in self.config.colours}
        wanted = State(
            live=target,
            since=now(),
            who=self.who,
            reason=self.reason,
            command=command,
            previous=state.live if state else None,
            previous_release=numbers[state.live] if state else None,
            releases=numbers,
            maintenance=state.maintenance if state else False,
        )
        # Signals wait from here to the verdict and are looked at between two requests, so that no switch is left
        # neither verified nor undone.
        with self.interrupts.hold():
            try:
                change = self.routing.switch_back if command == "rollback" else self.routing.switch
                written, moment = change(wanted)
                found = self.front_door.verify(
                    target, body, self.config.verify_requests, held, moment, self.interrupts.check
                )
                self.interrupts.disarm()
            except BaseException as fault:
                self.interrupts.disarm()
                self._undo(fault, command, target, state, body)
                raise
            finally:
                held.close()
        # The instant of the rename as wall-clock time, for whoever measures from outside this process.
        switched_at = time.time() - (time.monotonic() - moment)
        self._prune()
        return self._switched(command, written, release, found, switched_at, time.monotonic() - started)

    def _switched(
        self, command: str, state: State, release: Release, found: Verification, switched_at: float, seconds: float
    ) -> Result:
        what = "rolled back: " if command == "rollback" else ""
        return Result(
            f"{what}{state.live} is live: {title_of(release)}; first answer {found.first_ms:g} ms after the switch, "
            f"{found.requests} requests verified, {seconds:.2f} s altogether",
            changed=True,
            details={
                "live": state.live,
                "previous": state.previous,
                "state": state.number,
                "release": release.number,
                "switch_ms": found.first_ms,
                "switched_at": round(switched_at, 6),
                "seconds": round(seconds, 3),
                "requests": found.requests,
            },
        )

    def _undo(self, fault: BaseException, command: str, target: str, state: State | None, body: bytes) -> None:
        """Return to `state` where the link has been changed already. Raises Failed for a foreseeable fault."""
        present = self.routing.read()
        reason = _why(fault)
        if (present.number if present else None) == (state.number if state else None):
            if isinstance(fault, ApplianceError | OSError | Interrupted):
                raise Failed(f"no switch: {reason}; production is as it was") from fault
            return
        progress(f"failed: {reason}; switching back")
        causes = {Interrupted: "interrupted", FrontDoorGone: "front door"}
        cause = causes.get(type(fault), "verification")
        details: dict[str, Any] = {"live": state.live if state else None, "cause": cause}
        try:
            if state is None:
                self.routing.clear()
                outcome = "no colour is live, as before"
            else:
                details["state"] = self._switch_back(command, target, state)
                wrong = self.front_door.answers_as(state.live, body)
                outcome = f"switched back to {state.live}" + (
                    f", which answers wrongly, too: {wrong}" if wrong else ", which answers"
                )
        except OSError as error:
            raise Failed(
                f"{target} failed after the switch: {reason}; AND SWITCHING BACK FAILED: "
                f"{describe_os_error(error).message}; {target} IS LIVE: run 'appliance status', then "
                f"'appliance rollback'",
                live=target,
            ) from fault
        if isinstance(fault, ApplianceError | OSError | Interrupted):
            raise Failed(f"{target} failed after the switch: {reason}; {outcome}", **details) from fault

    def _switch_back(self, command: str, target: str, state: State) -> int:
        why = f"{command} to {target} failed"
        present = self.routing.read()
        if present is not None and present.number < state.number:
            # A full disk had sent the rollback to an older state. Anything that cleans up before this one is the
            # present one again would take it for what a crash left.
            self.routing.point_to(state.number)
            return state.number
        # It has become live by what made it so before, and not by what has failed.
        back = state._replace(since=now(), who=self.who, reason=why)
        try:
            return self.routing.switch(back)[0].number
        except OSError:
            # A full disk: the state directory of before is still there and complete.
            self.routing.point_to(state.number)
            return state.number

    def example_of(self, name: str) -> bytes:
        """The body of a request that a colour must be able to answer. Raises ApplianceError."""
        release = self.releases.get(self.releases.placed(name) or 0)
        return _request_body(bundles.load_examples(Path(release.bundle), release.bundle_digest))

    def number_on(self, name: str) -> int | None:
        """The number of the release that a colour holds, or None."""
        placed = self._placed(name)
        return placed.number if placed else None

    def _prune(self) -> None:
        try:
            self.routing.prune()
        except (OSError, ApplianceError) as error:
            progress(f"old routing states weren't removed: {error}")


def title_of(release: Release) -> str:
    return f"{release.name} {release.version}, release {release.number}"


def _patience(command: str) -> float | None:
    """The seconds that a command waits for what it can do without; None: no limit of its own."""
    return _URGENT_SECONDS if command == "rollback" else None


def _request_body(examples: list[Example]) -> bytes:
    return json.dumps(examples[0].request).encode()


def _why(fault: BaseException) -> str:
    if isinstance(fault, Interrupted):
        return f"interrupted by {fault.signal_name}"
    if isinstance(fault, ApplianceError):
        return fault.message
    if isinstance(fault, OSError):
        return describe_os_error(fault).message
    return f"{type(fault).__name__}: {fault}"


def _as_result(fault: ApplianceError) -> Result:
    return Result(
        fault.message,
        ok=False,
        outcome=fault.outcome,
        exit_status=fault.exit_status,
        details=dict(fault.details),
    )
