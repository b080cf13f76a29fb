# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Gives the advice of ``ds_acco plan``: whether ACCO pays, with what settings, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...algorithm.schedules import AUTO, DEFAULT, DEFAULT_OF_ONE, SCHEDULES
from ...algorithm.step_time import Figures, best_split
from .model import (
    COARSEST_COMMIT,
    COARSEST_ESTIMATE,
    STAGES,
    Cluster,
    Mode,
    Model,
    Prediction,
    Work,
    figures_of,
    fraction_of,
    memory_bytes,
    modes,
    predict,
    round_s,
)

WORTH_IT = 1.02  # a smaller speed-up is called none
_LOCAL_SGD_FROM = 10  # R/C from which on whoever communicates in every step mostly waits
_MOST_CUTS = 1000  # into more parts no micro-batch is cut: a split is then exact to 0.1 %
# The default schedule with the fewest bits of an ESTIMATE, and of both rounds.
COARSEST = Mode(DEFAULT, COARSEST_ESTIMATE)
COARSEST_OF_BOTH = replace(COARSEST, commit_comm=COARSEST_COMMIT)


def delayed_modes() -> list[Mode]:
    """Returns the schedules that cost quality, the one to try first in front: they overlap and have one phase, so that
    gradients are taken at old weights or predicted ones."""
    return [Mode(schedule) for schedule in SCHEDULES.values() if schedule.overlaps and not schedule.has_two_phases]


def best_stage(model: Model, cluster: Cluster, work: Work) -> Prediction | None:
    """Returns the fastest of DeepSpeed's stages whose model states fit; None where none does."""
    stages = [predict(name, model, cluster, work) for name in STAGES]
    fitting = [stage for stage in stages if stage.memory_bytes <= cluster.memory_bytes]
    return min(fitting, key=lambda stage: stage.step_s, default=None)


def best_window(
    model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1, name: str = DEFAULT.name
) -> Work | None:
    """Returns the work with n and ``estimate_fraction`` chosen for ``name`` at the same batch: the smallest n within
    0.1 % of the fastest. Micro-batches may be cut, never merged, as merged ones need more memory. Computation is taken
    to stay as long.

    Args:
        micro_batch_size: samples of a micro-batch; 1: it cannot be cut.
        name: of a mode with two phases.

    Returns:
        None where n = 1 and the micro-batch cannot be cut.
    """
    mode = modes()[name]
    cuts = [cut for cut in range(1, min(micro_batch_size, _MOST_CUTS) + 1) if micro_batch_size % cut == 0]
    windows = [
        _with_best_split(mode, model, cluster, replace(work, n=cut * work.n, micro_batch_s=work.micro_batch_s / cut))
        for cut in cuts
        if mode.has_room(cut * work.n)
    ]
    steps = [predict(name, model, cluster, window).step_s for window in windows]
    return next((window for window, step in zip(windows, steps) if step <= 1.001 * min(steps)), None)


def _with_best_split(mode: Mode, model: Model, cluster: Cluster, work: Work) -> Work:
    a = best_split(mode.schedule, work.n, figures_of(mode.name, model, cluster, work))
    return replace(work, estimate_fraction=fraction_of(a, work.n))


def stops_paying(
    model: Model, cluster: Cluster, work: Work, against: Iterable[str] = STAGES, name: str = DEFAULT.name
) -> float | None:
    """Returns the R/C from which on ``name`` is not faster than the fastest of ``against``, as the computation varies.

    Returns:
        None where it is nowhere faster between R/C = 0.01 and 100, infinity where it still is at 100.
    """
    against = tuple(against)
    commit = round_s(model, cluster, work)

    def is_faster(ratio: float) -> bool:
        this = replace(work, micro_batch_s=commit / ratio / work.n)
        steps = [predict(other, model, cluster, this).step_s for other in against]
        return predict(name, model, cluster, this).step_s < min(steps) * (1 - 1e-9)

    if commit == 0:
        return None
    ratios = [10 ** (point / 100) for point in range(-200, 201)]
    faster = [ratio for ratio in ratios if is_faster(ratio)]
    if not faster:
        return None
    if faster[-1] == ratios[-1]:
        return math.inf
    low, high = faster[-1], ratios[ratios.index(faster[-1]) + 1]
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return high


@dataclass(frozen=True)
class Advice:
    """Says what to use.

    Attributes:
        name: of a stage or a mode; None where no model states fit.
        n: what to set with ACCO; with a stage as it is.
        estimate_fraction: what to set with a mode of two phases, else None.
        baseline: the fastest of DeepSpeed's stages that fits, or None.
        speedup: how many times faster than the baseline; None without one.
        sentences: why.
    """

    name: str | None
    n: int
    estimate_fraction: float | None
    baseline: str | None
    speedup: float | None
    sentences: tuple[str, ...]


def seconds(value: float) -> str:
    """Returns a time in words, with three digits: ``2.12 s``, ``650 ms``, ``12 us``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def advise(model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1) -> Advice:
    """Says whether ACCO pays here, with what settings, and why. The default schedule is taken before a faster one that
    costs quality. A quantized ESTIMATE, and a quantized COMMIT beside it, must be 2 % faster than what has one less;
    anything must be at least 2 % faster than the best stage. Splits are chosen, whatever ``work.estimate_fraction``
    says."""
    baseline = best_stage(model, cluster, work)
    commit, compute = round_s(model, cluster, work), work.compute_s
    said = [
        f"R = {seconds(commit)} (reduce-scatter, sharded update, all-gather), C = {seconds(compute)} "
        f"({work.n} x {seconds(work.micro_batch_s)}): R/C = {commit / compute:.3g}."
    ]

    if baseline is None:  # nor does ACCO: ZeRO-3 has the smallest model states of all
        said.append("The model states of no stage fit in a rank's memory: use more ranks, or offload.")
        return Advice(None, work.n, None, None, None, tuple(said))

    def use_stage() -> Advice:
        return Advice(baseline.name, work.n, None, baseline.name, 1.0, tuple(said))

    def use_acco(mode: Prediction, n: int, estimate_fraction: float | None) -> Advice:
        speedup = baseline.step_s / mode.step_s
        return Advice(mode.name, n, estimate_fraction, baseline.name, speedup, tuple(said))

    window = best_window(model, cluster, work, micro_batch_size)
    default = predict(DEFAULT.name, model, cluster, window) if window else None
    one_round = [predict(mode.name, model, cluster, work) for mode in delayed_modes()]
    delayed = next((one for one in one_round if one.memory_bytes <= cluster.memory_bytes), one_round[-1])
    if cluster.ranks == 1:
        said.append("One rank communicates nothing: there is nothing to hide.")
        return use_stage()
    if delayed.memory_bytes > cluster.memory_bytes:
        need = f"{delayed.memory_bytes / 2**30:.1f} GiB of {cluster.memory_bytes / 2**30:.1f}"
        smaller_window = best_window(model, cluster, work, micro_batch_size, COARSEST_OF_BOTH.name)
        smaller = predict(COARSEST_OF_BOTH.name, model, cluster, smaller_window) if smaller_window else None
        if smaller_window and smaller and _is_better(smaller, baseline, cluster):
            said.append(
                f"ACCO's model states do not fit, {need}, but those of {smaller.name} do: its rounds need a smaller "
                f"buffer. {_ROUNDED}"
            )
            said.append(_memory_cost(smaller, model, cluster.ranks))
            return use_acco(smaller, smaller_window.n, smaller_window.estimate_fraction)
        said.append(f"ACCO's model states do not fit: {need}; {baseline.name} is the fastest stage that does.")
        return use_stage()
    if baseline.step_s < WORTH_IT * compute:
        said.append(
            f"Nothing to win: communication and update make a step of {baseline.name} only "
            f"{100 * (baseline.step_s / compute - 1):.2g} % longer than its computation."
        )
        return use_stage()
    if commit > _LOCAL_SGD_FROM * compute:
        said.append(_LOCAL_SGD)
    if window is None or default is None:
        said.append(
            f'n = 1 has no second phase for {DEFAULT.name}, so "{AUTO}" takes {DEFAULT_OF_ONE.name}; or set '
            "gradient_accumulation_steps = 2 and halve the micro-batch."
        )
    else:
        chosen = default
        said.append(_regime(default, delayed, baseline, commit, compute, window.n))
        if default.step_s > 1.01 * compute:
            said.append(_larger_batch(commit, window))
            for mode in (COARSEST, COARSEST_OF_BOTH):
                quantized = best_window(model, cluster, work, micro_batch_size, mode.name)
                assert quantized is not None, "it has as many phases as the default"
                coarser = predict(mode.name, model, cluster, quantized)
                if chosen.step_s >= WORTH_IT * coarser.step_s:
                    rounds = figures_of(mode.name, model, cluster, quantized)
                    said.append(_quantized(mode, chosen, coarser, quantized, rounds))
                    window, chosen = quantized, coarser
                elif mode == COARSEST and commit > compute / 2:
                    said.append(_not_quantized(cluster))
        anywhere = replace(window, estimate_fraction=None)  # at each R/C one that suits it
        crossing = stops_paying(model, cluster, anywhere, (baseline.name,), chosen.name)
        said.append(_crossing(crossing, baseline.name, chosen.name))
        if baseline.step_s >= WORTH_IT * chosen.step_s:
            alike = [replace(mode, commit_comm=modes()[chosen.name].commit_comm) for mode in delayed_modes()]
            faster_s = predict(alike[0].name, model, cluster, work).step_s
            if chosen.step_s >= WORTH_IT * faster_s:
                said.append(
                    f"{_names(alike)} would be {chosen.step_s / faster_s:.2f}x as fast as {chosen.name}, at a price: "
                    f"{_QUALITY}"
                )
            said.append(_memory_cost(chosen, model, cluster.ranks))
            return use_acco(chosen, window.n, window.estimate_fraction)
    coarser = predict(replace(modes()[delayed.name], commit_comm=COARSEST_COMMIT).name, model, cluster, work)
    if _is_better(coarser, delayed, cluster):
        delayed = coarser
    if baseline.step_s >= WORTH_IT * delayed.step_s:
        said.append(f"What is faster than {baseline.name} here is {delayed.name}, at a price: {_QUALITY}")
        said += [_ROUNDED] if delayed is coarser else []
        said.append(_memory_cost(delayed, model, cluster.ranks))
        return use_acco(delayed, work.n, None)
    said.append(f"No schedule is 2 % faster than {baseline.name}.")
    return use_stage()


def _is_better(one: Prediction, than: Prediction, cluster: Cluster) -> bool:
    return one.memory_bytes <= cluster.memory_bytes and than.step_s >= WORTH_IT * one.step_s


def _names(several: list[Mode]) -> str:
    names = [mode.name for mode in several]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_LOCAL_SGD = (
    f"R/C is above {_LOCAL_SGD_FROM}: here methods win that send far less, the local-SGD family (Streaming DiLoCo, "
    "DiLoCoX, SparseLoCo, DeMo); they are other algorithms, and their state is not sharded."
)
_QUALITY = (
    "gradients are taken at weights one step old, or predicted ones, and the final loss is higher than acco's in every "
    "comparison of docs/reference/results.md; measure yours."
)
_ROUNDED = (
    f'With "commit_comm": "{COARSEST_COMMIT}" a COMMIT is rounded, too: what its bits cannot say of a weight stays in '
    "the fp32 master and comes with the next one; measure your loss with it."
)


def _regime(
    default: Prediction, delayed: Prediction, baseline: Prediction, commit: float, compute: float, n: int
) -> str:
    against = f"{baseline.step_s / default.step_s:.2f}x the speed of {baseline.name} ({seconds(baseline.step_s)})"
    if default.step_s <= 1.01 * compute:
        return (
            f"Everything is hidden: each round fits behind its part of the computation (R <= C/2), so {default.name} "
            f"takes C, {against}. Nothing can be faster; at R = C/2 it would be 1.5x as fast as C + R."
        )
    if commit < compute / 2:
        return (
            f"R <= C/2, but with n = {n} one of the phases is shorter than its round: {default.name} takes "
            f"{seconds(default.step_s)}, {against}. An even n has equal phases."
        )
    one_round = _names(delayed_modes())
    if commit < compute:
        return (
            f"A part is hidden: past R = C/2 {default.name}'s two rounds take longer than the computation; a step "
            f"takes {seconds(default.step_s)}, {against}. {one_round} have one round and hide it until R = C: "
            f"{seconds(delayed.step_s)}."
        )
    return (
        f"The network is slower than the computation (R >= C): {default.name}'s two rounds take "
        f"{seconds(default.step_s)}, {against}; they cost more than one that waits (C + R = "
        f"{seconds(compute + commit)}), and {one_round}, with one round, take {seconds(delayed.step_s)}."
    )


def _quantized(mode: Mode, before: Prediction, coarser: Prediction, window: Work, rounds: Figures) -> str:
    is_hidden = coarser.exposed_s <= 0.01 * window.compute_s
    hides = "everything is hidden" if is_hidden else f"{seconds(coarser.exposed_s)} of it exposed"
    step = f"a step takes {seconds(coarser.step_s)} ({hides}), {before.step_s / coarser.step_s:.2f}x the speed of"
    if mode.wire.commit:
        return (
            f'"commit_comm": "{mode.commit_comm}" hides more: beside an ESTIMATE of {seconds(rounds.estimate_s)} the '
            f"COMMIT then takes {seconds(rounds.commit_s)}, and {step} {before.name}. {_ROUNDED}"
        )
    return (
        f'"estimate_comm": "{mode.estimate_comm}" hides more: the ESTIMATE then takes {seconds(rounds.estimate_s)}, so '
        f"phase A, which hides the COMMIT, can have {window.estimate_fraction:.4g} of the computation; {step} plain "
        f"{before.name}. The COMMIT stays exact; measure your loss with it."
    )


def _not_quantized(cluster: Cluster) -> str:
    why = ""
    if cluster.has_inside and not cluster.has_two_levels and cluster.backend == "nccl":
        why = (
            f": its gradients go directly from rank to rank, and the {cluster.ranks_per_host} ranks of a host share "
            'its link; not so with "ranks_per_host": "auto"'
        )
    return f'"estimate_comm": "{COARSEST.estimate_comm}" would not be 2 % faster{why}.'


def _memory_cost(mode: Prediction, model: Model, ranks: int) -> str:
    own, zero1 = mode.memory_bytes, memory_bytes("zero1", model, ranks)
    return f"Model states: {own / 2**30:.3g} GiB a rank, {(own - zero1) / 2**30:.3g} GiB more than zero1."


def _larger_batch(commit: float, work: Work) -> str:
    n = 2 * math.ceil(commit / work.micro_batch_s * (1 - 1e-9))
    if n <= work.n:
        n = work.n + work.n % 2
    return f"If the batch may grow: n = {n} (a {n / work.n:.3g} times larger batch) hides everything in {DEFAULT.name}."


def _crossing(ratio: float | None, name: str, mode: str) -> str:
    if ratio is None:
        return f"{mode} is at no R/C faster than {name} here."
    if math.isinf(ratio):
        return f"{mode} stays faster than {name} up to R/C = 100."
    return f"{mode} stops paying against {name} at R/C = {ratio:.3g}."
