"""Batches: which waiting calls the model gets together, and who gets which of its outputs."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from model_server.core import Call, Models, Refusal, Reply
from model_server.errors import ModelFailed
from model_server.metrics import Metrics, ModelMetrics
from model_server.model import Model
from model_server.payload import BadRequest, UnusableOutput

# A model that is quicker than this at a whole batch runs in the server's loop: handing a call to another thread and
# back costs more than that, and while the loop runs it, requests gather in the sockets and make the next batch.
INLINE_SECONDS = 0.002
# How much slower it may become, on average, before it gets a thread of its own after all. No batch counts for more than
# the most, so that it takes several: a single one is also slow where the host or the process stood still.
_INLINE_PATIENCE = 4.0
_AVERAGE_WEIGHT = 0.05
_MOST_COUNTED = 16.0
# However many requests may wait, their bodies must not fill the memory: what came compressed took little room so far.
_MOST_WAITING_BYTES = 64 << 20
# Rows that take long to prepare, such as large images, don't hold up those that are ready: they make the next batch.
_PREPARE_SECONDS = 0.1
# How often a full queue is searched for those who gave up: each search costs as much as a refusal.
_SEARCH_SECONDS = 0.1


class Lane:
    """The calls that wait for one model. ``inline``: the loop runs it; else ``limit`` calls may wait.

    Those for the loop need no limit: it takes one request of each connection in a turn and leaves none waiting, so
    there are never more than connections, whose number has its own limit. Where their bodies get to be too much, they
    are run before the turn is over.
    """

    def __init__(self, model: Model, limit: int, metrics: ModelMetrics) -> None:
        self.model = model
        self.limit = limit
        self.inline = model.batch_seconds < INLINE_SECONDS
        self.waiting: deque[Call] = deque()
        self.metrics = metrics
        # Calls that were submitted and aren't finished, and what scrapes see of them and of those that wait.
        self.in_progress = 0
        self.shown = (0, 0)
        # What failed together is tried one by one; always the first of those who wait.
        self._alone: set[Call] = set()
        self._average = model.batch_seconds
        self._searched = -math.inf

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return sum(len(call.rows) for call in self.waiting)

    @property
    def departure(self) -> float:
        """When the next batch is to begin at the latest, of ``time.perf_counter``; something must wait."""
        if self.waiting[0] in self._alone:
            return -math.inf
        # Waiting for company must not use up the time of those who have little.
        delay = self.model.max_delay_seconds
        return min(call.received + min(delay, (call.seconds or math.inf) / 2) for call in self.waiting)

    def take(self) -> list[Call]:
        """The calls that make the next batch: the oldest, and those behind it that fit and may share a batch."""
        first = self.waiting.popleft()
        if first in self._alone:
            self._alone.remove(first)
            return [first]
        batch, rows, most = [first], len(first.rows), self.model.max_batch_rows
        while self.waiting:
            call = self.waiting[0]
            rows += len(call.rows)
            # Tensors and lists take different ways through the model.
            if rows > most or type(call.rows) is not type(first.rows) or call.wants_tensor is not first.wants_tensor:
                break
            batch.append(self.waiting.popleft())
        return batch

    def put_back(self, failed: list[Call], left: list[Call]) -> None:
        """Have calls of the last batch wait again, before all others, each of the ``failed`` for a batch of its own."""
        self.waiting.extendleft(reversed(failed + left))
        self._alone.update(failed)

    def take_hopeless(self) -> list[tuple[Call, Reply | Exception]]:
        """Those who wait and will get no answer, as they are gone or too late; they leave their places to others."""
        now = time.perf_counter()
        if now - self._searched < _SEARCH_SECONDS:
            return []
        self._searched = now
        hopeless = [(call, refusal) for call in self.waiting if (refusal := _too_late(call, now)) is not None]
        if hopeless:
            gone = {call for call, _ in hopeless}
            self.waiting = deque(call for call in self.waiting if call not in gone)
            self._alone -= gone
        return hopeless

    def take_all(self) -> list[Call]:
        """All calls, in their order."""
        calls = list(self.waiting)
        self.waiting.clear()
        self._alone.clear()
        return calls

    def note(self, seconds: float) -> None:
        """Keep an average of what batches take, and leave the loop where that is too much for it."""
        self._average += (min(seconds, INLINE_SECONDS * _MOST_COUNTED) - self._average) * _AVERAGE_WEIGHT
        if self._average > INLINE_SECONDS * _INLINE_PATIENCE:
            self.inline = False


class Executor:
    """Runs the models of one worker: quick ones in the server's loop, the others in one thread, batch by batch in turn.

    ``submit``, ``run_inline`` and ``deliver`` belong to the loop's thread; each call's ``finish`` is called there.
    ``models`` are the models by name. ``busy`` is called with True and False around each batch of the thread alone,
    since a model that hangs in the loop shows in the loop's silence; ``wake`` when the thread has something to deliver.
    """

    def __init__(self, models: Models, limit: int, metrics: Metrics, busy: Callable[[bool], None]) -> None:
        self._lanes = {
            model: Lane(model, limit, metrics.of(model.name, model.bundle.output.labels)) for model in models.all
        }
        self.models = {model.name: model for model in models.all}
        self._busy = busy
        self.wake: Callable[[], None] = lambda: None
        # Each lane in which calls wait for the thread, once.
        self._threaded: deque[Lane] = deque()
        self._some = threading.Condition()
        self._done: deque[tuple[Call, Reply | Exception]] = deque()
        self._started = False
        # Of the calls that wait: for the thread, and for the loop.
        self._bytes = 0
        self._inline_bytes = 0

    def show_load(self) -> None:
        """Have scrapes see how many calls are in progress and how many of them wait."""
        for lane in self._lanes.values():
            load = (lane.in_progress, len(lane.waiting))
            if load != lane.shown:
                with self._some:
                    lane.shown = load
                    lane.metrics.in_progress.set(load[0])
                    lane.metrics.queue_depth.set(load[1])

    def submit(self, call: Call) -> None:
        """Queue a call. Raises Refusal where too many wait already."""
        lane = self._lanes[call.model]
        if lane.inline:
            lane.waiting.append(call)
            lane.in_progress += 1
            self._inline_bytes += call.size
            if self._inline_bytes > _MOST_WAITING_BYTES:
                self.show_load()
                self.run_inline()
            return
        with self._some:
            if self._is_full(lane, call):
                self._drop(lane.take_hopeless())
                if self._is_full(lane, call):
                    raise overloaded()
            lane.waiting.append(call)
            self._bytes += call.size
            lane.in_progress += 1
            self._queue(lane)
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="model", daemon=True).start()
            self._some.notify()

    def run_inline(self) -> None:
        """Run what waits for quick models, to the end."""
        self._inline_bytes = 0
        for lane in self._lanes.values():
            # What waits for a slow model is for the thread alone to take.
            if not lane.inline:
                continue
            while lane.waiting and lane.inline:
                results, failed, left = _execute(lane, lane.take())
                lane.put_back(failed, left)
                self._finish(results)
            if not lane.inline:
                self._move_to_thread(lane)

    def deliver(self) -> None:
        """Finish the calls that the thread is done with."""
        while self._done:
            self._finish([self._done.popleft()])

    def _finish(self, results: list[tuple[Call, Reply | Exception]]) -> None:
        for call, result in results:
            self._lanes[call.model].in_progress -= 1
            call.finish(call, result)

    def _is_full(self, lane: Lane, call: Call) -> bool:
        # A body that is alone may be of any size that the service accepts.
        too_many_bytes = self._bytes > 0 and self._bytes + call.size > _MOST_WAITING_BYTES
        return len(lane.waiting) >= lane.limit or too_many_bytes

    def _drop(self, hopeless: list[tuple[Call, Reply | Exception]]) -> None:
        self._bytes -= sum(call.size for call, _ in hopeless)
        self._done.extend(hopeless)

    def _queue(self, lane: Lane) -> None:
        if lane not in self._threaded:
            self._threaded.append(lane)

    def _gather(self, lane: Lane) -> None:
        """Wait for more calls where the bundle asks for that, holding the lock but while waiting."""
        while (
            # Other models' calls don't wait for that.
            len(self._threaded) == 1
            and lane.waiting
            and lane.rows < lane.model.max_batch_rows
            and (left := lane.departure - time.perf_counter()) > 0
        ):
            self._some.wait(left)

    def _move_to_thread(self, lane: Lane) -> None:
        calls = lane.take_all()
        lane.in_progress -= len(calls)
        for call in calls:
            try:
                self.submit(call)
            except Refusal as refusal:
                call.finish(call, refusal)

    def _run(self) -> None:
        while True:
            with self._some:
                while not self._threaded:
                    self._some.wait()
                lane = self._threaded[0]
                self._gather(lane)
                self._threaded.popleft()
                # All of them may have left meanwhile.
                if not lane.waiting:
                    continue
                batch = lane.take()
                if lane.waiting:
                    self._queue(lane)
                self._bytes -= sum(call.size for call in batch)
            self.show_load()
            self._busy(True)
            results, failed, left = _execute(lane, batch)
            self._busy(False)
            if failed or left:
                with self._some:
                    lane.put_back(failed, left)
                    self._queue(lane)
                    self._bytes += sum(call.size for call in failed + left)
            self._done.extend(results)
            self.wake()


def overloaded() -> Refusal:
    """What a client is told where the queue is full."""
    return Refusal(
        503, "too many requests are waiting; try again", reason="queue_full", headers=(("Retry-After", "1"),)
    )


def _execute(lane: Lane, calls: list[Call]) -> tuple[list[tuple[Call, Reply | Exception]], list[Call], list[Call]]:
    """Run calls as one batch: what each of them gets, those that failed together, and those left for the next batch.

    Whatever the model's code raises ends here.
    """
    started = time.perf_counter()
    results: list[tuple[Call, Reply | Exception]] = []
    ready: list[tuple[Call, Sequence[Any]]] = []
    left: list[Call] = []
    model = lane.model
    for index, call in enumerate(calls):
        now = time.perf_counter()
        if index and now - started > _PREPARE_SECONDS:
            left = calls[index:]
            break
        call.queue_seconds = started - call.received
        refusal = _too_late(call, now)
        if refusal is not None:
            results.append((call, refusal))
            continue
        try:
            ready.append((call, model.prepare(call.rows)))
        except Exception as error:
            results.append((call, _translated(error)))
    failed: list[Call] = []
    if ready:
        answers = _predict(lane, ready)
        if answers is None:
            failed = [call for call, _ in ready]
        else:
            results += answers
    lane.note(time.perf_counter() - started)
    return results, failed, left


def _predict(lane: Lane, ready: list[tuple[Call, Sequence[Any]]]) -> list[tuple[Call, Reply | Exception]] | None:
    """What each call gets; None where several failed together."""
    model, started = lane.model, time.perf_counter()
    wants_tensor = ready[0][0].wants_tensor
    try:
        outputs = model.predict([rows for _, rows in ready], wants_tensor)
        if len(outputs) != len(ready):
            raise ModelFailed(f"{len(outputs)} answers for {len(ready)} requests")
    # Also what only a single row is to blame for: the others are to be tried without it.
    except BaseException as error:
        if len(ready) > 1:
            return None
        ready[0][0].model_seconds = time.perf_counter() - started
        return [(ready[0][0], _translated(error))]
    seconds = time.perf_counter() - started
    lane.metrics.batch(sum(len(rows) for _, rows in ready), seconds)
    results: list[tuple[Call, Reply | Exception]] = []
    for (call, _), output in zip(ready, outputs, strict=True):
        call.model_seconds = seconds
        try:
            reply = call.render(output)
            # Not before: what can't be written would spoil the metrics.
            lane.metrics.outputs(_values(model, output))
            results.append((call, reply))
        except BaseException as error:
            results.append((call, _translated(error)))
    return results


def _values(model: Model, output: Any) -> list[Any]:
    """What a classifier says of each row, for the metrics; nothing where it isn't one, or has no finite answer."""
    spec = model.bundle.output
    if not spec.labels:
        return []
    if isinstance(output, list):
        return output
    try:
        return spec.values(output)
    except ValueError:
        return []


def _too_late(call: Call, now: float) -> Refusal | None:
    if call.is_alive is not None and not call.is_alive():
        return Refusal(499, "the client is gone", reason="abandoned")
    deadline = call.deadline
    if deadline is not None and now > deadline:
        return Refusal(504, "the request waited for longer than the client wanted", reason="deadline")
    return None


def _translated(error: BaseException) -> Exception:
    if isinstance(error, Refusal | ModelFailed | UnusableOutput):
        return error
    if isinstance(error, BadRequest):
        return Refusal(400, str(error))
    failure = ModelFailed(f"the model failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
