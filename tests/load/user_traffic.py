"""Users of simplemodel: clients that think between requests, each time as another of a thousand, with other inputs."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

CLIENTS, THINK_S = 8, (0.02, 0.08)
_USERS = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: monotonic seconds at which it was sent, status (0 where no answer came), who answered."""

    begin: float
    status: int
    colour: str


class UserTraffic:
    """Requests to `url`/predict for as long as the context lasts; `answers` are those so far.

    Each client keeps its connection, and opens another where that broke.
    """

    def __init__(self, url: str) -> None:
        self.answers: list[Answer] = []
        self._address = urlsplit(url).netloc
        self._stopped = threading.Event()
        self._progress = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(CLIENTS)]

    def __enter__(self) -> UserTraffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with self._progress:
            self._progress.notify_all()
        for thread in self._threads:
            thread.join()

    def failed(self) -> int:
        """Requests that were answered with anything but 200, or not at all."""
        return sum(answer.status != 200 for answer in self.answers)

    def counts(self) -> Counter[tuple[int, str]]:
        """Requests by status and colour."""
        return Counter((answer.status, answer.colour) for answer in self.answers)

    def more(self, count: int, limit_s: float = 60.0) -> None:
        """Wait for so many more answers.

        Raises TimeoutError where they don't come within `limit_s` seconds, or where the clients have been stopped.
        """
        with self._progress:
            wanted = len(self.answers) + count
            self._progress.wait_for(lambda: len(self.answers) >= wanted or self._stopped.is_set(), limit_s)
            if (missing := wanted - len(self.answers)) > 0:
                raise TimeoutError(f"of {count} requests {missing} weren't made within {limit_s:g} s")

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        connection = http.client.HTTPConnection(self._address, timeout=30)
        while not self._stopped.wait(draw.uniform(*THINK_S)):
            body = json.dumps({"data": [draw.random(), draw.random()]})
            headers = {"Content-Type": "application/json", "X-User-Id": f"user-{draw.randrange(_USERS)}"}
            begin = time.monotonic()
            try:
                connection.request("POST", "/predict", body, headers)
                answer = connection.getresponse()
                answer.read()
                found = Answer(begin, answer.status, answer.getheader("X-Model-Colour", ""))
            except (OSError, http.client.HTTPException):
                connection.close()
                found = Answer(begin, 0, "")
            with self._progress:
                self.answers.append(found)
                self._progress.notify_all()
        connection.close()
