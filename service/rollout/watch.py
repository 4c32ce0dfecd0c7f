"""`appliance watch`: carries out the rollout under way, judging the new colour every second. A systemd unit runs it."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

from rollout import accesslog, bundles, files, host, judge, plan, requestmark
from rollout.accesslog import AccessLog
from rollout.colour import HEALTHY, Colour, Health
from rollout.config import Config
from rollout.errors import ApplianceError, LockHeld
from rollout.frontdoor import FrontDoor
from rollout.interrupts import Interrupts
from rollout.judge import FAIL, NO_DATA, PASS, Check, Window
from rollout.operations import Engine
from rollout.plan import Plan
from rollout.report import Result, progress
from rollout.rollouts import Rollouts
from rollout.routing import State
from rollout.text import tidy
from rollout.unixhttp import ExchangeError, UnixConnection, exchange

_TICK_SECONDS = 1.0
_LOCK_SECONDS = 60.0
_AGAIN_SECONDS = 10.0
# The metrics are never older, and at once as they are where a verdict changes.
_METRICS_SECONDS = 15.0
# Counts of the shadow's results that say how the colours compare.
_COMPARED = ("agree", "differ", "error_idle")
# So many failed requests of clients are looked at even where there are few requests altogether, and so many of our own
# without an answer where the other colour answers them.
_ENOUGH_ERRORS = 3
# In a bake the times of clients are compared with those of another time, in which there was another load. So long they
# condemn nobody, or for half of a shorter bake: bursts are over by then. Errors and health count from the first moment.
_SETTLING_SECONDS = 15.0
# Where more than such a share of the time in which the host's programs would have run went elsewhere, what takes longer
# may do so for that, up to so many times what the lacking time itself explains: the rest is queues.
_STOLEN_SHARE = 0.1
_STOLEN_RATIO = 2.0
# After a boot, or after what hit both colours, the new one may be ready later than the old one. For so long the errors
# of its clients condemn it as little as its health does.
_STARTING_SECONDS = 10.0
# Our own requests to the new colour get so many times as long as the old one's slowest answer took, and at least this.
_SYNTHETIC_RATIO = 5.0
_SYNTHETIC_SECONDS = 2.0


class _Later(Interrupts):
    """Signals wait: the watch looks for them between two commands."""

    def __init__(self, stopped: threading.Event) -> None:
        super().__init__()
        self._stopped = stopped

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopped.set()


class Watch:
    """Carries out the rollout under way, and each that begins before it has ended."""

    def __init__(self, config: Config, who: str) -> None:
        self.config = config
        self.who = who
        self._stopped = threading.Event()
        self._present: Plan | None = None
        self._unswitched = False
        self._shown: set[tuple[str, str]] | None = None
        self._shown_at = 0.0

    def _engine(self, who: str | None = None, reason: str | None = None) -> Engine:
        engine = Engine(self.config, who or self.who, reason, lock_wait=_LOCK_SECONDS)
        engine.interrupts = _Later(self._stopped)
        return engine

    def run(self) -> Result:
        """Until no rollout is under way. On SIGTERM traffic goes back first, unless the host shuts down."""
        signal.signal(signal.SIGTERM, lambda *_: self._stopped.set())
        last = None
        while True:
            # Under the lock, because a command may be about to make what it has put on record.
            engine = self._engine()
            engine.run("watch", lambda e=engine: self._look(e), quiet=True)
            if self._unswitched:
                engine = self._engine()
                settled = engine.run("rollback", lambda e=engine: self._settle(e))
                last = settled.message
                progress(last)
                if self._unswitched:
                    # Its unit has failed then, for somebody to see.
                    return Result(last, ok=False, exit_status=settled.exit_status or 1)
            present = self._present
            if present is None:
                return Result(last or "no rollout is under way")
            last = self._carry_out(present)
            if self._stopped.is_set():
                left = Rollouts(self._engine()).under_way() is not None and not host.shutting_down()
                return Result(last, ok=not left, exit_status=int(left))

    def _state(self) -> State | None:
        return self._engine().routing.known()

    def _look(self, engine: Engine) -> Result:
        found = Rollouts(engine).under_way()
        # Whoever put it on record died before the switch.
        self._unswitched = found is not None and found[0].unswitched(found[1])
        self._present = found[0] if found and not self._unswitched else None
        return Result("looked", outcome="nothing")

    def _settle(self, engine: Engine) -> Result:
        """End a rollout whose switch never happened, if it is still under way."""
        self._look(engine)
        if not self._unswitched:
            return Result("no rollout is under way", outcome="nothing")
        settled = Rollouts(engine).settle("the switch never happened")
        # A canary whose users stay where they are goes on.
        self._look(engine)
        return settled

    def _carry_out(self, begun: Plan) -> str:
        """One rollout to its end, which is returned in words."""
        trial = Trial(self.config, begun)
        progress(begun.describe(self._state()))
        try:
            while True:
                present = plan.read(self.config.rollout_file)
                if present is None or present.number != begun.number or not present.under_way:
                    return present.describe(self._state()) if present else "the plan is gone"
                if self._stopped.is_set():
                    if host.shutting_down():
                        return "the host shuts down; it goes on after the boot"
                    ended = self._back(trial, present, "the watch was stopped", "unwatched")
                    return ended or present.describe(self._state())
                found = Rollouts(self._engine()).under_way()
                if found is None and not self._still_mine(present):
                    return "somebody else switched"
                if found is None or not found[0].unswitched(found[1]):
                    ended = self._tick(trial, present)
                    if ended:
                        return ended
                elif time.monotonic() >= trial.again_at:
                    # A switch of its own failed, and so did the record of that.
                    trial.again_at = time.monotonic() + _AGAIN_SECONDS
                    engine = self._engine()
                    progress(engine.run("rollback", lambda e=engine: self._settle(e)).message)
                self._stopped.wait(_TICK_SECONDS)
        finally:
            trial.close()

    def _still_mine(self, present: Plan) -> bool:
        """Look again under the lock: whoever switched by hand has had the time to say so. Ends the plan if so."""
        engine = self._engine()

        def look() -> Result:
            rollouts = Rollouts(engine)
            latest = plan.read(self.config.rollout_file)
            mine = latest is not None and latest.number == present.number and latest.under_way
            if latest is not None and mine and rollouts.under_way() is None:
                rollouts.end(latest, plan.SUPERSEDED, "somebody switched by hand")
            return Result("looked", outcome="nothing")

        engine.run("watch", look, quiet=True)
        latest = plan.read(self.config.rollout_file)
        return latest is not None and latest.number == present.number and latest.under_way

    def _tick(self, trial: Trial, present: Plan) -> str | None:
        trial.follow(present)
        checks = trial.look()
        verdict = judge.verdict_of(checks)
        self._report(present, trial, checks, verdict)
        self._show(checks)
        if verdict == FAIL:
            trial.failures += 1
            if trial.failures < self.config.judge_failures:
                return None
            failed = [check for check in checks if check.verdict == FAIL]
            reason = "; ".join(f"{check.name}: {check.text}" for check in failed)
            ended = self._back(trial, present, reason, failed[0].name, checks)
            if ended or present.asked != "promote":
                return ended
        else:
            trial.failures = 0
        if present.asked != "promote":
            if present.paused or trial.elapsed < trial.wanted_seconds:
                return None
            if verdict == NO_DATA:
                if trial.elapsed < trial.wanted_seconds + self.config.judge_patience_seconds:
                    return None
                unknown = "; ".join(f"{c.name}: {c.text}" for c in checks if c.verdict == NO_DATA)
                reason = f"nothing could be said: {unknown}"
                healthy = any((check.name, check.verdict) == ("health", PASS) for check in checks)
                if present.phase == plan.BAKE and healthy:
                    return self._leave(present, reason, checks)
                return self._back(trial, present, reason, "no data", checks)
        if time.monotonic() < trial.again_at:
            return None
        engine = self._engine(present.who)
        command = "promote" if present.asked else "canary" if present.phase == plan.CANARY else "bake"
        result = engine.run(command, lambda: Rollouts(engine).advance(present.number))
        progress(result.message)
        if result.exit_status == LockHeld.exit_status:
            return None
        if not result.ok:
            return self._failed(trial, present, result, checks)
        trial.failing_since = None
        self._record(engine, present, checks)
        latest = plan.read(self.config.rollout_file)
        return latest.describe() if latest and not latest.under_way else None

    def _failed(self, trial: Trial, present: Plan, result: Result, checks: list[Check]) -> str | None:
        """What becomes of a rollout that can't go on: back where that is the new colour's fault, or lasts for long."""
        cause = result.details.get("cause")
        trial.again_at = time.monotonic() + _AGAIN_SECONDS
        if "unfit" in result.details or cause == "verification":
            return self._back(trial, present, result.message, cause or "health", checks)
        # A full disk, the front door or Docker: that condemns nobody, and it is judged all the while.
        if present.phase == plan.BAKE:
            # It has passed, and only its record is missing.
            return None
        if trial.failing_since is None:
            trial.failing_since = time.monotonic()
        found = Rollouts(self._engine()).under_way()
        lost = found is not None and found[0].unswitched(found[1])
        if lost or time.monotonic() >= trial.failing_since + self.config.judge_patience_seconds:
            return self._back(trial, present, f"it couldn't go on: {result.message}", cause or "host", checks)
        return None

    def _leave(self, present: Plan, reason: str, checks: list[Check]) -> str | None:
        """End a bake without a verdict: no data is no fail, and everybody has the new colour already."""
        engine = self._engine(present.who)
        if any((check.name, check.verdict) == ("errors", NO_DATA) for check in checks):
            reason += f"; look whether {self.config.access_log} is written and whether the disk is full"
        result = engine.run("bake", lambda: Rollouts(engine).leave(present.number, reason))
        progress(result.message)
        if result.exit_status == LockHeld.exit_status:
            return None
        self._record(engine, present, checks)
        return result.message

    def _back(
        self, trial: Trial, present: Plan, reason: str, cause: str, checks: list[Check] | None = None
    ) -> str | None:
        """Send traffic back; how that went, or None where a canary's users would only lose by it."""
        dead = trial.way_back_is_dead() if present.phase == plan.CANARY else None
        if dead:
            if dead != trial.told or self._stopped.is_set():
                stay = f"the users of {present.target} stay there: {dead}"
                progress(f"{reason}; {stay}; 'appliance promote' gives it to all")
            trial.told = dead
            return None
        engine = self._engine(reason=reason)
        result = engine.run(
            "rollback", lambda: Rollouts(engine).give_back(present.number, plan.ROLLED_BACK, reason, cause)
        )
        progress(result.message)
        self._record(engine, present, checks or [])
        return result.message

    def _record(self, engine: Engine, present: Plan, checks: list[Check]) -> None:
        try:
            engine.releases.add_checks(
                present.target_release, f"{present.phase} {present.percent} %", [asdict(check) for check in checks]
            )
        except (OSError, ApplianceError) as error:
            progress(f"the checks weren't recorded: {tidy(error)}")

    def _report(self, present: Plan, trial: Trial, checks: list[Check], verdict: str) -> None:
        about = {
            "rollout": present.number,
            "text": present.describe(self._state()),
            "verdict": verdict,
            "left_seconds": round(max(0.0, trial.wanted_seconds - trial.elapsed)),
            "checks": [asdict(check) for check in checks],
        }
        try:
            files.replace(self.config.rollout_report_file, json.dumps(about).encode() + b"\n")
        except OSError as error:
            progress(f"no report: {tidy(error)}")

    def _show(self, checks: list[Check]) -> None:
        """Renew the metrics where a verdict is another one, or where they are old."""
        verdicts = {(check.name, check.verdict) for check in checks}
        if verdicts != self._shown or time.monotonic() >= self._shown_at + _METRICS_SECONDS:
            self._shown, self._shown_at = verdicts, time.monotonic()
            self._engine().write_metrics()


class Trial:
    """What is known of the two colours during one rollout; times are monotonic seconds."""

    def __init__(self, config: Config, begun: Plan) -> None:
        self.config = config
        self._engine = Engine(config, "watch")
        self._present = begun
        self._stage = (begun.phase, begun.percent_by(self._engine.routing.known()))
        # Our own requests count for as long as a step may last: to a slow model there are few.
        longest = max(config.canary_step_seconds, config.bake_seconds) + config.judge_patience_seconds
        own = (begun.mark, requestmark.of(config.runtime_dir))
        self._log = AccessLog(config.access_log, *own, max(config.judge_window_seconds, longest))
        self._source, self._target = self._engine.colour(begun.source), self._engine.colour(begun.target)
        # In a bake no client uses the old colour: what they got from it just before is the measure.
        self._before = accesslog.before(config.access_log, begun.source, config.judge_window_seconds, *own)
        if len(self._before.seconds) < config.judge_min_requests:
            # What an earlier release of that colour did excuses nothing.
            served = self._engine.routing.became_live(begun.source)
            earliest = served.since if served else None
            self._before = accesslog.before(config.access_log, begun.source, longest, *own, not_before=earliest)
        self._restarts: int | None = None
        self._processor: deque[tuple[float, host.Processor]] = deque()
        self._compared: deque[tuple[float, dict[str, float]]] = deque()
        self._count_shadow()
        self._began = self._since = self._calm = time.monotonic()
        # It was ready when the rollout began, so that only a boot since then gives it the time to become so again.
        self._starting = begun.boot is None or begun.boot != host.boot()
        # Whether the last look found it starting after what hit both.
        self._shaken = False
        self.failures = 0
        # Since when it can't go on, although nothing is wrong with the new colour, and when to try again.
        self.failing_since: float | None = None
        self.again_at = 0.0
        # Why traffic didn't go back, as it was said last.
        self.told: str | None = None
        self._synthetic = Synthetic(config, self._engine, begun)

    def close(self) -> None:
        """Stop sending requests."""
        self._synthetic.stop()
        self._log.close()

    def follow(self, present: Plan) -> None:
        """Begin afresh where the plan has gone a step on."""
        # By what users have, since a full disk may keep back the step that is on record.
        stage = (present.phase, present.percent_by(self._engine.routing.known()))
        if stage != self._stage:
            # Rather from before the canary, where the old colour had all clients, as the new one has now.
            if present.phase == plan.BAKE and len(self._before.seconds) < self.config.judge_min_requests:
                self._before = self._log.clients(present.source, self._since)
            self._since = time.monotonic()
            self.failures, self.failing_since = 0, None
        self._present, self._stage = present, stage

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._since

    @property
    def wanted_seconds(self) -> float:
        return self.config.bake_seconds if self._present.phase == plan.BAKE else self.config.canary_step_seconds

    def way_back_is_dead(self) -> str | None:
        """What is wrong with the old colour where the new one is well; else None."""
        wrong = _unwell(self._source, self._present.source_release)[0]
        return wrong if wrong and not _unwell(self._target, self._present.target_release)[0] else None

    def look(self) -> list[Check]:
        """All checks of this moment."""
        try:
            self._log.read()
        except OSError as error:
            progress(f"the access log can't be read: {tidy(error)}")
        health = self._health()
        if health.verdict == NO_DATA:
            # What hit both colours says nothing about the new one.
            self._shaken = True
            self._compared.clear()
            return [health, self._errors_at_start()]
        if self._shaken:
            # Nor does what failed since the last look, in which it still started.
            self._shaken, self._calm = False, time.monotonic()
        since_own = max(self._since, self._calm)
        baking = self._present.phase == plan.BAKE
        new, old, since = self._clients(since_own, baking)
        own_new, own_old = (self._log.own(colour.name, since_own) for colour in (self._target, self._source))
        least = self.config.judge_min_requests
        patience = judge.given_up_after(old if len(old.seconds) >= least else own_old, self.config)
        new, old = new.with_given_up(patience), old.with_given_up(patience)
        # These have waited for as long as they should.
        own_new, own_old = own_new.with_given_up(0.0), own_old.with_given_up(0.0)
        enough = min(len(new.seconds), len(old.seconds)) >= least
        self._synthetic.wanted.clear() if enough else self._synthetic.wanted.set()
        # Our own requests must not hide what clients meet already.
        met = new.requests >= least or new.errors >= _ENOUGH_ERRORS
        seen, of_old = new if met else _both(new, own_new), old if old.requests >= least else _both(old, own_old)
        if _unwell(self._source, self._present.source_release)[0]:
            # That the old colour has died since excuses nothing.
            of_old = Window()
        hangs = own_new.given_up >= _ENOUGH_ERRORS and own_old.seconds and not own_old.given_up
        checks = [health, judge.errors(seen, of_old, self.config, _ENOUGH_ERRORS if met or hangs else least)]
        # Our own requests are right for either release.
        refused = judge.refusals(new, old, self.config)
        checks += [refused] if refused else []
        if enough:
            times = judge.latencies(new, old, self.config)
        else:
            times = judge.latencies(own_new, own_old, self.config, comparable=self._synthetic.alike)
        stolen = self._stolen(since)
        if baking and enough:
            times = [self._at_another_time(check, stolen) for check in times]
        checks += times
        shadow = self._shadow()
        return checks + ([shadow] if shadow else [])

    def _at_another_time(self, check: Check, stolen: float) -> Check:
        """A check of times, measured by those of another time; it condemns nobody for what has changed besides."""
        if check.verdict != FAIL or check.value is None or check.limit is None:
            return check
        # Never what is too long at any rate.
        longest = self.config.judge_max_p95_ms if check.name == "p95" else math.inf
        explained = min(longest, _STOLEN_RATIO * check.limit / (1 - stolen)) if stolen < 1 else longest
        if stolen > _STOLEN_SHARE and check.value <= explained:
            lacked = f"{stolen:.0%} of the processor's time was taken by other machines"
            return replace(check, verdict=NO_DATA, text=f"{check.text}, while {lacked}")
        early = self.elapsed < min(_SETTLING_SECONDS, self.wanted_seconds / 2)
        return replace(check, verdict=NO_DATA) if early else check

    def _stolen(self, since: float) -> float:
        """The share of the processors' time that went to other machines, of what the host has wanted since then."""
        now, seen = host.processor(), self._processor
        if now is not None:
            seen.append((time.monotonic(), now))
        while len(seen) > 2 and seen[1][0] <= self._since:
            seen.popleft()
        if not seen:
            return 0.0
        first = next((look for at, look in reversed(seen) if at <= since), seen[0][1])
        last = seen[-1][1]
        ran, stolen = last.ran - first.ran, last.stolen - first.stolen
        return stolen / (ran + stolen) if stolen > 0 else 0.0

    def _clients(self, earliest: float, baking: bool) -> tuple[Window, Window, float]:
        """What clients got from both colours, and since when: a window, or a longer one where that says too little."""
        at, seconds = time.monotonic(), self.config.judge_window_seconds
        while True:
            since = max(earliest, at - seconds)
            new = self._log.clients(self._target.name, since)
            old = self._before if baking else self._log.clients(self._source.name, since)
            few = min(len(window.seconds) for window in ((new,) if baking else (new, old)))
            # Old good answers mustn't hide errors of now, nor a fault that the colour has had for long.
            if since == earliest or new.errors >= _ENOUGH_ERRORS or few >= self.config.judge_min_requests:
                return new, old, since
            seconds *= 2

    def _errors_at_start(self) -> Check:
        """What clients get from a new colour that still starts while the old one is well."""
        since = max(self._since, self._began + _STARTING_SECONDS, time.monotonic() - self.config.judge_window_seconds)
        new, old = (self._log.clients(colour.name, since) for colour in (self._target, self._source))
        return judge.errors(new, old, self.config, _ENOUGH_ERRORS)

    def _health(self) -> Check:
        wrong, health = _unwell(self._target, self._present.target_release)
        if health is None or wrong:
            # Docker went away, or the host has just booted: that isn't the new release's fault.
            shared = _unwell(self._source, self._present.source_release)[0] is not None
            if shared:
                # Whichever comes back first, both get the time to.
                self._began, self._restarts, self._starting = time.monotonic(), None, True
            early = self._starting and self._age < self.config.ready_timeout_seconds
            return Check("health", NO_DATA if shared or early else FAIL, wrong or "")
        self._starting = False
        restarts = health.workers["restarts"]
        if self._restarts is None:
            self._restarts = restarts
        if restarts > self._restarts:
            return Check("health", FAIL, f"{restarts - self._restarts} workers died", restarts - self._restarts, 0)
        return Check("health", PASS, health.describe())

    @property
    def _age(self) -> float:
        return time.monotonic() - self._began

    def _shadow(self) -> Check | None:
        state = self._engine.routing.read()
        if state is None or not state.shadow:
            return None
        if not self._count_shadow():
            return Check("shadow", NO_DATA, "appliance-shadow.service doesn't answer")
        (_, first), (_, last) = self._compared[0], self._compared[-1]
        return judge.shadow(*(int(last[key] - first[key]) for key in _COMPARED), self.config)

    def _count_shadow(self) -> bool:
        """Look at the counts, and forget what is older than the window, as far as the rest still says something."""
        counts, at = self._shadow_counts(), time.monotonic()
        if counts is None:
            return False
        seen = self._compared
        if seen and counts["started"] != seen[-1][1]["started"]:
            seen.clear()
            seen.append((at, dict.fromkeys(counts, 0.0) | {"started": counts["started"]}))
        # Of a time without any requests its beginning and its end are enough.
        if len(seen) > 1 and seen[-2][1] == seen[-1][1] == counts:
            seen.pop()
        seen.append((at, counts))
        while len(seen) > 2:
            then, earlier = seen[1]
            compared = sum(counts[key] - earlier[key] for key in _COMPARED)
            if then > at - self.config.judge_window_seconds or compared < self.config.shadow_min_compared:
                break
            seen.popleft()
        return True

    def _shadow_counts(self) -> dict[str, float] | None:
        connection = UnixConnection(self.config.shadow_socket, 1.0)
        try:
            raw = json.loads(exchange(connection, "GET", "/summary", timeout=1.0).body)
            return {key: float(raw[key]) for key in (*_COMPARED, "started")}
        except (ExchangeError, OSError, ValueError, TypeError, KeyError):
            return None
        finally:
            connection.close()


def _unwell(colour: Colour, release: int | None) -> tuple[str | None, Health | None]:
    """What is wrong with a colour, or None, and its health where it gave any."""
    try:
        health = colour.health()
    except ApplianceError as fault:
        return fault.message, None
    # Which release the old colour had may not have been known when the rollout began.
    if health.status not in HEALTHY or release is not None and health.release != str(release):
        return f"{colour.name} is {health.describe()}, release {health.release}", health
    return None, health


def _both(one: Window, other: Window) -> Window:
    return Window(
        one.requests + other.requests,
        one.errors + other.errors,
        one.seconds + other.seconds,
        given_up=one.given_up + other.given_up,
        refused=one.refused + other.refused,
    )


class Synthetic:
    """Requests of our own to both colours while `wanted` is set: the new release's examples.

    `alike` says whether both get the same ones: where the old colour doesn't understand the new release's, it gets its
    own release's, and times say nothing.
    """

    def __init__(self, config: Config, engine: Engine, present: Plan) -> None:
        self.wanted = threading.Event()
        self.alike = True
        self._config = config
        self._engine = engine
        self._present = present
        self._stopped = threading.Event()
        # Whether the old colour has been asked once, and the longest that it took to answer well, in seconds.
        self._asked = threading.Event()
        self._slowest: float | None = None
        if config.synthetic_per_second:
            for colour in (present.source, present.target):
                threading.Thread(target=self._send, args=(colour,), daemon=True).start()

    def stop(self) -> None:
        """End both threads, each after the request that it is at."""
        self._stopped.set()
        self.wanted.set()
        self._asked.set()

    def _send(self, colour: str) -> None:
        number, examples = 0, {}
        pause = 1 / self._config.synthetic_per_second
        while not self._stopped.wait(pause):
            if not self.wanted.wait(1.0) or self._stopped.is_set():
                continue
            try:
                # Each colour understands its own release's examples for sure.
                of = self._present.target if self.alike else colour
                if of not in examples:
                    examples[of] = self._examples(of)
                number += 1
                body = json.dumps(examples[of][number % len(examples[of])].request).encode()
                self._ask(colour, body, f"{self._present.mark}{number}")
            except (ApplianceError, ExchangeError, OSError):
                # What became of it stands in nginx's log, or there is no data.
                continue

    def _ask(self, colour: str, body: bytes, request_id: str) -> None:
        state = self._engine.routing.read()
        track = "live" if state is not None and state.live == colour else "idle"
        seconds = self._config.request_timeout_seconds
        if colour == self._present.source:
            try:
                began = time.monotonic()
                status = FrontDoor(self._config.front_door, seconds).send(body, request_id, track).status
                if status == 200:
                    self._slowest = max(self._slowest or 0.0, time.monotonic() - began)
            finally:
                self._asked.set()
            if self.alike and 400 <= status < 500 and status not in accesslog.NOT_OF_THE_INPUT:
                self.alike = False
                progress(
                    f"{colour} answers an example of release {self._present.target_release} with {status}: each colour "
                    f"gets its own release's, and their times aren't compared"
                )
            return
        # A colour that hangs must be found before it has kept many waiting for so long.
        self._asked.wait(seconds)
        if self._slowest is not None:
            longest = max(_SYNTHETIC_RATIO, self._config.judge_max_latency_ratio) * self._slowest
            seconds = min(seconds, max(_SYNTHETIC_SECONDS, longest))
        FrontDoor(self._config.front_door, seconds).send(body, request_id, track)

    def _examples(self, colour: str) -> list[bundles.Example]:
        release = self._engine.releases.get(self._engine.releases.placed(colour) or 0)
        return bundles.load_examples(Path(release.bundle), release.bundle_digest)
