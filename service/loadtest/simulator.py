"""The load simulator: users of tables and users of images, who post the examples of a colour's bundle.

Locust runs it on the appliance's host, with its web page or without (``--headless``). What to post and where follows
from the appliance's own files (docs/contracts.md) when a run starts, so that it goes on fitting after a swap.

Each user holds a connection, pauses between two requests, and has a name of its own (``X-User-Id``): a canary's share
of users applies to simulated ones, too. Request ids begin with ``loadtest-``. Where there's nothing to post, requests
fail with the reason, which the web page shows among the failures.

Without the web page, it writes one JSON object to standard output in the end: ``target``, ``bundle``, ``requests``,
``failures``, ``errors`` (how many failed, by kind), ``p50_ms``, ``p95_ms``, ``p99_ms`` (null without a request),
``table`` (lines for people) and ``faults``, a sentence for each criterion that was missed. The times are Locust's own,
which it keeps to two digits.
"""

import itertools
import json
import math
import os
import random
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import flask
import gevent
import locust
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FastResponse
from locust.env import Environment

TARGETS = {"production": "", "test": "/test"}
RAMPS = ("none", "linear", "steps", "wave")
STEPS = 5
HEADERS = {"Content-Type": "application/json"}
COLUMNS = ("USERS", "PATH", "REQUESTS", "FAILED", "PER SECOND", "P50 MS", "P95 MS", "P99 MS", "MAX MS")


@dataclass
class Script:
    """What the users of a run do. ``posts`` holds (path, body) for each kind of user."""

    target: str = ""
    bundle: str = ""
    front_door: str = ""
    posts: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    # Why there is nothing to post.
    fault: str = ""


script = Script()
numbers = itertools.count(1)


@locust.events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Those of the web page's form, and those that the command line alone has."""
    parser.add_argument(
        "--target",
        choices=list(TARGETS),
        default="test",
        help="test: the idle colour, at /test/predict; production: the live one, at /predict",
    )
    parser.add_argument(
        "--ramp",
        choices=list(RAMPS),
        default="none",
        help="none: all, at the ramp up above; linear: from one to all over the run time; steps: one fifth of them "
        "after the other; wave: from one to all and back",
    )
    parser.add_argument("--think-seconds", type=float, default=1.0, help="mean pause of a user between two requests")
    hidden = {"include_in_web_ui": False}
    parser.add_argument(
        "--appliance", type=Path, default=Path("/etc/appliance/appliance.json"), help="the engine's settings", **hidden
    )
    parser.add_argument("--timeout-seconds", type=float, default=10.0, help="time for an answer", **hidden)
    parser.add_argument("--min-requests", type=int, default=0, help="fewer than this say nothing", **hidden)
    parser.add_argument("--max-error-share", type=float, default=1.0, **hidden)
    for percent in (50, 95, 99):
        parser.add_argument(f"--max-p{percent}-ms", type=float, default=math.inf, **hidden)


@locust.events.init.add_listener
def prepare(environment: Environment, **_: object) -> None:
    """Locust has come up, and gevent's clock stood still meanwhile: the run would end that much too early."""
    gevent.get_hub().loop.update_now()
    if environment.web_ui:
        environment.web_ui.app.before_request(refuse_other_pages)


def refuse_other_pages() -> None:
    """Keep other pages in the operator's browser from using this one, by a form or by a name that leads here."""
    origin = flask.request.headers.get("Origin")
    host = urlsplit(f"//{flask.request.host}").hostname
    if host not in ("127.0.0.1", "localhost") or (origin and urlsplit(origin).netloc != flask.request.host):
        flask.abort(403)


@locust.events.test_start.add_listener
def begin(environment: Environment, **_: object) -> None:
    """Find out what the users of this run do."""
    global script
    options = environment.parsed_options
    script = read_script(options.appliance, options.target)
    # For the page to show.
    environment.host = script.front_door or None
    able = [user for user in (TabularUser, ImageUser) if script.posts.get(user.kind)]
    environment.user_classes = able or [TabularUser]


def read_script(config: Path, target: str) -> Script:
    """What there is to post to ``target``, from the appliance's files; ``config`` is the engine's."""
    try:
        settings = json.loads(config.read_bytes())
        front_door = settings["front_door"]
        live = next(
            (c for c in settings["colours"] if Path(settings["state_dir"], "routing/current", c).is_file()), None
        )
        if live is None:
            return Script(target, fault="no colour is live: deploy a bundle first")
        colour = live if target == "production" else next(c for c in settings["colours"] if c != live)
        environment = Path(settings["config_dir"], f"{colour}.env")
        if not environment.is_file():
            return Script(target, fault=f"{colour} holds no release: deploy one, or aim at production")
        bundle = Path(dict(line.partition("=")[::2] for line in environment.read_text().splitlines())["MODEL_BUNDLE"])
        posts = read_posts(bundle, TARGETS[target])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Script(target, fault=f"the appliance's files can't be read: {type(error).__name__}: {error}")
    return Script(target, f"{bundle.parent.name} {bundle.name}", front_door, posts)


def read_posts(bundle: Path, prefix: str) -> dict[str, list[tuple[str, bytes]]]:
    """The examples of a bundle and of the models in it, by the kind of user that posts them."""
    posts: dict[str, list[tuple[str, bytes]]] = {"tabular": [], "image": []}
    for file in sorted(bundle.glob("*/examples.json")) or [bundle / "examples.json"]:
        inner = file.parent != bundle
        path = f"{prefix}/v1/model/{file.parent.name}/predict" if inner else f"{prefix}/predict"
        for example in json.loads(file.read_bytes())["examples"]:
            rows = example["request"]["data"]
            # A file travels as base64 text; all else are numbers.
            first = rows[0] if isinstance(rows, list) and rows else rows
            posts["image" if isinstance(first, str) else "tabular"].append(
                (path, json.dumps(example["request"]).encode())
            )
    return posts


class Ramp(locust.LoadTestShape):
    """How many users there are at each time."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Called by Locust once a second: users, and how many of them may come a second; None ends the run."""
        options = self.runner.environment.parsed_options
        seconds = self.get_run_time()
        if options.run_time and seconds >= options.run_time:
            return None
        if options.ramp == "none":
            return options.num_users, options.spawn_rate
        users = max(1, math.ceil(options.num_users * share(options.ramp, seconds / (options.run_time or 300))))
        return users, float(options.num_users)


def share(ramp: str, progress: float) -> float:
    """The share of all users after the part ``progress`` of the run time; both from 0 to 1."""
    progress = min(progress, 1.0)
    if ramp == "steps":
        return math.floor(1 + progress * STEPS) / STEPS if progress < 1 else 1.0
    if ramp == "wave":
        return (1 - math.cos(2 * math.pi * progress)) / 2
    return progress


class _User(locust.FastHttpUser):
    """A client that thinks between two requests on the same connection."""

    abstract = True
    kind = ""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        self.network_timeout = self.connection_timeout = options.timeout_seconds
        # Whatever the form says.
        self.host = script.front_door or "http://127.0.0.1"
        super().__init__(environment)
        number = next(numbers)
        self._headers = {**HEADERS, "X-User-Id": f"loadtest-{number}"}
        # Each begins at another example.
        posts = script.posts.get(self.kind) or []
        self._posts = itertools.islice(itertools.cycle(posts), number % len(posts), None) if posts else None

    def wait_time(self) -> float:
        """Seconds until the next request."""
        think = self.environment.parsed_options.think_seconds
        return random.uniform(0.5 * think, 1.5 * think)

    def on_start(self) -> None:
        """Don't all begin in the same instant."""
        self.wait()

    @locust.task
    def predict(self) -> None:
        """Post the next example."""
        if self._posts is None:
            self._note(self.kind, 0.0, script.fault or f"{script.bundle} has no example")
            return
        path, body = next(self._posts)
        name = f"{self.kind} {path}"
        self._headers["X-Request-ID"] = f"loadtest-{os.urandom(12).hex()}"
        began = time.perf_counter()
        try:
            with self.client.post(
                path,
                data=body,
                headers=self._headers,
                name=name,
                allow_redirects=False,
                catch_response=True,
            ) as response:
                fault = fault_of(response)
                if fault:
                    response.failure(fault)
        except Exception as error:
            # What isn't HTTP at all: Locust would count no request.
            self._note(name, (time.perf_counter() - began) * 1000, name_of(error))

    def _note(self, name: str, milliseconds: float, fault: str) -> None:
        self.environment.events.request.fire(
            request_type="POST",
            name=name,
            response_time=milliseconds,
            response_length=0,
            exception=fault,
            context={},
        )


class TabularUser(_User):
    """Posts rows of numbers."""

    kind = "tabular"


class ImageUser(_User):
    """Posts files."""

    kind = "image"


def fault_of(response: FastResponse) -> str | None:
    """What is wrong with an answer, as one of few kinds, or None."""
    if not response.status_code:
        return name_of(response.error)
    if response.status_code != 200:
        return f"status {response.status_code}"
    try:
        json.loads(response.content)
    except ValueError:
        return "not JSON"
    return None


def name_of(error: Exception) -> str:
    """What went wrong on the way, in a word."""
    # geventhttpclient wraps what ended the only attempt.
    return type(getattr(error, "original", None) or error).__name__


@locust.events.quitting.add_listener
def write_summary(environment: Environment, **_: object) -> None:
    """The users have ended, or Locust was told to."""
    if environment.parsed_options.headless:
        print(json.dumps(summary(environment)), flush=True)


def summary(environment: Environment) -> dict[str, object]:
    """The object that is written in the end."""
    total = environment.stats.total
    kinds = Counter()
    for error in environment.stats.errors.values():
        text = error.error if isinstance(error.error, str) else str(error.error)
        kinds[text] += error.occurrences
    measured = {f"p{percent}_ms": _percentile(total, percent) for percent in (50, 95, 99)}
    return {
        "target": script.target,
        "bundle": script.bundle,
        "requests": total.num_requests,
        "failures": total.num_failures,
        "errors": dict(kinds),
        **measured,
        "table": table([*sorted(environment.stats.entries.values(), key=lambda entry: entry.name), total]),
        "faults": faults(environment.parsed_options, total.num_requests, total.num_failures, kinds, measured),
    }


def faults(
    options: Namespace, requests: int, failures: int, kinds: dict[str, int], measured: dict[str, float | None]
) -> list[str]:
    """A sentence for each criterion that was missed."""
    if script.fault:
        return [script.fault]
    least = max(1, options.min_requests)
    if requests < least:
        return [f"{requests} requests say nothing, fewer than {least}: take more users or more time"]
    missed = []
    if failures / requests > options.max_error_share:
        listed = ", ".join(f"{number} × {kind}" for kind, number in sorted(kinds.items()))
        missed.append(
            f"{failures} of {requests} requests failed ({listed}); max_error_share is {options.max_error_share:g}"
        )
    for name, value in measured.items():
        limit = getattr(options, f"max_{name}")
        if value > limit:
            missed.append(f"{name} is {value:g}; max_{name} is {limit:g}")
    return missed


def table(entries: list[locust.stats.StatsEntry]) -> list[str]:
    """Locust's figures as aligned lines."""
    rows = [COLUMNS]
    for entry in entries:
        users, _, path = entry.name.partition(" ")
        times = (*(_percentile(entry, percent) for percent in (50, 95, 99)), entry.max_response_time)
        rows.append(
            (
                "all" if entry.name == "Aggregated" else users,
                path or "-",
                str(entry.num_requests),
                str(entry.num_failures),
                f"{entry.total_rps:.1f}",
                *("-" if value is None or not entry.num_requests else f"{value:.0f}" for value in times),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _percentile(entry: locust.stats.StatsEntry, percent: int) -> float | None:
    return entry.get_response_time_percentile(percent / 100) if entry.num_requests else None
