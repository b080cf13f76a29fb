# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Puts mistakes into the code that orders streams, one at a time: each must be reported in the scenario named here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch

from deepspeed_acco.runtime.buffers import FlatBuffers
from deepspeed_acco.runtime.clock import HostValue
from deepspeed_acco.runtime.collectives import Collectives
from deepspeed_acco.runtime.driver import RoundDriver
from deepspeed_acco.runtime.lanes import StreamLane
from deepspeed_acco.runtime.round import RoundWork
from tests.streams.clocks import Event, Stream, callers


@dataclass(frozen=True)
class Fault:
    """Holds a mistake.

    Attributes:
        seed: puts it into the code for the time of a ``with`` block.
        scenario, answers: where it must be found.
        first, second: the two operations of which a finding must tell.
        kind: what a finding must say of them; or that the host waits, at ``second``.
    """

    seed: Callable[[], AbstractContextManager]
    scenario: str
    kind: str
    first: str
    second: str
    answers: str = "never"

    def is_found_in(self, seen) -> bool:
        """Tells whether it was reported in what was seen of its scenario."""
        waits = (f"the host waits; {place}" for place in seen.waits)
        told = [told.split(";") for told in (*seen.findings, *waits) if told.startswith(self.kind)]
        return any(self.first in first and self.second in second for first, second in told)


def is_inside(*functions: str) -> bool:
    """Tells whether one of these functions of the package led here."""
    return any(function in functions for _, function in callers())


def without_waiting_in(function: str) -> AbstractContextManager:
    """Drops the stream's waits for events in this function of the lane."""
    wait_event = Stream.wait_event

    def wait(self, event):
        if not is_inside(function):
            wait_event(self, event)

    return mock.patch.object(Stream, "wait_event", wait)


def without_finishing_in(function: str) -> AbstractContextManager:
    """Drops the driver's waits for the running round in this function."""
    finish = RoundDriver.finish

    def finish_elsewhere(self):
        if not is_inside(function):
            finish(self)

    return mock.patch.object(RoundDriver, "finish", finish_elsewhere)


def changed(owner: type, name: str, change: Callable) -> AbstractContextManager:
    """Replaces a method by ``change(method, self, *args, **kwargs)``."""
    method = getattr(owner, name)

    def call(self, *args, **kwargs):
        return change(method, self, *args, **kwargs)

    return mock.patch.object(owner, name, call)


def on_a_stream_of_its_own(method, *args, **kwargs):
    """Calls a method behind what the current stream has, on a stream for which nobody waits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        return method(*args, **kwargs)


def on_a_stream_without_order(method, *args, **kwargs):
    with torch.cuda.stream(torch.cuda.Stream()):
        return method(*args, **kwargs)


def without_waiting_if_finished(method, self):
    with without_waiting_in("_finish") if self.is_finished() else nullcontext():
        return method(self)


def packed_before_finished(method, self, following, inputs, **how):
    self._work.pack(following, inputs.pre_scale, clears=False)
    return method(self, following, inputs, **how)


def taken_for_over(method, self):
    return is_inside("times") or method(self)


def waited_for(method, self):
    self.wait()
    return method(self)


def run_and_install(method, self, *args):
    outcome = method(self, *args)
    self._buffers.install()
    return outcome


def run_and_clear(method, self, *args):
    outcome = method(self, *args)
    self._buffers.clear_gradients()
    return outcome


@contextmanager
def a_temporary_of_training() -> Iterator[None]:
    """Lets training make a tensor for each round, and drop it once the host has enqueued the round."""
    made = []

    def pack(method, self, *args, **kwargs):
        made.append(torch.ones(8))
        return method(self, *args, **kwargs)

    def run(method, self, *args):
        made.pop().sum()
        return method(self, *args)

    with changed(RoundWork, "pack", pack), changed(RoundWork, "run", run):
        yield


FAULTS = {
    "a round does not wait for the gradients": Fault(
        lambda: without_waiting_in("_start"), "acco", "read before it is written", "pack on training", "on rounds"
    ),
    "training does not wait for a round": Fault(
        lambda: without_waiting_in("_finish"),
        "acco",
        "read before it is written",
        "on rounds",
        "copy_shards on training",
    ),
    "a finished round is taken for one that is ordered": Fault(
        lambda: changed(StreamLane, "_finish", without_waiting_if_finished),
        *("acco", "read before it is written", "on rounds", "copy_shards on training", "always"),
    ),
    "what finished on one stream is not ordered on another": Fault(
        lambda: mock.patch.object(StreamLane, "order", lambda self: None),
        *("acco, finished on another stream", "read before it is written", "on rounds", "copy_shards on training"),
    ),
    "a value for the host is copied on another stream": Fault(
        lambda: changed(HostValue, "__init__", on_a_stream_without_order),
        *("acco", "read before it is written", "_run on rounds", "__init__ on another"),
    ),
    "the host reads a value that it does not know": Fault(
        lambda: mock.patch.object(HostValue, "is_known", lambda self: True),
        *("acco", "read by the host before it is written", "__init__ on rounds", "value"),
    ),
    "gradients are packed over those that travel": Fault(
        lambda: changed(RoundDriver, "advance", packed_before_finished),
        *("acco", "written twice in any order", "on rounds", "pack on training"),
    ),
    "a round installs its weights itself": Fault(
        lambda: changed(RoundWork, "run", run_and_install),
        *("acco", "read before it is written", "copy_shards on rounds", "others' code on training"),
    ),
    "a round zeroes the gradients itself": Fault(
        lambda: changed(RoundWork, "run", run_and_clear),
        *("acco", "written twice in any order", "on rounds", "others' code on training"),
    ),
    "nobody waits for a collective": Fault(
        lambda: changed(Collectives, "all_gather", on_a_stream_of_its_own),
        *("acco", "read before it is written", "_gather_in_place on another", "copy_shards on training"),
    ),
    "a tensor is freed while a round reads it": Fault(
        a_temporary_of_training, "acco", "freed and reused", "on rounds", "on training"
    ),
    "a lane ends without its round": Fault(
        lambda: mock.patch.object(StreamLane, "close", lambda self: None),
        *("acco, left in a round", "freed and reused", "on rounds", "on training"),
    ),
    "a look does not wait for the round": Fault(
        lambda: without_finishing_in("show_true"),
        *("acco, looks", "written twice in any order", "on rounds", "swap_shards on training"),
    ),
    "reading the optimizer's state does not wait": Fault(
        lambda: without_finishing_in("call"),
        *("acco, looks at the state", "read before it is written", "on rounds", "call on training"),
    ),
    "a local prediction does not wait": Fault(
        lambda: without_finishing_in("advance"),
        *("local", "read before it is written", "_gather_in_place on rounds", "predict_locally on training"),
    ),
    "a round's times are read before it is over": Fault(
        lambda: changed(Event, "query", taken_for_over),
        *("acco", "timed before it is over", "an event", "runtime/lanes.py times"),
    ),
    "the host waits for a value that it could read later": Fault(
        lambda: changed(HostValue, "is_known", waited_for),
        *("acco", "the host waits", "", "runtime/outcomes.py take: Event.synchronize"),
    ),
    "installing is left to another stream": Fault(
        lambda: changed(FlatBuffers, "install", on_a_stream_of_its_own),
        *("acco", "read before it is written", "copy_shards on another", "others' code on training"),
    ),
}
