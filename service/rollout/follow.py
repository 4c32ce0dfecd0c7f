"""Showing how a rollout goes on to somebody who waits for its end. The rollout doesn't need them."""

from __future__ import annotations

import json
import time
from typing import Any

from rollout import plan
from rollout.config import Config
from rollout.report import Result, progress
from rollout.routing import Routing, State

_POLL_SECONDS = 0.5
_REPEAT_SECONDS = 10.0


def follow(config: Config, seconds: float | None) -> Result:
    """Until the rollout has ended, or for `seconds`. Its last report is the message."""
    try:
        return _follow(config, seconds)
    except KeyboardInterrupt:
        advice = "'appliance follow' shows it again, 'appliance abort' sends everybody back"
        return Result(f"not followed any more, and it goes on: {advice}", ok=False, exit_status=1)


def _follow(config: Config, seconds: float | None) -> Result:
    until = None if seconds is None else time.monotonic() + seconds
    shown, shown_at = None, 0.0
    while True:
        present = plan.read(config.rollout_file)
        if present is None:
            return Result("there never was a rollout", details={"ended": True})
        state = _state(config)
        details: dict[str, Any] = {"rollout": plan.as_details(present, state), "ended": not present.under_way}
        if not present.under_way:
            well = present.phase == plan.DONE
            state = Routing(config.routing_dir, config.colours).read()
            live = state.live if state else "nothing"
            back = "back on " if present.went_back and live == present.source else ""
            message = (
                f"rollout {present.number} of release {present.target_release} is over: {present.describe()}; "
                f"{back}{live}{'' if back else ' is live'}"
            )
            return Result(message, ok=well, changed=well, exit_status=0 if well else 1, details=details)
        text = _report(config, present, state)
        if until is not None and time.monotonic() >= until:
            return Result(text, details=details)
        if text != shown and (shown is None or time.monotonic() >= shown_at + _REPEAT_SECONDS):
            progress(text)
            shown, shown_at = text, time.monotonic()
        time.sleep(_POLL_SECONDS)


def _state(config: Config) -> State | None:
    return Routing(config.routing_dir, config.colours).known()


def _report(config: Config, present: plan.Plan, state: State | None) -> str:
    """The plan in words, and what the watch found at its last look."""
    text = present.describe(state)
    try:
        about = json.loads(config.rollout_report_file.read_bytes())
        if about["rollout"] != present.number or about["text"] != text:
            return text
        found = "; ".join(f"{check['name']} {check['verdict']} ({check['text']})" for check in about["checks"])
        return f"{text}; {about['left_seconds']} s left; {found}"
    except (OSError, ValueError, KeyError, TypeError):
        return text
