# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Shows the rounds in DeepSpeed's monitor (TensorBoard, CSV, W&B, Comet) and its ``wall_clock_breakdown``.

Nothing here waits: on CUDA a value that the device has not passed yet is shown one or more windows later.
"""

from __future__ import annotations

import math

from ..runtime.lanes import InlineLane
from ..runtime.outcomes import OutcomeLog

EXPOSED_WAIT_TIMER = "acco_exposed_wait"
ROUND_TIMER = "acco_round"
LANE_TIMERS = [EXPOSED_WAIT_TIMER, ROUND_TIMER]
PREFIX = "Train/ACCO/"


def _chart(*tags: str) -> list:
    return ["Multiline", [f"{tag}$" for tag in tags]]  # regular expressions, matched from a tag's beginning


# What TensorBoard shows as CUSTOM SCALARS. The loss is the script's, the trainer's or, in some versions, DeepSpeed's.
TENSORBOARD_LAYOUT = {
    "ACCO": {
        "loss": _chart(".*loss"),
        "learning rate": _chart("Train/Samples/lr"),
        "gradient norm": _chart(PREFIX + "grad_norm"),
        "part of the rounds that is hidden": _chart(PREFIX + "hidden_share"),
        "ms of a step: the rounds, and waiting for them": _chart(PREFIX + "round_ms", PREFIX + "exposed_wait_ms"),
        "error of the estimate": _chart(PREFIX + "estimate_error"),
        "micro-batches of a step": _chart(PREFIX + "micro_batches"),
        "steps skipped so far": _chart(PREFIX + "skipped_commits"),
    }
}


class Monitor:
    """Writes once per window the events of what is newly known; docs/how-to/monitor.md says what each means.

    Args:
        deepspeed_monitor: the engine's ``MonitorMaster``. It is enabled by the JSON, so on all ranks or on none, and
            writes on global rank 0 alone.
    """

    def __init__(self, deepspeed_monitor, outcomes: OutcomeLog, lane: InlineLane):
        self._sink = deepspeed_monitor
        self._outcomes = outcomes
        tensorboard = deepspeed_monitor.tb_monitor  # on rank 0, if the JSON has it
        if tensorboard is not None:
            tensorboard.summary_writer.add_custom_scalars(TENSORBOARD_LAYOUT)
        if deepspeed_monitor.enabled:  # else the log would keep what nobody reads
            self._errors, self._commits = outcomes.reader(), outcomes.reader()
        self._lane = lane
        self._seen = lane.times()
        self._seen_bytes = 0
        self._ends: dict[int, int] = {}
        self._has_no_commit = False

    def note_no_commit(self) -> None:
        """Notes that the running window, as fp16 does with an overflow, ends without a COMMIT."""
        self._has_no_commit = True

    def write(self, engine, ends: dict[int, int], micro_batches: int | None) -> None:
        """Writes the events of the window that ended.

        Args:
            engine: gives the place on the axis, the samples so far, and the count of skipped steps.
            ends: of windows newly counted, the samples at their ends: the places of their norms.
            micro_batches: how many this rank computed in that window; with adaptive windows all ranks in the newest
                window that they told of, None before the first.
        """
        if not self._sink.enabled:
            return
        values = {"skipped_commits": engine.skipped_steps, **self._newly_known()}
        if micro_batches is not None:
            values["micro_batches"] = micro_batches
        norms = self._norms_known(ends)
        if self._has_no_commit:
            self._has_no_commit = False
            norms.append((math.inf, engine.global_samples))
        events = [(name, value, engine.global_samples) for name, value in values.items()]
        self._write(engine, norms, events)

    def finish(self, engine, ends: dict[int, int]) -> None:
        """Writes the norms of all finished COMMITs, waiting for the device."""
        if self._sink.enabled:
            self._commits.wait()
            self._write(engine, self._norms_known(ends), [])

    def _norms_known(self, ends: dict[int, int]) -> list[tuple[float, int]]:
        self._ends |= ends
        return [(norm, self._ends.pop(window)) for window, norm in self._commits.take_grad_norms()]

    def _write(self, engine, norms: list[tuple[float, int]], events: list[tuple[str, float, int]]):
        # Norms lie farther back on the axis, and W&B takes nothing for what it has passed.
        told = [*(("grad_norm", norm, samples) for norm, samples in norms), *events]
        if engine.global_rank == 0 and told:
            self._sink.write_events([(PREFIX + name, value, samples) for name, value, samples in told])

    def _newly_known(self) -> dict[str, float]:
        values = {}
        times = self._lane.times()
        spent, self._seen = times.since(self._seen), times
        if spent.rounds:
            values["exposed_wait_ms"] = spent.exposed_s * 1e3
            values["round_ms"] = spent.round_s * 1e3
            values["hidden_share"] = spent.hidden_share
            moved, self._seen_bytes = self._outcomes.wire_bytes - self._seen_bytes, self._outcomes.wire_bytes
            values["sent_bytes"] = values["received_bytes"] = moved
        errors = self._errors.take_estimate_errors()
        if errors:
            values["estimate_error"] = errors[-1]
        return values


class LaneTimer:
    """Reads what the lane measures anyway by the methods of DeepSpeed's timer (deepspeed/utils/timer.py): a real one
    would be started in one thread and read in another, and on CUDA its reading waits for the device.

    Args:
        field: which sum of :class:`~deepspeed_acco.runtime.lanes.LaneTimes` it shows.
    """

    def __init__(self, lane: InlineLane, field: str):
        self._lane = lane
        self._field = field
        self.reset()

    def start(self) -> None:
        """Does nothing: the lane starts and stops."""

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Does nothing: the lane starts and stops."""

    def reset(self) -> None:
        """Counts from now on."""
        self._seen = self._lane.times()

    def elapsed(self, reset: bool = True) -> float:
        """Returns the milliseconds of the rounds that finished since the last reset."""
        times = self._lane.times()
        spent = times.since(self._seen)
        if reset:
            self._seen = times
        return getattr(spent, self._field) * 1e3

    def mean(self) -> float:
        """Returns the milliseconds per round since the last reset; 0 without one."""
        spent = self._lane.times().since(self._seen)
        return getattr(spent, self._field) * 1e3 / spent.rounds if spent.rounds else 0.0


def lane_timers(lane: InlineLane) -> dict[str, LaneTimer]:
    """Makes the timers of a lane, by the names that ``wall_clock_breakdown`` prints."""
    return {EXPOSED_WAIT_TIMER: LaneTimer(lane, "exposed_s"), ROUND_TIMER: LaneTimer(lane, "round_s")}
