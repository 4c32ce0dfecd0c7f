"""What the user sees and how commands are run: progress lines, readable failures, log files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class LabError(Exception):
    """A failure with a message that tells the user what to do next."""


def say(text: str) -> None:
    """Print one line at once, so that progress shows through pipes as well."""
    print(text, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and print its duration in seconds when it ends."""
    say(f"==> {title}")
    start = time.monotonic()
    yield
    say(f"    {title}: done in {time.monotonic() - start:.0f} s")


def run(
    command: Sequence[str | Path],
    *,
    log: Path | None = None,
    input_text: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a command and return its standard output.

    :param log: file that receives the command's whole output, for long commands.
    :param variables: what its environment has besides this process's own.
    :raises LabError: with the command's last lines, when it fails or can't be started.
    """
    arguments = [str(part) for part in command]
    environment = {**os.environ, **(variables or {})}
    try:
        if log is None:
            result = subprocess.run(
                arguments, input=input_text, env=environment, capture_output=True, text=True, check=False
            )
            output, tail = result.stdout, result.stderr or result.stdout
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as stream:
                result = subprocess.run(
                    arguments,
                    input=input_text,
                    env=environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
            output = tail = log.read_text(errors="replace")
    except OSError as error:
        raise LabError(f"{arguments[0]} could not be started: {error.strerror}") from error
    if result.returncode != 0:
        last = "\n".join(tail.strip().splitlines()[-15:])
        where = f"\nThe whole output is in {log}." if log else ""
        raise LabError(f"`{' '.join(arguments[:6])}` failed with exit status {result.returncode}:\n{last}{where}")
    return output


def succeeds(command: Sequence[str | Path]) -> bool:
    """Tell whether a command exits with 0; a missing program counts as no."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def wait_until(condition, *, seconds: float, failure: str, interval: float = 0.3):  # noqa: ANN001, ANN201
    """Poll `condition` until it returns something true, and return that.

    :param seconds: time limit.
    :raises LabError: with the text `failure` when the limit is reached.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(failure)
        time.sleep(interval)


def fail(error: LabError) -> int:
    """Print an error the way every command of the lab ends on one; return the exit status."""
    print(f"\nERROR: {error}", file=sys.stderr, flush=True)
    return 1
