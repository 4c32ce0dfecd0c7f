"""Training rows and traffic to try drift with: `python -m drift.simulate training|traffic`.

Both draw rows from what a bundle's reference.json says of each feature on its own; what features have to do with each
other, it doesn't know. `--shift 1.0 --feature x1` moves a feature by as many standard deviations: that is drift.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from drift import config, live
from drift.errors import DriftError
from drift.reference import Feature, Reference

_REPORT_SECONDS = 10.0
_TIMEOUT_SECONDS = 30.0
_ANSWER_SECONDS = 10.0


def draw(feature: Feature, generator: random.Random) -> float:
    """A value whose bins have the shares of the training values'.

    Within a bin all values are alike; those of the outer bins thin out as fast as their neighbours suggest.
    """
    if not feature.edges:
        return feature.mean
    edges = feature.edges
    number = generator.choices(range(len(feature.ratios)), feature.ratios)[0]
    if 0 < number < len(edges):
        return generator.uniform(edges[number - 1], edges[number])
    # A bin's width is the mean distance of an exponential distribution, cut off at the most extreme training value.
    if number == 0:
        width = edges[1] - edges[0] if len(edges) > 1 else edges[0] - feature.minimum
        return edges[0] - _distance(edges[0] - feature.minimum, width, generator)
    width = edges[-1] - edges[-2] if len(edges) > 1 else feature.maximum - edges[-1]
    return edges[-1] + _distance(feature.maximum - edges[-1], width, generator)


def _distance(most: float, mean: float, generator: random.Random) -> float:
    if most <= 0 or mean <= 0:
        return 0.0
    return -mean * math.log1p(generator.random() * math.expm1(-most / mean))


def rows(reference: Reference, shifts: dict[str, float], seed: int | None) -> Iterator[dict[str, float]]:
    """Rows for ever; `shifts` are in standard deviations, by feature. The same seed gives the same rows."""
    generator = random.Random(seed)
    while True:
        yield {
            feature.name: draw(feature, generator) + shifts.get(feature.name, 0.0) * (feature.std or 1.0)
            for feature in reference.features
        }


def main() -> int:
    """The exit status."""
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except DriftError as error:
        print(f"drift.simulate: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("drift.simulate: interrupted", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m drift.simulate", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("training", help="send training rows to the model's topic")
    training.set_defaults(run=_training)
    training.add_argument("--rows", type=int, default=10_000, help="how many (default: %(default)s)")
    training.add_argument(
        "--rate", type=float, default=0.0, help="rows a second; 0 for as fast as it goes (the default)"
    )
    training.add_argument("--bootstrap", help="Kafka's address HOST:PORT; by default what --config says")
    training.add_argument("--topic", help="by default what --config says")
    training.add_argument(
        "--config", type=Path, default=config.DEFAULT_PATH, help="the service's configuration (default: %(default)s)"
    )
    traffic = commands.add_parser("traffic", help="send predictions to the appliance")
    traffic.set_defaults(run=_traffic)
    traffic.add_argument("--url", default="http://127.0.0.1", help="the appliance (default: %(default)s)")
    traffic.add_argument("--rate", type=float, default=50.0, help="requests a second (default: %(default)s)")
    traffic.add_argument("--minutes", type=float, default=10.0, help="for how long (default: %(default)s)")
    traffic.add_argument("--batch", type=int, default=1, help="rows in each request (default: %(default)s)")
    for command in (training, traffic):
        command.add_argument("--bundle", type=Path, help="the bundle's directory; by default the live one of this host")
        command.add_argument("--model", help="of a bundle that holds several; by default its first with a reference")
        command.add_argument("--shift", type=float, default=0.0, help="standard deviations (default: none)")
        command.add_argument("--feature", action="append", help="to shift; may be repeated; by default all of them")
        command.add_argument("--seed", type=int, help="for the same rows again")
    return parser


def _model(arguments: argparse.Namespace) -> live.Model:
    """The model to draw rows for. Raises DriftError."""
    directory = arguments.bundle or live.bundle(config.Config.appliance_dir, config.Config.config_dir)
    if directory is None:
        raise DriftError("no bundle is live on this host: name one with --bundle DIRECTORY")
    found = [model for model in live.models(directory).values() if model.reference is not None]
    for model in found:
        if arguments.model in (None, model.name):
            return model
    names = ", ".join(model.name for model in found) or "none"
    raise DriftError(f"{directory} brings no reference for {arguments.model or 'its model'}; it has one for: {names}")


def _drawn(arguments: argparse.Namespace, reference: Reference) -> Iterator[dict[str, float]]:
    names = [feature.name for feature in reference.features]
    wanted = arguments.feature or names
    for name in wanted:
        if name not in names:
            raise DriftError(f"--feature {name}: the model has the features {', '.join(names)}")
    return rows(reference, dict.fromkeys(wanted, arguments.shift), arguments.seed)


def _training(arguments: argparse.Namespace) -> int:
    # Traffic needs nothing but this package, and so runs wherever Python does.
    from confluent_kafka import KafkaException, Producer

    model = _model(arguments)
    drawn = _drawn(arguments, model.reference)
    settings, topic = _destination(arguments, model.name)
    failed: Counter[str] = Counter()

    def delivered(error: object, _: object) -> None:
        if error is not None:
            failed[str(error)] += 1

    try:
        # Idempotent: no row is there twice where an answer got lost.
        producer = Producer({"linger.ms": 50, "log_level": 0, **settings, "enable.idempotence": True})
    except KafkaException as error:
        raise DriftError(f"librdkafka refuses the settings: {error.args[0].str()}") from None
    try:
        producer.list_topics(timeout=_ANSWER_SECONDS)
    except KafkaException as error:
        raise DriftError(f"no answer from Kafka at {settings['bootstrap.servers']}: {error.args[0].str()}") from None
    for row in _paced(itertools.islice(drawn, arguments.rows), arguments.rate):
        content = json.dumps({"features": row}).encode()
        while True:
            try:
                producer.produce(topic, content, on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.5)
        producer.poll(0)
    left = producer.flush(_TIMEOUT_SECONDS)
    for error, count in failed.items():
        print(f"{count} rows were refused: {error}", file=sys.stderr)
    lost = left + sum(failed.values())
    print(f"{arguments.rows - lost} of {arguments.rows} rows of {model.name} {model.version} are in the topic {topic}")
    return 1 if lost else 0


def _destination(arguments: argparse.Namespace, model: str) -> tuple[dict[str, object], str]:
    """librdkafka's settings and the topic. Raises DriftError."""
    if arguments.bootstrap and arguments.topic:
        return {"bootstrap.servers": arguments.bootstrap}, arguments.topic
    settings = config.read(arguments.config)
    topic = arguments.topic or settings.topics.get(model)
    if topic is None:
        raise DriftError(f"{arguments.config} names no topic for {model}: name one with --topic")
    bootstrap = {"bootstrap.servers": arguments.bootstrap} if arguments.bootstrap else {}
    return {**settings.kafka, **bootstrap}, topic


def _traffic(arguments: argparse.Namespace) -> int:
    url = urlsplit(arguments.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise DriftError(f"--url {arguments.url}: it must begin with http:// or https:// and a host's name")
    if arguments.rate <= 0:
        raise DriftError(f"--rate {arguments.rate:g}: it must be above 0")
    if arguments.batch < 1:
        raise DriftError(f"--batch {arguments.batch}: it must be at least 1")
    model = _model(arguments)
    drawn = _drawn(arguments, model.reference)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=_TIMEOUT_SECONDS)
    path = f"{url.path.rstrip('/')}/v1/model/{model.name}/predict"
    answers: Counter[str] = Counter()
    reported = time.monotonic()
    count = round(arguments.rate * arguments.minutes * 60)
    values = (list(row.values()) for row in drawn)
    requests = (list(itertools.islice(values, arguments.batch)) for _ in range(count))
    for request in _paced(requests, arguments.rate):
        answers[_ask(connection, path, request)] += 1
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            print(_summary(answers), flush=True)
    print(_summary(answers))
    return 0 if set(answers) == {"200"} else 1


def _ask(connection: http.client.HTTPConnection, path: str, rows: list[list[float]]) -> str:
    """The status of an answer, or what went wrong."""
    try:
        connection.request("POST", path, json.dumps({"data": rows}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return type(error).__name__
    return str(answer.status)


def _summary(answers: Counter[str]) -> str:
    return f"{answers.total()} requests: " + ", ".join(f"{count} {answer}" for answer, count in answers.most_common())


def _paced(items: Iterator[Any], rate: float) -> Iterator[Any]:
    """The items, `rate` of them a second; what took too long is caught up with."""
    began = time.monotonic()
    for number, item in enumerate(items):
        if rate > 0 and (ahead := began + number / rate - time.monotonic()) > 0:
            time.sleep(ahead)
        yield item


if __name__ == "__main__":
    sys.exit(main())
