# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Stands for CUDA's streams and events on the CPU: who enqueued what where, and what comes before what.

Every stream counts its operations. A *clock* says of each stream how many of its operations are over; a stream's own
clock is what its next operation comes after. An event is the clock of its stream when it was recorded, and a stream
that waits for it takes that over. Work is computed at once, in the order in which the host enqueues it, so that values
are right; whether streams could have done it in another order is what the clocks tell.

The host has two clocks. What it has *seen*, by a query or by waiting, it may read in pinned memory. What it has
*waited* for comes before all that it enqueues afterwards. A query that answers yes does not: how it is answered is
chance, and nothing may hang on it but what the host does.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2] / "deepspeed_acco"
ANSWERS = ("never", "at random", "always")

Clock = dict[int, int]  # by number of the stream


def join(clock: Clock, other: Clock) -> None:
    """Makes ``clock`` what both are over."""
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def covers(clock: Clock, other: Clock) -> bool:
    """Tells whether all of ``other`` is over in ``clock``."""
    return all(clock.get(stream, 0) >= count for stream, count in other.items())


class Stream:
    """Stands for a torch.cuda.Stream."""

    def __init__(self, device: Device, number: int, name: str):
        self.number, self.name = number, name
        self.clock: Clock = {number: 0}
        self._device = device

    def advance(self) -> int:
        """Enqueues an operation, and returns its number on this stream."""
        join(self.clock, self._device.waited)
        self.clock[self.number] += 1
        return self.clock[self.number]

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._device)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.advance()
        join(self.clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self._device.wait(self.clock, "Stream.synchronize")


class Event:
    """Stands for a torch.cuda.Event."""

    def __init__(self, device: Device):
        self.clock: Clock = {}
        self._device = device

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._device.current_stream()
        stream.advance()
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self._device.query(self.clock)

    def synchronize(self) -> None:
        self._device.wait(self.clock, "Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (covers(self._device.seen, self.clock) and covers(self._device.seen, end.clock)):  # an error of CUDA's
            self._device.report(f"timed before it is over: an event; {place_of_caller()}")
        return 0.01 * (sum(end.clock.values()) - sum(self.clock.values()))  # ms, as if each operation took 10 us


class Device:
    """Stands for one CUDA device and the host's thread.

    Args:
        answers: how queries of events that the host has not seen yet are answered, one of ``ANSWERS``.

    Attributes:
        seen, waited: the host's clocks.
        findings: what was not ordered, one line each.
        waits: how often the host waited, by the place that made it.
    """

    def __init__(self, answers: str = "never", seed: int = 1):
        self.seen: Clock = {}
        self.waited: Clock = {}
        self.findings: dict[str, int] = {}
        self.waits: Counter[str] = Counter()
        self._answers = answers
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self._current = [self.new_stream("training")]

    def new_stream(self, name: str) -> Stream:
        """Makes a stream that findings call by this name."""
        self._streams.append(Stream(self, len(self._streams), name))
        return self._streams[-1]

    def stream_of(self, number: int) -> Stream:
        """Returns the stream of that number."""
        return self._streams[number]

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Stands for torch.cuda.current_stream."""
        return self._current[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for torch.cuda.stream."""
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def make_stream(self, device: torch.device | None = None, priority: int = 0) -> Stream:
        """Stands for the class torch.cuda.Stream."""
        return self.new_stream("rounds" if priority else "another")

    def make_event(self, enable_timing: bool = False) -> Event:
        """Stands for the class torch.cuda.Event."""
        return Event(self)

    def query(self, clock: Clock) -> bool:
        """Answers whether all of ``clock`` is over; never no after a yes."""
        is_over = covers(self.seen, clock)
        if not is_over and self._answers != "never":
            is_over = self._answers == "always" or self._random.random() < 0.5
        if is_over:
            join(self.seen, clock)
        return is_over

    def wait(self, clock: Clock, by: str) -> None:
        """Lets the host wait for all of ``clock``, and notes that it did."""
        self.waits[f"{place_of_caller(but='runtime/clock.py')}: {by}"] += 1
        join(self.seen, clock)
        join(self.waited, clock)

    def report(self, finding: str) -> None:
        """Notes something that was not ordered."""
        self.findings[finding] = self.findings.get(finding, 0) + 1


_places: dict[str, str] = {}


def place_of_file(path: str) -> str:
    """Returns the file as this package names it; empty for others."""
    if path not in _places:
        file = Path(path)
        _places[path] = str(file.relative_to(PACKAGE)) if file.is_relative_to(PACKAGE) else ""
    return _places[path]


def callers() -> Iterator[tuple[str, str]]:
    """Yields the file and the function of this package's callers, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        place = place_of_file(code.co_filename)
        if place and not code.co_name.startswith("<"):  # a comprehension belongs to its function
            yield place, code.co_name
        frame = frame.f_back


def place_of_caller(but: str = "") -> str:
    """Returns the innermost function of this package, not of the file ``but``, that led here; else says that it is
    none."""
    return next((f"{file} {function}" for file, function in callers() if file != but), "others' code")
