"""Rollouts: a canary in steps, the bake after it, and the ways out. `watch` carries them out.

Everything here runs under the lock, inside `Engine.run`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from rollout import audit, host, plan, requestmark
from rollout.colour import HEALTHY
from rollout.errors import ApplianceError, Failed, NotHealthy, Refused, UsageError, describe_os_error
from rollout.operations import Engine, title_of
from rollout.plan import Plan
from rollout.report import Result, progress
from rollout.routing import State
from rollout.text import now


class Rollouts:
    """The commands that concern a rollout. Each returns a Result, or raises ApplianceError or OSError."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config = engine.config
        self.routing = engine.routing

    def under_way(self) -> tuple[Plan, State] | None:
        """The rollout under way and the present routing state; None where there is none."""
        state = self.routing.read()
        found = plan.under_way(self.config.rollout_file, state)
        return (found, state) if found is not None and state is not None else None

    def _needed(self) -> tuple[Plan, State]:
        found = self.under_way()
        if found is None:
            raise Refused("no rollout is under way: 'appliance status' tells what is live")
        return found

    def _write(self, changed: Plan) -> Plan:
        plan.write(self.config.rollout_file, changed)
        return changed

    def end(self, ended: Plan, phase: str, reason: str | None = None) -> Plan:
        """Record how a rollout ended. Raises OSError where that can't be written; it is over all the same."""
        over = ended._replace(phase=phase, reason=reason, ended=now(), asked=None, paused=False)
        try:
            return self._write(over)
        except OSError:
            # Where a full disk leaves the routing state of before, the old plan would fit it: it would go on.
            plan.close(self.config.rollout_file, over)
            raise

    def _end_after(self, result: Result, ended: Plan, phase: str, reason: str | None = None) -> Result:
        """Record how a rollout ended after its switch, which is `result`: what has happened isn't failed by its record.

        What is on record then is no more than that it is over, and why.
        """
        try:
            self.end(ended, phase, reason)
        except OSError as error:
            result.message += f"; the rollout's end isn't recorded: {describe_os_error(error).message}"
        return result

    # Beginning

    def canary(self, to: str | None, steps: tuple[int, ...] | None = None, *, dry_run: bool = False) -> Result:
        """Give the idle colour its first share of users; `appliance watch` goes on from there."""
        found = self.under_way()
        if found:
            raise Refused(_in_the_way(*found))
        state = self.routing.read()
        if state is None:
            raise Refused(f"no colour is live: run 'appliance init {to or self.config.colours[0]}' first")
        target = self.engine.colour(to or self.config.other(state.live)).name
        if target == state.live:
            return Result(f"{target} is live already", outcome="nothing", details={"live": target})
        if not dry_run:
            self.engine.demand_gate(target)
        release, examples = self.engine.check(target, ("ready",))
        steps = steps or self.config.canary_steps
        fresh = self._plan(state, target, release.number, steps)
        if dry_run:
            owed = self.engine.owes_gate(release.number)
            first = "put the load test on it, which it hasn't passed yet, and " if owed else ""
            shares = ", ".join(f"{step} %" for step in steps)
            return Result(
                f"would {first}give {target} ({title_of(release)}) {shares} of users, "
                f"{self.config.canary_step_seconds:g} s each, and watch it for {self.config.bake_seconds:g} s after",
                details={"live": state.live, "would_change": True},
            )
        if steps[0] == 100:
            return self.go_live("canary", fresh, state)
        with self.engine.interrupts.hold():
            self._start_watch()
            written = fresh._replace(state=self._next_state())
            try:
                self._write(written)
                self.set_split(state, steps[0], "canary")
            except BaseException as fault:
                self._fall_back(fresh, state.number, str(fault))
                raise
            self.engine.interrupts.disarm()
        return Result(
            f"{target} ({title_of(release)}) serves {steps[0]} % of users; 'appliance follow' shows how it goes on, "
            f"'appliance abort' sends everybody back to {state.live}",
            changed=True,
            details={"live": state.live, "release": release.number, "state": written.state, "rollout": written.number},
        )

    def _plan(self, state: State, target: str, target_release: int, steps: tuple[int, ...]) -> Plan:
        last = plan.read(self.config.rollout_file)
        again = last is not None and (last.target, last.target_release) == (target, target_release)
        return Plan(
            number=last.number + 1 if last else 1,
            source=state.live,
            target=target,
            source_release=self.engine.number_on(state.live),
            target_release=target_release,
            phase=plan.CANARY,
            first=state.number,
            before=state.number,
            state=state.number,
            mark=f"{requestmark.of(self.config.runtime_dir)}{os.urandom(4).hex()}-",
            who=self.engine.who,
            since=now(),
            steps=steps,
            boot=host.boot(),
            earlier=last.taken_back if last and again else None,
        )

    def swap(self, to: str | None = None, *, dry_run: bool = False) -> Result:
        """Make the idle colour live at once, and have it watched."""
        found = self.under_way()
        if found and found[0].phase == plan.CANARY:
            raise Refused(_in_the_way(*found))
        state = self.routing.read()
        if dry_run or state is None or not self.config.bake_seconds:
            return self.engine.swap(to, dry_run=dry_run)
        target = self.engine.colour(to or self.config.other(state.live)).name
        if target == state.live:
            return self.engine.swap(to)
        self.engine.demand_gate(target)
        return self.go_live("swap", self._plan(state, target, self.engine.number_on(target) or 0, ()), state)

    def _next_state(self) -> int:
        self.routing.clean()
        return self.routing.next_number()

    def _start_watch(self) -> None:
        """Before a plan is on record, so that none ever is without its watch. Raises Failed."""
        # It waits for the lock before it looks at anything, and so for the plan.
        unit = self.config.rollout_unit
        complaint = host.start_soon(unit)
        if complaint:
            raise Failed(f"{unit} can't be started, so nobody would watch: {complaint}; run site.yml again")

    # Going on

    def set_split(self, state: State, percent: int, command: str) -> State:
        """Give the idle colour `percent` of the users, which the plan has on record already. Raises OSError."""
        wanted = state._replace(
            split=percent, since=now(), who=self.engine.who, reason=self.engine.reason, command=command
        )
        return self.routing.switch(wanted)[0]

    def go_live(self, command: str, present: Plan, state: State) -> Result:
        """Make the plan's target live. The plan is on record before, so that a crash in between leaves it watched."""
        # Whoever began the plan has seen to the load test: it mustn't come between a canary's step and the next.
        try:
            release, examples = self.engine.check(present.target, ("ready",))
        except Refused as fault:
            fault.details["unfit"] = present.target
            raise
        watched = present._replace(phase=plan.BAKE, before=state.number, state=self._next_state(), asked=None)
        self._start_watch()
        try:
            self._write(watched)
            result = self.engine.switch(command, present.target, release, examples, state)
        except BaseException as fault:
            back = self.routing.read()
            if back is None or back.live != present.target:
                self._fall_back(present, back.number if back else state.number, str(fault))
            # Where it is live all the same, for no way led back, it stays in its bake: the watch tries again.
            raise
        if not self.config.bake_seconds:
            return self._end_after(result, watched, plan.DONE)
        result.message += (
            f"; watched for {self.config.bake_seconds:g} s, in which a failure brings {present.source} back"
        )
        result.details["rollout"] = watched.number
        return result

    def _fall_back(self, present: Plan, number: int, reason: str) -> None:
        """Go back to the plan from before a switch that failed; `number` is the present routing state's."""
        fallen = present._replace(before=number, state=number)
        try:
            # A canary that has had users goes on.
            if present.state == present.first:
                self.end(fallen, plan.ABORTED, reason)
            else:
                self._write(fallen)
        except OSError as error:
            # The watch settles a switch that isn't there; why there is none must still be told.
            progress(f"the rollout's end isn't recorded: {describe_os_error(error).message}")

    def advance(self, number: int) -> Result:
        """The next step of rollout `number`: a larger share, live, or done."""
        present, state = self._needed()
        if present.number != number:
            raise Refused(f"rollout {number} isn't under way any more")
        if present.unswitched(state):
            raise Refused(present.describe(state))
        if present.phase == plan.BAKE:
            self.end(present, plan.DONE)
            return Result(
                f"done: {present.target} (release {present.target_release}) stays live",
                changed=True,
                details={"live": present.target, "release": present.target_release, "state": state.number},
            )
        if present.paused:
            return Result(present.describe(state), outcome="nothing")
        # A full disk may have kept a step on record that was never made: then it is made now.
        made = state.split == present.percent
        step = len(present.steps) - 1 if present.asked == "promote" else present.step + made
        percent = present.steps[step]
        if percent == 100:
            return self.go_live("promote", present, state)
        moved = present._replace(step=step, before=state.number, state=self._next_state())
        try:
            self._write(moved)
            self.set_split(state, percent, "canary")
        except OSError as fault:
            back = self.routing.known()
            if back is None or back.number == state.number:
                self._fall_back(present, state.number, str(fault))
            raise
        return Result(
            moved.describe(),
            changed=True,
            details={"live": state.live, "release": present.target_release, "state": moved.state},
        )

    def leave(self, number: int, reason: str) -> Result:
        """End the bake of rollout `number`, about which nothing can be said: its colour serves all, and stays live."""
        present, state = self._needed()
        if present.number != number or state.live != present.target:
            raise Refused(f"rollout {number} isn't under way any more")
        result = Result(
            f"unjudged: {present.target} (release {present.target_release}) stays live, {reason}",
            ok=False,
            changed=True,
            outcome=plan.UNJUDGED,
            exit_status=1,
            details={"live": present.target, "release": present.target_release, "state": state.number},
        )
        return self._end_after(result, present, plan.UNJUDGED, reason)

    def order(self, what: str) -> Result:
        """Pause, resume or promote the rollout under way; `appliance watch` carries it out."""
        present, state = self._needed()
        details = {"live": state.live, "state": state.number, "release": present.target_release}
        if what == "promote" and present.unswitched(state):
            self._start_watch()
            raise Refused(
                f"can't be promoted: {present.describe(state)}; its watch settles that now; look at "
                f"'appliance status', then promote or swap again"
            )
        if what == "promote":
            changed = present._replace(asked="promote", paused=False)
        elif present.phase != plan.CANARY:
            raise Refused(f"only a canary can be paused; {present.describe(state)}")
        else:
            changed = present._replace(paused=what == "pause")
        if changed != present:
            self._write(changed)
        # It may have been stopped where there was no way back.
        self._start_watch()
        if changed == present:
            return Result(f"nothing to do; {present.describe(state)}", outcome="nothing", details=details)
        ends = "; that ends here" if what == "promote" and present.phase == plan.BAKE else ""
        return Result(f"{what} is on record; {changed.describe(state)}{ends}", changed=True, details=details)

    # Back

    def abort(self) -> Result:
        """Send all traffic back to the colour that the rollout came from, by hand."""
        present, _ = self._needed()
        return self.give_back(present.number, plan.ABORTED, self.engine.reason or "by hand", "by hand")

    def give_back(self, number: int, phase: str, reason: str, cause: str) -> Result:
        """Send all traffic back. `cause` is a word for the metrics. Raises Failed where there is no way back, Refused
        where a share of the users is better off where it is.

        A rollout whose colour never got any has nothing to send back: it is aborted, and nothing is counted.
        The result isn't ok, with exit status 3, where the colour that traffic is back on doesn't answer.
        """
        present, state = self._needed()
        if present.number != number:
            raise Refused(f"rollout {number} isn't under way any more")
        stays = state.live == present.source
        if not stays:
            self._check_way_back(present, reason)
        else:
            self._check_share(state, "promote")
        wanted = self._way_back(present, state, reason)
        body, wrong = self._example(present.source)
        number, moment = state.number, None
        goes_back = not stays or state.split > 0
        if goes_back:
            try:
                written, moment = self.routing.switch(wanted)
                number = written.number
            except OSError:
                # A full disk: a state that leads back is there and complete.
                number = self.routing.way_back(wanted) or present.first
                moment = self.routing.point_to(number)
        ended = present._replace(before=number, state=number, cause=cause if goes_back else None)
        phase = phase if goes_back else plan.ABORTED
        try:
            ended = self.end(ended, phase, reason)
        except OSError as error:
            # Traffic is back, which is what counts.
            ended = ended._replace(phase=phase, reason=f"{reason}; not recorded: {error.strerror}")
        result = Result(
            f"{ended.describe()}; all traffic is {'back' if goes_back else 'still'} on {present.source}",
            changed=True,
            details={
                "live": present.source,
                "state": number,
                "release": present.source_release,
                "cause": ended.cause,
            },
        )
        return self._ask_after(result, present.source, moment, body, wrong)

    def _example(self, colour: str) -> tuple[bytes, str | None]:
        """What to ask a colour after a switch, read before it so that this doesn't count as its time; else why not."""
        try:
            return self.engine.example_of(colour), None
        except ApplianceError as fault:
            return b"", fault.message

    def _ask_after(self, result: Result, colour: str, moment: float | None, body: bytes, wrong: str | None) -> Result:
        """Add to the result of a switch to `colour` whether it answers, and how soon after it.

        `moment` is the switch's, in monotonic seconds; `wrong` is why the colour can't be asked, else `body` is what.
        """
        wrong = wrong or self.engine.front_door.answers_as(colour, body)
        first_ms = None if wrong or moment is None else round((time.monotonic() - moment) * 1000, 1)
        if wrong:
            result.message += f", WHICH DOESN'T ANSWER: {wrong}"
            result.ok, result.exit_status = False, NotHealthy.exit_status
        elif first_ms is not None:
            result.message += f"; first answer {first_ms:g} ms after the switch"
        at = None if moment is None else round(time.time() - (time.monotonic() - moment), 6)
        result.details |= {"switch_ms": first_ms, "switched_at": at}
        return result

    def _check_share(self, state: State, command: str) -> None:
        """Raise Refused where the live colour is worse off than the one that has a share of its users."""
        better = self._better_off(state)
        if better:
            raise Refused(f"{better}: {self._to_all(state, command)}")

    def _to_all(self, state: State, command: str) -> str:
        """What gives the idle colour all users; `promote` and `swap` ask for more than a share does."""
        when = "" if self._status(self.config.other(state.live)) == "ready" else " once it is ready"
        return f"'appliance {command}' gives it to all{when}"

    def _better_off(self, state: State) -> str | None:
        """Why users who have a share of the idle colour would lose by going back, or None."""
        idle = self.config.other(state.live)
        live = self._status(state.live) if state.split else HEALTHY[0]
        if live in HEALTHY or self._status(idle) not in HEALTHY:
            return None
        return f"{state.live} is {live}, and {idle} serves {state.split} % of the users, who would lose it"

    def _way_back(self, present: Plan, state: State, reason: str | None) -> State:
        """The routing state that sends all traffic back from `state`."""
        stays = state.live == present.source
        return state._replace(
            live=present.source,
            split=0,
            since=now(),
            who=self.engine.who,
            reason=reason,
            command="rollback",
            previous=state.previous if stays else present.target,
            previous_release=state.previous_release if stays else present.target_release,
        )

    def _check_way_back(self, present: Plan, reason: str) -> None:
        """Raise Failed where the old colour is worse off than the new one, and end the plan."""
        problem, release = None, present.source_release
        # Which release the old colour had may not have been known.
        if release is not None and self.engine.number_on(present.source) != release:
            problem = f"{present.source} doesn't hold release {release} any more"
        else:
            source = self._status(present.source)
            # The new colour may hang: it is asked only where that matters.
            if source not in HEALTHY and self._status(present.target) in HEALTHY:
                problem = f"{present.source} is {source}"
        if problem:
            try:
                self.end(present, plan.ABORTED, f"{reason}; no way back: {problem}")
            except OSError as error:
                progress(f"the rollout's end isn't recorded: {describe_os_error(error).message}")
            raise Failed(
                f"{present.target} stays live although {reason}: {problem}; look at both with 'appliance status'"
            )

    def _status(self, colour: str) -> str:
        try:
            return self.engine.colour(colour).health().status
        except ApplianceError:
            return "down"

    def rollback(self, to: int | None = None, *, dry_run: bool = False) -> Result:
        """Back to the colour that was live before, or to release `to`: the way out of a rollout, too."""
        found = self.under_way()
        if to is not None:
            return self._rollback_to(to, dry_run=dry_run)
        # A promotion that died before its switch is a canary to its users.
        if found and (found[0].phase == plan.CANARY or 0 < found[0].percent_by(found[1]) < 100):
            if dry_run:
                self._check_share(found[1], "promote")
                return Result(f"would send everybody back to {found[0].source}", details={"would_change": True})
            reason, number = self.engine.reason or "rolled back by hand", found[0].number
            return self.engine.whole(lambda: self.give_back(number, plan.ROLLED_BACK, reason, "by hand"))
        state = self.routing.read()
        if not found and state is not None and state.split:
            return self.engine.whole(lambda: self._end_split(state, dry_run=dry_run))
        self._refuse_what_went_back()
        result = self.engine.rollback(dry_run=dry_run)
        if found and result.changed:
            if found[0].unswitched(found[1]):
                # No traffic goes back from its colour, which may even be the one that is live now.
                return self._end_after(result, found[0], plan.SUPERSEDED, "rolled back by hand before its switch")
            reason = self.engine.reason or "rolled back by hand"
            return self._end_after(result, found[0]._replace(cause="by hand"), plan.ROLLED_BACK, reason)
        return result

    def _end_split(self, state: State, *, dry_run: bool) -> Result:
        """Everybody back from a share that was given by hand: the colour that has it may never have been live."""
        self._check_share(state, "swap")
        if dry_run:
            details = {"live": state.live, "would_change": True}
            return Result(f"would send everybody back to {state.live}", details=details)
        body, wrong = self._example(state.live)
        wanted = state._replace(
            split=0, since=now(), who=self.engine.who, reason=self.engine.reason, command="rollback"
        )
        written, moment = self.routing.switch_back(wanted)
        result = Result(
            f"rolled back: {self.config.other(state.live)} serves none of the {state.split} % that it was given, and "
            f"everybody is on {state.live} again",
            changed=True,
            details={"live": state.live, "state": written.number},
        )
        result = self._ask_after(result, state.live, moment, body, wrong)
        if state.previous:
            result.message += f"; another 'appliance rollback' goes back from {state.live}"
        return result

    def _refuse_what_went_back(self) -> None:
        """Raise Refused where a rollback would return to what a rollout took traffic from."""
        last, state = plan.read(self.config.rollout_file), self.routing.read()
        why = last.taken_back if last else None
        if last is None or state is None or why is None:
            return
        if (state.previous, state.previous_release) == (last.target, last.target_release):
            number = last.target_release
            raise Refused(
                f"can't roll back to {last.target}: traffic went back from its release {number} to {last.source} "
                f"already ({why}); 'appliance rollback --to RELEASE' goes to an older release, and "
                f"--to {number} to this one all the same"
            )

    def _rollback_to(self, number: int, *, dry_run: bool) -> Result:
        """Make release `number` live; it is placed on the idle colour again where no colour holds it."""
        found, state = self.under_way(), self.routing.read()
        if state is None:
            raise Refused("nothing to roll back to: no colour has ever been live")
        idle = self.config.other(state.live)
        if self.engine.number_on(state.live) == number and not found:
            return Result(f"{state.live} is live with release {number} already", outcome="nothing")
        if found:
            raise Refused(_in_the_way(*found))
        release = self.engine.releases.get(number)
        if self.engine.owes_gate(number) and not self._was_live(number):
            raise Refused(
                f"can't roll back to release {number}: it has never been live and hasn't passed the load test; "
                f"'appliance deploy {idle} --bundle {release.bundle} --image {release.image}' puts that on it, and "
                f"'appliance swap' makes it live then"
            )
        if self.engine.number_on(idle) != number:
            placed = self.engine.deploy(idle, Path(release.bundle), release.image_id, gated=False, dry_run=dry_run)
            if dry_run:
                return placed
            if placed.details.get("pending"):
                raise Refused(placed.message)
            progress(f"{placed.message}; it has the settings of today")
        release, examples = self.engine.check(idle, HEALTHY, urgent=True)
        if dry_run:
            return self.engine.would_switch("rollback", idle, release, examples, state)
        return self.engine.switch("rollback", idle, release, examples, state)

    def _was_live(self, number: int) -> bool:
        """Whether a release was live before all routing states that are kept; a rollback has no load test to ask."""
        entries = audit.read(self.config.audit_file)
        return any(entry.get("release") == number and audit.has_switched(entry) for entry in entries)

    def settle(self, reason: str) -> Result:
        """Send traffic back where a rollout is under way that nobody watches any more."""
        found = self.under_way()
        if found is None:
            return Result("no rollout is under way", outcome="nothing")
        present, state = found
        progress(f"{present.describe(state)}, and nobody watches it: {reason}")
        better = self._better_off(state) if present.unswitched(state) else None
        if better:
            return self._stay(present, state, f"{reason}; {better}")
        return self.give_back(present.number, plan.ROLLED_BACK, reason, "unwatched")

    def _stay(self, present: Plan, state: State, reason: str) -> Result:
        """End a promotion that died before its switch, where users mustn't lose the share that they have."""
        stays = present._replace(phase=plan.CANARY, before=state.number, state=state.number)
        if not present.steps or present.before == present.first:
            # The share is one that was given by hand before.
            text = f"{self.end(stays, plan.ABORTED, reason).describe()}: {self._to_all(state, 'swap')}"
        else:
            text = f"{self._write(stays).describe(state)}: {reason}"
        details = {"live": state.live, "state": state.number, "release": present.target_release}
        return Result(text, changed=True, details=details)

    # By hand

    def split(self, percent: int) -> Result:
        """Give the idle colour a share of the users until it is changed; nobody watches."""
        state, share = self.routing.read(), _percentage(percent, 99)
        if state is not None and share and share != state.split and not self.under_way():
            self.engine.demand_gate(self.config.other(state.live))
        return self.engine.whole(lambda: self._change("split", split=share))

    def shadow(self, percent: int) -> Result:
        """Have a share of requests copied, so that both colours' answers are compared."""
        return self._change("shadow", shadow=_percentage(percent, 100))

    def maintenance(self, on: bool) -> Result:
        """Answer clients with 503, or serve them again."""
        return self._change("maintenance", maintenance=on)

    def _change(self, command: str, **changes: int | bool) -> Result:
        state = self.routing.read()
        if state is None:
            raise Refused("no colour is live: deploy a release and run 'appliance init COLOUR'")
        found = self.under_way()
        if found and command == "split":
            raise Refused(_in_the_way(*found))
        said = _said(state._replace(**changes), self.config.other(state.live))
        if state._replace(**changes) == state:
            return Result(f"{said[command]} already", outcome="nothing", details={"state": state.number})
        if command != "maintenance" and any(changes.values()):
            self.engine.check(self.config.other(state.live), ("ready",))
        wanted = state._replace(**changes, since=now(), who=self.engine.who, reason=self.engine.reason, command=command)
        back = None
        if found:
            # Made now, since a full disk may not take it when traffic must go back.
            back = self._way_back(found[0], wanted, wanted.reason)
            self._write(found[0]._replace(before=state.number, state=self._next_state() + 1))
        written, _ = self.routing.switch(wanted, back)
        return Result(said[command], changed=True, details={"live": state.live, "state": written.number})


def _percentage(value: int, highest: int) -> int:
    if not 0 <= value <= highest:
        hint = "; 'appliance swap' gives all users to the idle colour" if highest < 100 else ""
        raise UsageError(f"{value} isn't a percentage from 0 to {highest}{hint}")
    return value


def _said(state: State, idle: str) -> dict[str, str]:
    copied = f"{state.shadow} % of requests are copied to {idle} and compared"
    return {
        "split": f"{idle} serves {state.split} % of users",
        "shadow": copied if state.shadow else "no request is copied",
        "maintenance": "in maintenance: clients get 503" if state.maintenance else "clients are served",
    }


def _in_the_way(present: Plan, state: State) -> str:
    return (
        f"a rollout is under way: {present.describe(state)}; 'appliance promote' ends it well, 'appliance abort' sends "
        f"everybody back to {present.source}"
    )
