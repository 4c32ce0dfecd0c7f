"""The gate: Locust puts load on a colour that isn't live, and criteria decide whether the release may become live.

What was measured and decided lies beside the release's record (docs/contracts.md): `load_test_report.json`,
`load_test_evaluation.json`, `serve_image_spec.json`, `context.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import files, host
from rollout.errors import ApplianceError, Failed, Refused
from rollout.gatesettings import THINK_SECONDS
from rollout.judge import FAIL, NO_DATA, PASS, Check, verdict_of
from rollout.report import progress
from rollout.text import now, tidy

if TYPE_CHECKING:
    from rollout.config import Config
    from rollout.releases import Release

LOCUST = Path("/opt/appliance/locust/bin/locust")
LOCUSTFILE = Path("/usr/lib/appliance/locustfile.py")
UNIT = "appliance-loadtest.service"
# Locust needs about a second to come up; a busy host of one core several.
_START_SECONDS = 30
_SANDBOX = (
    "DynamicUser=yes",
    "CapabilityBoundingSet=",
    "LockPersonality=yes",
    "MemoryMax=512M",
    "NoNewPrivileges=yes",
    "PrivateDevices=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHome=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "SystemCallFilter=@system-service",
    "TasksMax=64",
    # Nothing that it could do in the end would be of use to anybody.
    "KillSignal=SIGKILL",
)
# What the locustfile writes, and what of it goes into the report as it is.
_MEASURED = (
    "start",
    "end",
    "duration_seconds",
    "requests",
    "failures",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "errors",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a load test. `reasons`: a sentence for each thing that stands against it, none where it passed."""

    passed: bool
    reasons: list[str]
    criteria: list[dict[str, Any]]
    """Each with `name`, `verdict` (pass, fail, no data), `text`, `value` and `limit`."""


def run(config: Config, release: Release, url: str) -> Outcome:
    """Load-test the colour of `release` by posting its bundle's examples to `url`, and keep the four files.

    The caller holds the lock. Raises Refused where Locust isn't installed, Failed where it doesn't do its work, OSError
    where a file can't be written; then nothing is known about the release. An exception from a signal passes through,
    and nothing goes on running.
    """
    gate = config.gate
    measured = _measure(config, release, url)
    requests, seconds = measured["requests"], measured["duration_seconds"]
    report = {
        "release": release.number,
        "url": url,
        "users": gate.users,
        "think_seconds": THINK_SECONDS,
        **{key: measured[key] for key in _MEASURED},
        "requests_per_second": round(requests / seconds, 3) if seconds else 0.0,
        "error_share": round(measured["failures"] / requests, 9) if requests else 0.0,
    }
    checks = _checks(config, release, report)
    outcome = Outcome(
        passed=verdict_of(checks) == PASS,
        # Where there is no data, all of them have the same to say.
        reasons=list(dict.fromkeys(check.text for check in checks if check.verdict != PASS)),
        criteria=[asdict(check) for check in checks],
    )
    contents = {
        "serve_image_spec.json": _serve_image_spec(release),
        "context.json": _context(release, url, measured["locust"]),
        "load_test_report.json": report,
        # Last: where it is there, so are the others.
        "load_test_evaluation.json": {"release": release.number, "start": report["start"], **asdict(outcome)},
    }
    directory = config.releases_dir / str(release.number)
    for name, content in contents.items():
        files.replace(directory / name, json.dumps(content, indent=1).encode() + b"\n")
    return outcome


def _measure(config: Config, release: Release, url: str) -> dict[str, Any]:
    """Run Locust in a transient unit and return what the locustfile wrote. Raises Refused, Failed."""
    if not os.access(LOCUST, os.X_OK):
        raise Refused(
            f"Locust isn't installed, so nothing can be load-tested: {LOCUST} is missing: run playbooks/site.yml"
        )
    gate, timeout = config.gate, math.ceil(config.request_timeout_seconds)
    limit = gate.seconds + timeout + _START_SECONDS
    environment = {
        "LOADTEST_URL": url,
        "LOADTEST_EXAMPLES": f"{release.bundle}/examples.json",
        "LOADTEST_COLOUR": release.colour,
        "LOADTEST_THINK_SECONDS": THINK_SECONDS,
        "LOADTEST_TIMEOUT_SECONDS": timeout,
    }
    command = [
        *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={UNIT}"),
        *(f"--property={setting}" for setting in (*_SANDBOX, f"RuntimeMaxSec={limit}")),
        *(f"--setenv={name}={value}" for name, value in environment.items()),
        *("--", str(LOCUST), f"--locustfile={LOCUSTFILE}", "--headless", "--skip-log-setup", "--exit-code-on-error=0"),
        *(f"--users={gate.users}", f"--spawn-rate={gate.users}", f"--run-time={gate.seconds}"),
        # A second more than a request may take, so that each is counted.
        f"--stop-timeout={timeout + 1}",
    ]
    progress(f"load test of release {release.number}: {gate.users} users for {gate.seconds} s on {url}")
    # An engine that was killed leaves its load test behind for a while.
    _stop()
    try:
        answer = host.run(command, limit + _START_SECONDS)
    except BaseException:
        # systemd-run is gone; what it started isn't.
        with contextlib.suppress(ApplianceError):
            _stop()
        raise
    try:
        measured = json.loads(answer.stdout)
        if answer.returncode == 0 and {"locust", *_MEASURED} <= measured.keys():
            return measured
    except (ValueError, AttributeError):
        pass
    complaint = tidy(answer.stderr.rstrip().rpartition("\n")[2]) or f"exit status {answer.returncode}"
    raise Failed(
        f"the load test of release {release.number} ended without a report: {complaint}; see 'journalctl -u {UNIT}'"
    )


def _stop() -> None:
    # Where there is no such unit, systemctl says so, and that is well.
    host.run(["systemctl", "stop", UNIT])


def _checks(config: Config, release: Release, report: dict[str, Any]) -> list[Check]:
    """The criteria, each named as the setting that it comes from."""
    gate, requests = config.gate, report["requests"]
    kinds = ", ".join(f"{count} × {tidy(kind, 60)}" for kind, count in sorted(report["errors"].items()))
    too_few = (
        f"no data: {requests} requests in {report['duration_seconds']} s, {report['failures']} of them failed"
        f"{f' ({kinds})' if kinds else ''}, and fewer than {gate.min_requests} say nothing: "
        f"see 'journalctl -u {config.unit_of(release.colour)}', or raise the gate's users or seconds"
    )
    found = {
        "min_requests": (requests, "requests"),
        "min_requests_per_second": (report["requests_per_second"], "requests a second"),
        "max_error_share": (report["error_share"], f"share of failed requests{f' ({kinds})' if kinds else ''}"),
        "max_p50_ms": (report["p50_ms"], "p50 in ms"),
        "max_p95_ms": (report["p95_ms"], "p95 in ms"),
        "max_p99_ms": (report["p99_ms"], "p99 in ms"),
    }
    checks = []
    for name, (value, title) in found.items():
        limit, least = getattr(gate, name), name.startswith("min_")
        if requests < gate.min_requests:
            checks.append(Check(name, NO_DATA, too_few, value, limit))
            continue
        verdict = PASS if (value >= limit if least else value <= limit) else FAIL
        text = f"{title}: {value}, at {'least' if least else 'most'} {limit}"
        checks.append(Check(name, verdict, text, value, limit))
    return checks


def _serve_image_spec(release: Release) -> dict[str, Any]:
    """What serves the release."""
    return {
        "release": release.number,
        "image": release.image,
        "image_id": release.image_id,
        "bundle": {"name": release.name, "version": release.version, "digest": release.bundle_digest},
        "settings_digest": release.settings_digest,
    }


def _context(release: Release, url: str, locust: str) -> dict[str, Any]:
    """Where the numbers come from: they say little about another machine."""
    machine = os.uname()
    engine = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        engine.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "release": release.number,
        "who": release.who,
        "when": now(),
        "host": machine.nodename,
        "kernel": machine.release,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "engine_digest": f"sha256:{engine.hexdigest()}",
        "locust": locust,
        "url": url,
    }
