# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says whether ACCO pays for a run that was read from its log: yes, no, or too close to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...algorithm.schedules import DEFAULT, DEFAULT_OF_ONE
from ..plan import model as plan
from ..plan.advice import WORTH_IT, advise
from ..plan.command import Inputs
from .estimate import Estimate, Observed
from .run_facts import Run

# By how much steps were off that were predicted from ZeRO runs (docs/how-to/is-it-for-me.md); on CPUs rounds take cores
# from the computation beside them.
_ERROR, _ERROR_QUANTIZED, _ERROR_ON_CPU, _ERROR_INFERRED = 0.1, 0.15, 0.2, 0.3
YES, NO, TOO_CLOSE = "yes", "no", "too close to call"


@dataclass(frozen=True)
class Verdict:
    """Says whether ACCO pays.

    Attributes:
        word: one of the module's three.
        mode: of ACCO, the one that the plan advises, or what ``"auto"`` takes.
        estimate_fraction: to set with it, if any.
        step_s: predicted, by the surest way.
        low_s, high_s: the shortest and the longest that the ways and their errors leave possible.
        other: the fastest of DeepSpeed's other stages whose model states fit, predicted; None where none fits.
    """

    word: str
    mode: str
    estimate_fraction: float | None
    step_s: float
    low_s: float
    high_s: float
    other: plan.Prediction | None


def decide(run: Run, seen: Observed, ways: Sequence[Estimate]) -> Verdict:
    """Says whether ACCO is at least 2 % faster than the run was, and than DeepSpeed's other stages.

    Every way counts, longer and shorter by the error that was seen of such predictions and by what the log's halves
    differ; but no step is shorter than a C that was measured. The other stages are predicted with the same
    errors, so that these cancel.
    """
    first = ways[0].inputs
    advice = advise(first.model, first.cluster, first.work)
    mode = (DEFAULT if run.n > 1 else DEFAULT_OF_ONE).name
    fraction = None
    if advice.name in plan.modes():
        mode, fraction = advice.name or mode, advice.estimate_fraction
    steps = [_step_s(mode, way.inputs, fraction) for way in ways]
    error = _error(mode, run, ways[0]) + seen.drift
    bounds = [_bounds(step, way, error) for step, way in zip(steps, ways)]
    low, high = min(least for least, _ in bounds), max(most for _, most in bounds)
    other = _best_other(run, first)
    does_not_fit = plan.memory_bytes(mode, first.model, run.ranks) > first.cluster.memory_bytes
    other_would_do = other is not None and other.step_s < min(seen.step_s, WORTH_IT * steps[0])
    if does_not_fit or seen.step_s < WORTH_IT * low or (other_would_do and not ways[0].is_inferred):
        word = NO
    else:
        word = YES if seen.step_s >= WORTH_IT * high and not other_would_do else TOO_CLOSE
    return Verdict(word, mode, fraction, steps[0], low, high, other)


def _error(mode: str, run: Run, way: Estimate) -> float:
    if way.is_inferred:
        return _ERROR_INFERRED
    if run.backend == "gloo":
        return _ERROR_ON_CPU
    return _ERROR_QUANTIZED if plan.modes()[mode].is_quantized else _ERROR


def _bounds(step_s: float, way: Estimate, error: float) -> tuple[float, float]:
    low = step_s * max(0.0, 1 - error)
    return low if way.is_inferred else max(low, way.inputs.work.compute_s), step_s * (1 + error)


def _best_other(run: Run, inputs: Inputs) -> plan.Prediction | None:
    names = [name for name in plan.STAGES if name != run.stage]
    stages = [plan.predict(name, inputs.model, inputs.cluster, inputs.work) for name in names]
    fitting = [stage for stage in stages if stage.memory_bytes <= inputs.cluster.memory_bytes]
    return min(fitting, key=lambda stage: stage.step_s, default=None)


def _step_s(mode: str, inputs: Inputs, fraction: float | None) -> float:
    work = replace(inputs.work, estimate_fraction=fraction)
    return plan.predict(mode, inputs.model, inputs.cluster, work).step_s
