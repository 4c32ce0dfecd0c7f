"""One colour as the host sees it: its unit, its control socket, its workers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rollout import host
from rollout.bundles import Example, difference
from rollout.config import Config
from rollout.errors import ApplianceError, Failed, NeedsRoot, Refused
from rollout.files import read_untrusted
from rollout.releases import Release, Releases
from rollout.text import tidy
from rollout.unixhttp import ExchangeError, UnixConnection, exchange

STATUSES = ("starting", "ready", "degraded", "unavailable", "draining")
HEALTHY = ("ready", "degraded")
_POLL_SECONDS = 0.2
_MAX_RESTARTS = 3
_MAX_WORKERS = 1024
# What `docker run` ends with where the kernel killed the container's process.
_KILLED = 137


class Unreachable(ApplianceError):
    """The colour's control socket gives no usable answer."""

    outcome = "refused"


class Health(NamedTuple):
    """What `GET /health` says. It comes from a process that runs model code: every text in it is tidied."""

    status: str
    reason: str | None
    colour: str
    release: str
    model: str
    version: str
    bundle_digest: str
    workers: dict[str, int]

    def describe(self) -> str:
        """The status with its reason."""
        return self.status + (f" ({self.reason})" if self.reason else "")


class Colour:
    """One of the two slots."""

    def __init__(self, config: Config, releases: Releases, name: str) -> None:
        self.name = name
        self.unit = config.unit_of(name)
        self.directory = config.runtime_dir / name
        self._config = config
        self._releases = releases

    def health(self) -> Health:
        """Ask the control socket. Raises Unreachable, and NeedsRoot where the socket isn't for the present user."""
        path = self.directory / "control.sock"
        timeout = self._config.request_timeout_seconds
        connection = UnixConnection(path, timeout)
        try:
            answer = exchange(connection, "GET", "/health", timeout=timeout)
            return _parse_health(json.loads(answer.body))
        except PermissionError:
            raise NeedsRoot(f"{path} may not be used by this user: run with sudo") from None
        except (ExchangeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Unreachable(f"{self.name} doesn't answer on {path}: {tidy(error)}") from None
        finally:
            connection.close()

    def check(self, release: Release, examples: list[Example], accept: tuple[str, ...]) -> Health:
        """Check that the colour runs `release`, that its status is in `accept`, and that the examples reproduce.

        Raises Refused with the first thing that is wrong, NeedsRoot.
        """
        look = f"see 'journalctl -u {self.unit}'"
        try:
            health = self.health()
        except Unreachable as fault:
            raise Refused(
                f"{fault.message}; it is stopped ('systemctl start {self.unit}'), still starts (a few seconds, see "
                f"'appliance status'), or fails: {look}"
            ) from None
        wrong = _not_release(health, release, self.name)
        if wrong:
            raise Refused(f"{self.name} {wrong}: deploy to {self.name} again")
        if health.status not in accept:
            raise Refused(f"{self.name} isn't ready: its status is {health.describe()}; {look}")
        self.run_examples(examples, health)
        return health

    def run_examples(self, examples: list[Example], health: Health) -> None:
        """Send every example to every worker. Raises Refused with the first answer that is wrong.

        Of a degraded colour as many workers may be silent as it says are missing.
        """
        wanted = health.workers["wanted"]
        may_miss = 0 if health.status == "ready" else wanted - health.workers["ready"]
        if wanted < 1:
            raise Refused(f"{self.name} has no workers, so its examples can't be checked")
        # One after the other: the others go on serving, whoever's colour it is.
        for number in range(wanted):
            try:
                self._run_on(number, examples)
            except ExchangeError as error:
                if may_miss <= 0:
                    raise Refused(f"{self.name} worker {number} doesn't answer: {tidy(error)}") from None
                may_miss -= 1

    def _run_on(self, worker: int, examples: list[Example]) -> None:
        timeout = self._config.request_timeout_seconds
        path = self.directory / f"worker-{worker}.sock"
        connection = UnixConnection(path, timeout)
        try:
            for number, example in enumerate(examples, 1):
                title = f"{self.name} worker {worker}, example {number} of {len(examples)}"
                body = json.dumps(example.request).encode()
                headers = {
                    "Content-Type": "application/json",
                    "X-Request-ID": f"appliance-example-{worker}-{number}",
                    # Examples say nothing about what clients ask.
                    "X-Appliance-Probe": "1",
                }
                answer = exchange(connection, "POST", "/predict", body, headers, timeout=timeout)
                if answer.status != 200:
                    raise Refused(
                        f"{title}: answered {answer.status}: {tidy(answer.body.decode(errors='replace'), 200)}"
                    )
                try:
                    got = json.loads(answer.body)
                except ValueError:
                    raise Refused(f"{title}: the answer isn't JSON") from None
                found = difference(example.response, got, example.tolerance)
                if found:
                    raise Refused(f"{title}: {found}")
        except PermissionError:
            raise NeedsRoot(f"{path} may not be used by this user: run with sudo") from None
        finally:
            connection.close()

    def restart_and_wait(self, release: Release, timeout: float, progress: Callable[[str], None]) -> Health:
        """Restart the unit and wait until it is ready with `release`; `timeout` in seconds for both together.

        Raises Failed with the service's own reason where it gave one.
        """
        deadline = time.monotonic() + timeout
        since = time.time()
        before = host.unit_state(self.unit).invocation
        # A reason that an earlier start left behind must not explain a failure of this one.
        with contextlib.suppress(OSError):
            (self.directory / "startup_error.json").unlink()
        complaint = host.restart_unit(self.unit, timeout)
        if complaint:
            unit = host.unit_state(self.unit)
            if unit.active not in ("active", "activating", "reloading"):
                raise Failed(f"{self.name} didn't start: {self._why(unit, since, before, complaint)}")
        last = ""
        while True:
            unit = host.unit_state(self.unit)
            try:
                health = self.health()
                wrong = _not_release(health, release, self.name)
                state = f"health says: {wrong or health.describe()}"
                # The process of before the restart may still answer: neither its release nor its invocation counts.
                if health.status == "ready" and not wrong and not (before and unit.invocation == before):
                    return health
            except Unreachable as fault:
                state = fault.message
            if unit.active in ("failed", "inactive"):
                raise Failed(f"{self.name} didn't start: {self._why(unit, since, before)}")
            if unit.restarts >= _MAX_RESTARTS:
                raise Failed(f"{self.name} keeps ending: {unit.restarts} restarts; {self._why(unit, since, before)}")
            if time.monotonic() >= deadline:
                why = self._why(unit, since, before)
                raise Failed(f"{self.name} isn't ready after {timeout:g} s: {state}; {why}")
            if state != last:
                progress(state)
                last = state
            time.sleep(_POLL_SECONDS)

    def _why(self, unit: host.Unit, since: float, before: str | None, complaint: str | None = None) -> str:
        """Why the unit's start failed, `before` being its invocation of before."""
        reason = self.startup_reason()
        if reason:
            return reason
        if host.ended_with(self.unit, _KILLED, since, before):
            return (
                f"it was killed (exit status {_KILLED}), most likely for more memory than its container may have: "
                f"raise model_memory in the inventory and deploy again"
            )
        parts = [unit.describe(), complaint or ""]
        line = host.last_journal_line(self.unit, since)
        parts.append(f"last journal line: {line}" if line else f"no journal line; see 'journalctl -u {self.unit}'")
        return "; ".join(part for part in parts if part)

    def startup_reason(self) -> str | None:
        """The reason that the service left for a start that was refused, or None."""
        content = read_untrusted(self.directory / "startup_error.json")
        try:
            return tidy(json.loads(content)["reason"]) or None if content else None
        except (ValueError, KeyError, TypeError):
            return None

    def describe(self) -> dict[str, Any]:
        """The colour's entry in `status --json`; never raises but for NeedsRoot.

        `status` is the health's own, or `empty` (never deployed), `down` (no answer), `mismatch` (another release
        runs than is placed).
        """
        about: dict[str, Any] = dict.fromkeys(("reason", "release", "model", "version", "image", "bundle", "workers"))
        about = {"status": "empty", **about, "unit": "unknown"}
        with contextlib.suppress(ApplianceError):
            about["unit"] = host.unit_state(self.unit).active
        release = None
        try:
            about["release"] = number = self._releases.placed(self.name)
            if number is None:
                return about
            release = self._releases.get(number)
            about.update(model=release.name, version=release.version, image=release.image, bundle=release.bundle)
            health = self.health()
        except NeedsRoot:
            raise
        except ApplianceError as fault:
            about.update(status="down", reason=self.startup_reason() or fault.message)
            return about
        wrong = _not_release(health, release, self.name)
        about.update(
            status="mismatch" if wrong else health.status,
            reason=f"{self.name} {wrong}" if wrong else health.reason,
            workers=health.workers,
        )
        return about


def _parse_health(raw: dict[str, Any]) -> Health:
    status = raw["status"]
    if status not in STATUSES:
        raise ValueError(f"unknown status {status!r}")
    workers = raw["workers"]
    numbers = {key: int(workers[key]) for key in ("wanted", "ready", "restarts")}
    if not 0 <= numbers["wanted"] <= _MAX_WORKERS:
        raise ValueError(f"{numbers['wanted']} workers")
    texts = {key: tidy(raw[key], 100) for key in ("colour", "release", "model", "version", "bundle_digest")}
    reason = raw.get("reason")
    return Health(status=status, reason=tidy(reason) if reason else None, workers=numbers, **texts)


def _not_release(health: Health, release: Release, colour: str) -> str | None:
    """What shows that the process isn't this release on this colour, or None."""
    if health.release != str(release.number):
        return f"runs release {health.release or 'without a number'} instead of release {release.number}"
    if health.colour != colour:
        return f"calls itself {health.colour!r}"
    if health.status not in HEALTHY:
        # Before it has read the bundle, the service can't say what is in it.
        return None
    if health.bundle_digest != release.bundle_digest:
        return f"serves the bundle {health.bundle_digest[:20]}… instead of {release.bundle_digest[:20]}…"
    if (health.model, health.version) != (release.name, release.version):
        return f"serves {health.model} {health.version} instead of {release.name} {release.version}"
    return None
