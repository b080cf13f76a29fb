# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the computation C and the network of a run in its timers; the plan predicts from them.

What a stage's timers hold (DeepSpeed, runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py): stages 0 and 1
communicate gradients in the last micro-batch only, so that the others are computation alone; the optimizer's all-gather
of stages 1 and 2 has a timer of its own; stage 2 reduces in every backward, and stage 3 gathers in forward and
backward, beside computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from ...algorithm.step_time import WARM_UP_STEPS
from ..plan import model as plan
from ..plan.command import UPDATE_S, Inputs
from ..plan.model import Cluster, Work
from ..words import counted
from .log import Log, Step
from .run_facts import Run

_OUTLIER = 2  # times the median: an evaluation's forwards count in the next step's first one
_LEAST_S = 5e-6  # half of a timer's last digit, for one that says 0.00 ms
_FORWARD_SHARE = 1 - Work(1.0, 1).backward_share
_ALL_GATHER, _UPDATE = "optimizer_allgather", ("optimizer_gradients", "optimizer_step")


@dataclass(frozen=True)
class Observed:
    """Holds what a step took.

    Attributes:
        steps: that count, without the first :data:`WARM_UP_STEPS`; or lines of throughput.
        step_s: seconds of a step, from its first forward to the end of its update.
        drift: by what part of it the two halves of the log differ.
        untimed_s: the part of ``step_s`` that is in no timer; 0 where throughput was not printed.
        inner, last, optimizer: seconds by timer, of a micro-batch that does not end a step, of one that does, and of
            the update; empty where there is none.
    """

    steps: int
    step_s: float
    drift: float
    untimed_s: float
    inner: dict[str, float]
    last: dict[str, float]
    optimizer: dict[str, float]

    @property
    def update_s(self) -> float | None:
        """Returns seconds of the update by the optimizer's timers; None without them."""
        known = [self.optimizer[name] for name in _UPDATE if name in self.optimizer]
        return sum(known) if known else None


@dataclass(frozen=True)
class Estimate:
    """Holds one way to read the run.

    Attributes:
        inputs: of a plan.
        compute_from, network_from: in words, where C and the network come from.
        is_inferred: whether no timer holds C alone.
    """

    inputs: Inputs
    compute_from: str
    network_from: str
    is_inferred: bool

    @property
    def round_s(self) -> float:
        """Returns R."""
        return plan.round_s(self.inputs.model, self.inputs.cluster, self.inputs.work)


def observe(log: Log, run: Run) -> Observed:
    """Returns what a step took.

    Raises:
        ValueError: too few steps.
    """
    whole = [step for step in log.steps if len(step.micro_batches) == run.n]
    if whole and len(whole) <= WARM_UP_STEPS:
        raise ValueError(
            f"LOG has {counted(len(whole), 'whole step')}, of which the first {WARM_UP_STEPS} load and build. Allowed: "
            f"{WARM_UP_STEPS + 1} and more, better 20"
        )
    wall = _wall(log, run)
    if not whole:
        if not wall:
            raise ValueError("LOG has no whole step. Allowed: 3 and more, better 20")
        step_s = fmean(wall) if len(wall) < 3 else _typical(wall)
        return Observed(len(wall), step_s, _drift(wall, _typical), 0.0, {}, {}, {})
    steps = whole[WARM_UP_STEPS:]
    timed_s = _step_s(steps)
    if not timed_s:
        raise ValueError("the steps of LOG take no time at all. Give the log of a training")
    step_s = max(timed_s, _typical(wall)) if wall else timed_s
    return Observed(
        steps=len(steps),
        step_s=step_s,
        drift=_drift(steps, _step_s),
        untimed_s=step_s - timed_s,
        inner=_typical_timers([one for step in steps for one in step.micro_batches[:-1]]),
        last=_typical_timers([step.micro_batches[-1] for step in steps]),
        optimizer=_typical_timers([step.optimizer for step in steps if step.optimizer]),
    )


def _wall(log: Log, run: Run) -> list[float]:
    """Returns seconds of the steps by the lines of throughput, the first left out where there are others."""
    if log.average_samples_per_s is None or run.micro_batch is None:
        return []
    samples = run.micro_batch * run.n * run.ranks
    if len(log.samples_per_s) <= WARM_UP_STEPS:
        return [samples / log.average_samples_per_s]
    return [samples / rate for rate in log.samples_per_s[WARM_UP_STEPS:]]


def _typical(values: Sequence[float]) -> float:
    """Returns the mean without outliers: lengths of sequences vary, so that a median may be off."""
    bound = _OUTLIER * median(values)
    return fmean(value for value in values if value <= bound)


def _typical_timers(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for timers in several for name in timers}
    return {name: _typical([timers[name] for timers in several if name in timers]) for name in names}


def _step_s(steps: Sequence[Step]) -> float:
    inner = _typical_timers([one for step in steps for one in step.micro_batches[:-1]])
    last = _typical_timers([step.micro_batches[-1] for step in steps])
    counts = ((len(steps[0].micro_batches) - 1, inner), (1, last))
    return sum(count * sum(timers.get(name, 0.0) for name in ("fwd", "bwd", "step")) for count, timers in counts)


def _drift(values: Sequence, seconds: Callable[[Sequence], float]) -> float:
    """Returns by what part the halves of the log differ; 0 where there is one value."""
    middle = len(values) // 2
    first, second = seconds(values[:middle] or values), seconds(values[middle:])
    return 2 * abs(first - second) / (first + second)


def estimates(run: Run, seen: Observed, network: Cluster | None) -> tuple[list[Estimate], list[str]]:
    """Returns the ways to read the run, the surest first, and in words what was tried in vain.

    Args:
        network: None: that of the log.

    Raises:
        ValueError: the log does not tell computation from communication, and no network was given.
    """
    return _Reader(run, seen).ways(network)


class _Reader:
    """Reads one run by its timers."""

    def __init__(self, run: Run, seen: Observed):
        self._run, self._seen = run, seen
        hides = run.overlaps and run.backend == "nccl"
        self._anywhere = Cluster(run.ranks, 1.0, 0.0, run.backend, run.hosts, overlaps_stock=hides)

    def ways(self, network: Cluster | None) -> tuple[list[Estimate], list[str]]:
        """Returns what :func:`estimates` does."""
        stage = self._run.stage_number
        if network is not None:
            network = replace(network, overlaps_stock=self._anywhere.overlaps_stock)
            return [self._of_quiet(network, _GIVEN) if self._is_quiet() else self._of_step(network, _GIVEN)], []
        if stage == 0 and self._is_quiet():
            return [self._of_quiet(self._by_reduction(), self._by("bwd_allreduce"))], []
        if _ALL_GATHER not in self._seen.optimizer:
            raise ValueError(self._why_not())
        gathered, by = self._by_all_gather(), self._by(_ALL_GATHER)
        if stage == 1:
            return self._with_rest(self._of_quiet(gathered, by))
        words = f"three times fwd, {_ms(self._forward_s())}: a backward is taken to be two forwards"
        by_forward = self._run.n * self._forward_s() / _FORWARD_SHARE + self._seen.untimed_s
        return [self._of_step(gathered, by), self._of(gathered, by_forward, words, by)], []

    def _with_rest(self, first: Estimate) -> tuple[list[Estimate], list[str]]:
        """Adds the way that takes all of a step beyond computation and update for communication."""
        compute_s, step_s = self._compute_s(), self._seen.step_s
        exposed = f"all of a step beyond C, {_ms(step_s - compute_s)}"
        network = plan.with_rate_of(self._anywhere, lambda at: self._stage_s(at, compute_s), step_s)
        if self._stage_s(plan.at_rate(network, plan.FASTEST), compute_s) >= step_s:
            return [first], [f"{exposed}, leaves nothing for communication"]
        return [first, self._of_quiet(network, exposed)], []

    def _is_quiet(self) -> bool:
        """Tells whether there are timers of micro-batches that do not communicate."""
        return self._run.stage_number < 2 and bool(self._seen.last)

    # ---- computation

    def _compute_s(self) -> float:
        """Returns C of a stage that communicates in the last micro-batch only."""
        if self._run.n > 1:
            return self._run.n * (self._seen.inner["fwd"] + self._seen.inner["bwd"]) + self._seen.untimed_s
        return self._seen.last["fwd"] + self._seen.last["bwd_inner"] + self._seen.untimed_s

    def _computing(self) -> str:
        if self._run.n > 1:
            each = self._seen.inner["fwd"] + self._seen.inner["bwd"]
            return f"{self._run.n} x {_ms(each)}, fwd and bwd of the micro-batches that do not end a step"
        return "fwd and bwd_inner; what reductions slow of the backward counts in it"

    def _forward_s(self) -> float:
        return (self._seen.inner or self._seen.last)["fwd"]

    def _update_s(self) -> float:
        """Returns seconds of the update per parameter that a rank updates."""
        numel = self._run.model.numel
        if self._run.stage_number == 0:
            return self._seen.last["step"] / numel if self._seen.last else UPDATE_S[self._run.backend]
        known = None if self._run.offloads else self._seen.update_s  # ACCO's is on the device
        return UPDATE_S[self._run.backend] if known is None else known / (numel / self._run.ranks)

    def _work(self, compute_s: float) -> Work:
        return Work(compute_s / self._run.n, self._run.n, self._update_s())

    def _stage_s(self, network: Cluster, compute_s: float) -> float:
        return plan.predict(self._run.stage, self._run.model, network, self._work(compute_s)).step_s

    # ---- network

    def _by(self, timer: str) -> str:
        timers = self._seen.last | self._seen.optimizer
        return f"the timer {timer}, {_ms(timers[timer])}, scaled by its bytes"

    def _by_all_gather(self) -> Cluster:
        weights = self._run.model.weight_bytes * self._run.model.numel
        took = max(self._seen.optimizer[_ALL_GATHER], _LEAST_S)
        return plan.with_rate_of(self._anywhere, lambda at: plan.all_gather(at, weights).seconds, took)

    def _by_reduction(self) -> Cluster:
        gradients = self._run.model.comm_bytes * self._run.model.numel
        took = max(self._seen.last["bwd_allreduce"], _LEAST_S)
        return plan.with_rate_of(self._anywhere, lambda at: plan.all_reduce(at, gradients).seconds, took)

    # ---- both

    def _of_quiet(self, network: Cluster, network_from: str) -> Estimate:
        return self._of(network, self._compute_s(), self._computing(), network_from)

    def _of(self, network: Cluster, compute_s: float, compute_from: str, network_from: str) -> Estimate:
        inputs = Inputs(self._run.model, network, self._work(compute_s))
        return Estimate(inputs, compute_from, network_from, not self._is_quiet())

    def _of_step(self, network: Cluster, network_from: str) -> Estimate:
        """Returns the estimate with that C with which the stage's step is predicted to take as long as it took.

        Raises:
            ValueError: communication and update alone are predicted to take longer.
        """
        step_s = self._seen.step_s
        low, high = math.log(step_s * 1e-6), math.log(step_s)
        if self._stage_s(network, math.exp(low)) >= step_s:
            alone = self._stage_s(network, math.exp(low))
            raise ValueError(
                f"a step of {self._run.stage} took {_ms(step_s)}, but communication and update alone are predicted to "
                f"take {_ms(alone)} with {network_from}. Give the true --bandwidth, --hosts and --params, and whether "
                "overlap_comm is on (--config)"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._stage_s(network, math.exp(middle)) < step_s else (low, middle)
        return self._of(network, math.exp(high), "what the step leaves beside the predicted rest", network_from)

    def _why_not(self) -> str:
        if not self._seen.last:
            return (
                "lines of throughput do not tell computation from communication. Give --bandwidth RATE of a host's "
                'link; or run 20 steps with "wall_clock_breakdown": true'
            )
        return (
            f"the timers of {self._run.stage} do not tell computation from communication: its gathers are in fwd and "
            "bwd. Give --bandwidth RATE of a host's link; or measure: `ds_acco plan --calibrate`"
            if self._run.stage_number == 3
            else f"the log has no timer {_ALL_GATHER}. Give --bandwidth RATE of a host's link"
        )


_GIVEN = "--bandwidth"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
