# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a round on a side stream (CUDA), on a worker thread (CPU), or at once. Streams and threads are here alone. At
most one round is in flight; the same round gives the same bits on every lane."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from . import devices
from .clock import LaneTimes

_LEAD_S = 2e-3  # what the host needs to enqueue the next micro-batch's beginning
_LOOK_S = 5e-5


class RoundFailed(RuntimeError):
    """Says that a round failed in the background; the cause is chained."""


class InlineLane:
    """Runs the round where it is started, for debugging and as the reference of the other lanes."""

    name = "inline"

    def __init__(self):
        self._times = LaneTimes()
        self._result = None
        self._name = ""
        self._failure: RoundFailed | None = None

    def start(self, round_: Callable[[], Any], name: str) -> None:
        """Starts ``round_``; its result is what :meth:`finish` returns. Nothing else may be in flight.

        Args:
            name: what profilers show: ``name`` around the round and ``wait name`` around the wait for it, both behind
                "ACCO ". ``torch.profiler`` sees the worker thread of :class:`ThreadLane` only where it profiles all
                threads.

        Raises:
            RoundFailed: as :meth:`finish`.
        """
        self.raise_failure()
        self._name = name
        try:
            self._start(functools.partial(self._run_in_range, round_, f"ACCO {name}"))
        except Exception as cause:
            raise self.fail(cause) from cause

    def finish(self) -> Any:
        """Waits for the started round and returns its result.

        Raises:
            RoundFailed: with the cause, when the round raised; again at every later call.
        """
        self.raise_failure()
        try:
            return self._finish()
        except Exception as cause:
            raise self.fail(cause) from cause

    def order(self) -> None:
        """Lets what the caller enqueues from now on come after the newest finished round, on whatever stream he is: a
        look may finish a round on one stream, and training go on on another. It has no effect where the host waits."""

    def is_finished(self) -> bool:
        """Tells whether :meth:`finish` would return, or raise, without waiting; never waits itself."""
        return True

    def pace(self, decides: bool) -> None:
        """Keeps the host at most one micro-batch ahead of the device; called once per micro-batch, before
        :meth:`is_finished`. It has no effect where the host computes.

        Args:
            decides: the answer says whether a phase ends with this micro-batch. Then the host comes back when the round
                is finished or the device all but through with the micro-batch, so that a phase is as long as on a CPU.
        """

    def fail(self, cause: Exception) -> RoundFailed:
        """Makes ``cause`` what every later call raises, and returns it: the buffers hold nobody knows what."""
        self._failure = RoundFailed(f"ACCO: a communication round failed in the background: {cause}")
        self._failure.__cause__ = cause
        return self._failure

    @property
    def has_failed(self) -> bool:
        """Tells whether a round has failed, so that :meth:`raise_failure` raises."""
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raises RoundFailed where a round has failed, again at every call."""
        if self._failure is not None:
            raise self._failure

    def _run_in_range(self, run, name):
        with torch.profiler.record_function(name):
            return run()

    def _start(self, round_):
        begin = time.perf_counter()
        self._result = round_()
        spent = time.perf_counter() - begin
        self._times.add(self._name, spent, spent)

    def _finish(self):
        result, self._result = self._result, None
        return result

    def times(self) -> LaneTimes:
        """Returns a copy of the sums so far, without waiting."""
        return self._times.copy()

    @property
    def is_own_thread(self) -> bool:
        """Tells whether the caller runs inside a round: there nothing may wait for it."""
        return False

    def close(self) -> None:
        """Ends the lane after the round in flight, without raising."""


class ThreadLane(InlineLane):
    """Runs rounds on one worker thread in first-in-first-out order. It is an executor's and no daemon: the interpreter
    joins it at exit, where a daemon thread that is killed inside a collective aborts the process."""

    name = "thread"

    def __init__(self):
        super().__init__()
        threads = max(1, torch.get_num_threads() // 4)  # the cores belong to the model
        # A new thread starts with OpenMP's own default, which takes every core, whatever the main thread was given.
        self._executor = ThreadPoolExecutor(1, "acco-round", initializer=torch.set_num_threads, initargs=(threads,))
        self._future: Future | None = None
        self._worker: threading.Thread | None = None

    def _start(self, round_):
        assert self._future is None, "the previous round was not finished"

        def timed():
            self._worker = threading.current_thread()
            begin = time.perf_counter()
            result = round_()
            return result, time.perf_counter() - begin

        self._future = self._executor.submit(timed)

    def _finish(self):
        assert self._future is not None, "no round was started"
        begin = time.perf_counter()
        result, spent = self._run_in_range(self._future.result, f"ACCO wait {self._name}")
        self._future = None  # only now: an interrupted wait can be repeated
        self._times.add(self._name, spent, time.perf_counter() - begin)
        return result

    def is_finished(self) -> bool:
        return self._future is None or self._future.done()

    @property
    def is_own_thread(self) -> bool:
        # The garbage collector may run anywhere, so that an engine may be destroyed inside its own round.
        return threading.current_thread() is self._worker

    def close(self) -> None:
        self._executor.shutdown(wait=not self.is_own_thread)
        self._future = None


class StreamLane(InlineLane):
    """Runs rounds on a high-priority CUDA side stream. The main thread enqueues everything and never waits for the
    device: events order the two streams, and the round's result stays on the device."""

    name = "stream"

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._comm_stream = torch.cuda.Stream(device, priority=-1)
        self._weights_ready: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._is_enqueued = True  # all of the newest round
        self._newest_end: torch.cuda.Event | None = None  # of the newest finished round
        # The last two micro-batches' ends.
        self._micro_batches: tuple[torch.cuda.Event | None, torch.cuda.Event | None] = (None, None)
        self._timed: list = []  # (name, round start and end, wait start and end), until the device has passed them

    def _run_in_range(self, run, name):
        # Profilers put what the device does under the range that it was enqueued in.
        with torch.cuda.nvtx.range(name):
            return super()._run_in_range(run, name)

    def _start(self, round_):
        self._is_enqueued = False
        # Producer -> consumer: the training stream has packed the gradients before the round reads them.
        grads_ready = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._comm_stream):
            self._comm_stream.wait_event(grads_ready)
            begin = self._comm_stream.record_event(torch.cuda.Event(enable_timing=True))
            self._result = round_()
            end = self._comm_stream.record_event(torch.cuda.Event(enable_timing=True))
        self._weights_ready, self._is_enqueued = (begin, end), True

    def _finish(self):
        assert self._weights_ready is not None, "no round was started"
        begin, end = self._weights_ready
        self._weights_ready, self._newest_end = None, end
        stream = torch.cuda.current_stream(self._device)
        wait_begin = stream.record_event(torch.cuda.Event(enable_timing=True))
        # Producer -> consumer: the gathered weights and the shard's state are complete before training touches them.
        self._run_in_range(functools.partial(stream.wait_event, end), f"ACCO wait {self._name}")
        wait_end = stream.record_event(torch.cuda.Event(enable_timing=True))
        self._timed.append((self._name, begin, end, wait_begin, wait_end))
        self.times()  # lets the events go that the device has passed
        return super()._finish()

    def order(self) -> None:
        if self._newest_end is not None:
            torch.cuda.current_stream(self._device).wait_event(self._newest_end)

    def is_finished(self) -> bool:
        ready = self._weights_ready  # also asked from another thread
        return self._is_enqueued and (ready is None or ready[1].query())

    def pace(self, decides: bool) -> None:
        before, passed = self._micro_batches
        stream = torch.cuda.current_stream(self._device)
        newest = stream.record_event(torch.cuda.Event(enable_timing=True))
        self._micro_batches = passed, newest
        if passed is None:
            return
        passed.synchronize()
        if not decides or before is None:
            return
        until = time.perf_counter() + before.elapsed_time(passed) / 1e3 - _LEAD_S
        while not (self.is_finished() or newest.query()) and time.perf_counter() < until:
            time.sleep(_LOOK_S)

    def times(self) -> LaneTimes:
        while self._timed and self._timed[0][4].query():
            name, begin, end, wait_begin, wait_end = self._timed.pop(0)
            self._times.add(name, begin.elapsed_time(end) / 1e3, wait_begin.elapsed_time(wait_end) / 1e3)
        return super().times()

    def close(self) -> None:
        self._weights_ready = None
        # The group is destroyed next, and buffers are freed to the stream that they came from; a last look may have
        # exchanged them on another one.
        self._comm_stream.synchronize()
        torch.cuda.current_stream(self._device).synchronize()


def make_lane(name: str, device: torch.device) -> InlineLane:
    """Makes the lane for ``optimizer.params.lane`` (``auto`` or ``inline``) on that device.

    Raises:
        ValueError: for devices other than CPU and CUDA.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"ACCO: parameters on device {str(device)!r} are not supported; allowed: cpu, cuda. Train on one of these "
            'or change optimizer.type to "AdamW"'
        )
    if name == "inline":
        return InlineLane()
    return StreamLane(device) if devices.has_streams(device) else ThreadLane()
