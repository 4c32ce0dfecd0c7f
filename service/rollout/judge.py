"""Whether the new colour does as well as the old one: three verdicts, of which "no data" is neither pass nor fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.config import Config

PASS, FAIL, NO_DATA = "pass", "fail", "no data"
# One-sided 99 %: a single failed request in a small window condemns nobody.
_Z = 2.33
# A client that waited so many times as long as nearly all requests take on the other colour gave up: it didn't just
# change its mind. Below the least there are other reasons to wait; the last is for where nothing is known of the other.
_GIVEN_UP_RATIO = 3.0
_GIVEN_UP_LEAST_SECONDS = 0.25
_GIVEN_UP_SECONDS = 5.0
# A quantile is only as good as the number of requests beyond it.
_MIN_BEYOND = 5


@dataclass
class Window:
    """The requests of one colour that count: how many, how many failed, and how long the good ones took in seconds.

    `refused` is how many were answered with a client error, as a wrong input is, which are not among the failed.
    `gone` is how long those clients waited in seconds that went away without an answer; of all these only the
    `given_up` count, among the failed.
    """

    requests: int = 0
    errors: int = 0
    seconds: list[float] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    given_up: int = 0
    refused: int = 0

    @property
    def error_share(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def refused_share(self) -> float:
        return self.refused / self.requests if self.requests else 0.0

    def with_given_up(self, after: float) -> Window:
        """The same, where whoever went away after `after` seconds counts as a failed request."""
        count = sum(seconds >= after for seconds in self.gone)
        return Window(self.requests + count, self.errors + count, self.seconds, given_up=count, refused=self.refused)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `value` is the new colour's, `limit` what it may reach at most."""

    name: str
    verdict: str
    text: str
    value: float | None = None
    limit: float | None = None


def verdict_of(checks: Sequence[Check]) -> str:
    """Fail where any check fails, else no data where any has none, else pass."""
    verdicts = {check.verdict for check in checks}
    return FAIL if FAIL in verdicts else NO_DATA if NO_DATA in verdicts or not verdicts else PASS


def shadow(agree: int, differ: int, silent: int, config: Config) -> Check:
    """Judge how often both colours answered the same request differently.

    To `silent` requests only the live colour gave an answer: what goes beyond the tolerated share of errors differs.
    """
    compared = agree + differ + silent
    if compared < config.shadow_min_compared:
        return Check(
            "shadow", NO_DATA, f"{compared} requests compared of the {config.shadow_min_compared} that say something"
        )
    beyond = max(0, silent - math.floor(config.judge_max_error_share * compared))
    share, limit = (differ + beyond) / compared, config.shadow_max_difference_share
    unanswered = f", {silent} not at all" if silent else ""
    return Check(
        "shadow",
        FAIL if share > limit else PASS,
        f"{differ} of {compared} requests answered differently{unanswered} ({share:.1%}, at most {limit:.1%})",
        share,
        limit,
    )


def given_up_after(old: Window, config: Config) -> float:
    """The time in seconds after which a client that goes away has given up, by the other colour's answering times.

    Who goes away sooner may have had any reason, which says nothing about a colour.
    """
    if len(old.seconds) < config.judge_min_requests:
        return _GIVEN_UP_SECONDS
    usual = quantile(old.seconds, 0.99)
    return max(_GIVEN_UP_LEAST_SECONDS, min(_GIVEN_UP_RATIO * usual, max(_GIVEN_UP_SECONDS, usual)))


def errors(new: Window, old: Window, config: Config, least: int) -> Check:
    """Judge the share of failed requests against the other colour's of the same time, and against absolute limits.

    Fewer than `least` requests say nothing. Where not one was answered well, it never passes.
    """
    if new.requests < least:
        return Check("errors", NO_DATA, f"{new.requests} requests of the {least} that say something")
    limit = config.judge_max_error_share
    # Where both fail, it is something that they share.
    if old.requests >= config.judge_min_requests:
        limit = max(limit, config.judge_max_error_ratio * old.error_share)
    # A colour that hardly answers can't become live, whatever the other one does.
    limit = min(limit, config.judge_error_ceiling)
    failed = _at_least(new.errors, new.requests) > limit
    well = NO_DATA if new.errors == new.requests else PASS
    gave_up = f", {new.given_up} of them because clients gave up" if new.given_up else ""
    return Check(
        "errors",
        FAIL if failed else well,
        f"{new.errors} of {new.requests} requests failed{gave_up} ({new.error_share:.1%}, at most {limit:.1%})",
        new.error_share,
        limit,
    )


def refusals(new: Window, old: Window, config: Config) -> Check | None:
    """Judge the share of requests that the new colour calls wrong against the other colour's; None for too few.

    A release with other inputs than the old one's answers at once and without an error, and serves nobody. Where not
    one answer was good, it never passes.
    """
    if new.requests < config.judge_min_requests:
        return None
    # Only the other colour tells a client's mistakes from the release's.
    limit = config.judge_error_ceiling
    if old.requests >= config.judge_min_requests:
        limit = min(1.0, max(config.judge_max_refused_share, config.judge_max_error_ratio * old.refused_share))
    served = PASS if new.refused + new.errors < new.requests else NO_DATA
    return Check(
        "refused",
        FAIL if _at_least(new.refused, new.requests) > limit else served,
        f"{new.refused} of {new.requests} requests refused with 4xx ({new.refused_share:.1%}, at most {limit:.1%})",
        new.refused_share,
        limit,
    )


def latencies(new: Window, old: Window, config: Config, *, comparable: bool = True) -> list[Check]:
    """Judge the answering times, by quantiles, against the other colour's for the same kind of traffic.

    Where it isn't the same, they aren't `comparable`, and only the absolute limit holds.
    """
    checks = []
    for percent in (50, 95, 99):
        name, share = f"p{percent}", percent / 100
        least = max(config.judge_min_requests, math.ceil(_MIN_BEYOND / (1 - share)))
        if len(new.seconds) < least:
            # The median must be known; of so few requests there is no tail to speak of.
            if percent == 50 and new.errors < new.requests:
                checks.append(
                    Check(name, NO_DATA, f"{len(new.seconds)} good answers of the {least} that say something")
                )
            continue
        value = quantile(new.seconds, share - _doubt(share, len(new.seconds))) * 1000
        limit = config.judge_max_p95_ms if percent == 95 else math.inf
        if comparable and len(old.seconds) >= least:
            reference = quantile(old.seconds, share + _doubt(share, len(old.seconds))) * 1000
            limit = min(
                limit,
                max(
                    config.judge_max_latency_ratio * reference,
                    reference + config.judge_min_latency_difference_ms,
                ),
            )
        elif comparable and percent == 50:
            checks.append(Check(name, NO_DATA, f"{len(old.seconds)} good answers of the other colour to compare with"))
            continue
        if math.isfinite(limit):
            verdict = FAIL if value > limit else PASS
            text = f"{_milliseconds(value)} or more, {_milliseconds(limit)} allowed"
            checks.append(Check(name, verdict, text, value, limit))
    return checks


def _milliseconds(value: float) -> str:
    """Three digits, but never as a power of ten."""
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of all. `values` must not be empty."""
    ordered = sorted(values)
    share = min(1.0, max(0.0, share))
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def _doubt(share: float, count: int) -> float:
    """How far from its place among `count` values a quantile may lie, for all we know."""
    return _Z * math.sqrt(share * (1 - share) / count)


def _at_least(count: int, total: int) -> float:
    """The lower end of Wilson's interval for a share: what it is at least, for all we know."""
    share, z2 = count / total, _Z * _Z
    middle = share + z2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, (middle - half) / (1 + z2 / total))
