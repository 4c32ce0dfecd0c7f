"""`appliance.json`: where things are and how long the engine waits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rollout import gatesettings
from rollout.errors import UsageError
from rollout.gatesettings import Gate

DEFAULT_PATH = Path("/etc/appliance/appliance.json")
COLOUR_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


_SECONDS = (0, 86400, True, "a number of seconds above 0 and at most 86400")
_SECONDS_OR_NONE = (0, 604800, False, "a number of seconds from 0 to 604800")
_SHARE = (0, 1, False, "a share from 0 to 1")
_RATIO = (1, 1000, False, "a ratio from 1 to 1000")
_MILLISECONDS = (0, 86400000, False, "a number of milliseconds from 0 to 86400000")
# Lowest, highest, whether it must be above the lowest, in words.
_NUMBERS = {
    "ready_timeout_seconds": _SECONDS,
    "request_timeout_seconds": _SECONDS,
    "canary_step_seconds": _SECONDS,
    "bake_seconds": _SECONDS_OR_NONE,
    "judge_window_seconds": _SECONDS,
    "judge_max_error_share": _SHARE,
    "judge_max_error_ratio": _RATIO,
    "judge_error_ceiling": _SHARE,
    "judge_max_refused_share": _SHARE,
    "judge_max_latency_ratio": _RATIO,
    "judge_min_latency_difference_ms": _MILLISECONDS,
    "judge_max_p95_ms": _MILLISECONDS,
    "judge_patience_seconds": _SECONDS_OR_NONE,
    "synthetic_per_second": (0, 100, False, "a number of requests from 0 to 100"),
    "shadow_max_difference_share": _SHARE,
    "shadow_tolerance": _SHARE,
    "drain_seconds": _SECONDS_OR_NONE,
}
_WHOLE_NUMBERS = {
    "verify_requests": (1, 1000),
    "judge_min_requests": (1, 100000),
    "judge_failures": (1, 100),
    "shadow_min_compared": (1, 1000000),
    "keep_releases": (1, 1000),
}


class Config(NamedTuple):
    """The engine's settings; each key of `appliance.json` may be left out."""

    colours: tuple[str, str] = ("blue", "green")
    state_dir: Path = Path("/var/lib/appliance")
    config_dir: Path = Path("/etc/appliance")
    runtime_dir: Path = Path("/run/appliance")
    lock_file: Path = Path("/run/lock/appliance.lock")
    unit: str = "model@{colour}.service"
    front_door: str = "http://127.0.0.1:80"
    ready_timeout_seconds: float = 120.0
    """Time that a restarted colour gets until it is ready."""
    verify_requests: int = 5
    """Requests on fresh connections, and the same number on one held connection, after a switch."""
    request_timeout_seconds: float = 10.0
    """Time that one health request or prediction may take altogether."""
    access_log: Path = Path("/var/log/nginx/prod_access.log")
    """What nginx answered to clients; a canary and a bake are judged by it."""
    rollout_unit: str = "appliance-rollout.service"
    """The systemd unit that runs `appliance watch`."""
    canary_steps: tuple[int, ...] = (1, 5, 25, 50, 100)
    """Percentages of users that the new colour gets, one after the other; the last is 100."""
    canary_step_seconds: float = 60.0
    """Time that each step below 100 lasts at least."""
    bake_seconds: float = 120.0
    """Time that a new live colour is watched, with the old one ready to take over; 0: not at all."""
    judge_window_seconds: float = 60.0
    """Requests that are older don't count."""
    judge_min_requests: int = 30
    """Fewer than this say nothing."""
    judge_max_error_share: float = 0.01
    """Share of answers with a status of 500 and above that is tolerated whatever the other colour does."""
    judge_max_error_ratio: float = 2.0
    """How many times the other colour's share is tolerated."""
    judge_error_ceiling: float = 0.5
    """Share of such answers that is never tolerated, whatever the other colour's is."""
    judge_max_refused_share: float = 0.1
    """Share of answers with a status of 400 to 499 that is tolerated whatever the other colour does."""
    judge_max_latency_ratio: float = 1.5
    """How many times the other colour's quantile of the answering time is tolerated."""
    judge_min_latency_difference_ms: float = 2.0
    """A difference below this is tolerated whatever the ratio is."""
    judge_max_p95_ms: float = 5000.0
    """The 95th percentile of the answering time that is never tolerated, whatever the other colour's is."""
    judge_failures: int = 2
    """Looks in a row, a second apart, that must end in "fail" before traffic goes back."""
    judge_patience_seconds: float = 900.0
    """Time beyond a step's own that it may wait for enough requests; then traffic goes back, since nothing is known."""
    synthetic_per_second: float = 5.0
    """Requests to each colour, from the bundle's examples, where clients send too few to judge by; 0: none."""
    shadow_max_difference_share: float = 0.05
    """Share of shadowed requests that both colours may answer differently before a rollout fails."""
    shadow_min_compared: int = 100
    """Fewer comparisons than this say nothing."""
    shadow_tolerance: float = 1e-3
    """Numbers may differ by this, relative to the live colour's, or absolutely where that is below 1."""
    gate: Gate = Gate()
    """The load test of a release before it may become live."""
    drain_seconds: float = 30.0
    """Time that requests get to end on a colour that gets no more of them."""
    keep_releases: int = 5
    """Releases that are kept beside those in use; older ones go, with bundles and images that nothing else needs."""
    metrics_file: Path = Path("/var/lib/prometheus/node-exporter/appliance.prom")
    """Where node exporter's textfile collector looks."""

    @property
    def routing_dir(self) -> Path:
        return self.state_dir / "routing"

    @property
    def bundles_dir(self) -> Path:
        return self.state_dir / "bundles"

    @property
    def releases_dir(self) -> Path:
        return self.state_dir / "releases"

    @property
    def audit_file(self) -> Path:
        return self.state_dir / "audit.jsonl"

    @property
    def rollout_file(self) -> Path:
        return self.state_dir / "rollout.json"

    @property
    def rollout_report_file(self) -> Path:
        return self.runtime_dir / "rollout.json"

    @property
    def shadow_socket(self) -> Path:
        return self.runtime_dir / "shadow" / "shadow.sock"

    def unit_of(self, colour: str) -> str:
        """The systemd unit of a colour."""
        return self.unit.replace("{colour}", colour)

    def other(self, colour: str) -> str:
        """The colour that isn't `colour`."""
        first, second = self.colours
        return second if colour == first else first


def load(path: Path) -> Config:
    """Read and check the configuration.

    Raises UsageError (exit status 2) with the key and the value where something is missing or wrong.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name the configuration with --config, or provision the host") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} isn't valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} must hold one JSON object, not {type(raw).__name__}")
    known = set(Config._fields)
    unknown = sorted(set(raw) - known)
    if unknown:
        raise UsageError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return Config(**{key: _convert(path, key, value) for key, value in raw.items()})


def _convert(path: Path, key: str, value: Any) -> Any:
    def wrong(wanted: str) -> UsageError:
        return UsageError(f"{path}: {key} must be {wanted}, not {json.dumps(value)}")

    if key == "colours":
        names = value if isinstance(value, list) else []
        good = len(names) == 2 and all(isinstance(n, str) and COLOUR_NAME.fullmatch(n) for n in names)
        if not good or names[0] == names[1]:
            raise wrong("a list of two different names")
        return tuple(names)
    if key in ("state_dir", "config_dir", "runtime_dir", "lock_file", "access_log", "metrics_file"):
        if not isinstance(value, str) or not value.startswith("/") or any(c.isspace() for c in value):
            raise wrong("an absolute path without white space")
        return Path(value)
    if key == "gate":
        return gatesettings.parse(f"{path}: gate", value)
    if key in _NUMBERS:
        lowest, highest, above, wanted = _NUMBERS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise wrong(wanted)
        if above and value == lowest:
            raise wrong(wanted)
        return float(value)
    if key in _WHOLE_NUMBERS:
        lowest, highest = _WHOLE_NUMBERS[key]
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise wrong(f"a whole number from {lowest} to {highest}")
        return value
    if key == "canary_steps":
        steps = value if isinstance(value, list) else []
        good = all(isinstance(step, int) and not isinstance(step, bool) and 0 < step <= 100 for step in steps)
        if not steps or not good or steps != sorted(set(steps)) or steps[-1] != 100:
            raise wrong("a list of rising whole percentages that ends with 100")
        return tuple(steps)
    if key == "rollout_unit":
        if not isinstance(value, str) or not value.endswith(".service") or value.startswith("-"):
            raise wrong("the name of a service")
        return value
    if key == "unit":
        if not isinstance(value, str) or "{colour}" not in value or value.startswith("-"):
            raise wrong("a unit name that contains {colour}")
        return value
    if not isinstance(value, str) or not _is_base_url(value):
        raise wrong("a URL such as http://127.0.0.1:80")
    return value.rstrip("/")


def _is_base_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
