# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The advice of ``ds_acco plan``: whether ACCO pays, with what settings, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...algorithm.schedules import ESTIMATE
from .model import STAGES, Cluster, Model, Prediction, Work, best_split, memory_bytes, predict, round_s

_WORTH_IT = 1.02  # a smaller speed-up is called none


def best_stage(model: Model, cluster: Cluster, work: Work) -> Prediction | None:
    """The fastest of DeepSpeed's stages whose model states fit; None where none does."""
    stages = [predict(name, model, cluster, work) for name in STAGES]
    fitting = [stage for stage in stages if stage.memory_bytes <= cluster.memory_bytes]
    return min(fitting, key=lambda stage: stage.step_s, default=None)


def best_window(
    model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1, name: str = "acco"
) -> Work | None:
    """n and ``estimate_fraction`` for ``name`` at the same batch: micro-batches may be cut, never merged, as merged
    ones need more memory. Computation is taken to stay as long. The smallest n within 0.1 % of the best.

    Args:
        micro_batch_size: samples of a micro-batch; 1: it cannot be cut.
        name: one of ``TWO_PHASES``.

    Returns:
        None where n = 1 and the micro-batch has one sample.
    """
    cuts = [cut for cut in range(1, micro_batch_size + 1) if micro_batch_size % cut == 0 and cut * work.n > 1]
    windows = [replace(work, n=cut * work.n, micro_batch_s=work.micro_batch_s / cut) for cut in cuts]
    windows = [best_split(model, cluster, window, name) for window in windows]
    steps = [predict(name, model, cluster, window).step_s for window in windows]
    return next((window for window, step in zip(windows, steps) if step <= 1.001 * min(steps)), None)


def stops_paying(
    model: Model, cluster: Cluster, work: Work, against: Iterable[str] = STAGES, name: str = "acco"
) -> float | None:
    """The R/C from which on ``name`` is not faster than the fastest of ``against``: R stays, the computation varies.

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
    """What to use.

    Attributes:
        name: one of ``NAMES``; None where no model states fit.
        n, estimate_fraction: what to set with ACCO; with a stage n as it is and None.
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
    """``2.12 s``, ``650 ms``, ``12 us``: three digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def advise(model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1) -> Advice:
    """Whether ACCO pays here, with what settings, and why. ``acco`` is taken before the faster ``wp``, which costs
    quality, and before ``acco-int4`` where that is not 2 % faster; anything must be at least 2 % faster than the best
    stage. Splits are chosen, whatever ``work.estimate_fraction`` says."""
    baseline = best_stage(model, cluster, work)
    commit, compute = round_s(model, cluster, work), work.compute_s
    said = [
        f"R = {seconds(commit)} (reduce-scatter, sharded update, all-gather), C = {seconds(compute)} "
        f"({work.n} x {seconds(work.micro_batch_s)}): R/C = {commit / compute:.3g}."
    ]

    if baseline is None:  # nor does ACCO: ZeRO-3 has the smallest model states of all
        said.append("The model states of no stage fit in a rank's memory: use more ranks, or offload.")
        return Advice(None, work.n, None, None, None, tuple(said))

    def decide(name: str, window: Work | None = None, step_s: float = baseline.step_s) -> Advice:
        n, fraction = (window.n, window.estimate_fraction) if window else (work.n, None)
        return Advice(name, n, fraction, baseline.name, baseline.step_s / step_s, tuple(said))

    window = best_window(model, cluster, work, micro_batch_size)
    acco = predict("acco", model, cluster, window) if window else None
    delayed = predict("wp", model, cluster, work)
    if cluster.ranks == 1:
        said.append("One rank communicates nothing: there is nothing to hide.")
        return decide(baseline.name)
    if delayed.memory_bytes > cluster.memory_bytes:
        said.append(
            f"ACCO's model states do not fit: {delayed.memory_bytes / 2**30:.1f} GiB of "
            f"{cluster.memory_bytes / 2**30:.1f}; {baseline.name} is the fastest stage that does."
        )
        return decide(baseline.name)
    if baseline.step_s < _WORTH_IT * compute:
        said.append(
            f"Nothing to win: communication and update make a step of {baseline.name} only "
            f"{100 * (baseline.step_s / compute - 1):.2g} % longer than its computation."
        )
        return decide(baseline.name)
    if window is None or acco is None:
        said.append(
            "n = 1 has no second phase for acco: set gradient_accumulation_steps = 2 and halve the micro-batch."
        )
    else:
        chosen = acco
        said.append(_regime(acco, delayed, baseline, commit, compute, window.n))
        if acco.step_s > 1.01 * compute:
            quantised = best_window(model, cluster, work, micro_batch_size, "acco-int4")
            assert quantised is not None, "it has as many phases as acco"
            int4 = predict("acco-int4", model, cluster, quantised)
            said.append(_larger_batch(commit, window))
            if acco.step_s >= _WORTH_IT * int4.step_s:
                estimate = round_s(model, cluster, quantised, ESTIMATE, "int4")
                said.append(_int4(acco, int4, quantised, estimate))
                window, chosen = quantised, int4
            elif commit > compute / 2:
                said.append(_no_int4(cluster))
        anywhere = window if chosen is acco else replace(window, estimate_fraction=None)  # the best split at each R/C
        crossing = stops_paying(model, cluster, anywhere, (baseline.name,), chosen.name)
        said.append(_crossing(crossing, baseline.name, chosen.name))
        if baseline.step_s >= _WORTH_IT * chosen.step_s:
            if chosen.step_s >= _WORTH_IT * delayed.step_s:
                faster = chosen.step_s / delayed.step_s
                said.append(f"wp and dpu would be {faster:.2f}x as fast as {chosen.name}, at a price: {_QUALITY}")
            said.append(_memory_cost(model, cluster.ranks))
            return decide(chosen.name, window, chosen.step_s)
    if baseline.step_s >= _WORTH_IT * delayed.step_s:
        said.append(f"What is faster than {baseline.name} here is wp, at a price: {_QUALITY}")
        said.append(_memory_cost(model, cluster.ranks))
        return decide("wp", work, delayed.step_s)
    said.append(f"No schedule is 2 % faster than {baseline.name}.")
    return decide(baseline.name)


_QUALITY = (
    "gradients are taken at weights one step old, or predicted ones, and the final loss is higher than acco's in every "
    "comparison that the README has; measure yours."
)


def _regime(acco: Prediction, delayed: Prediction, baseline: Prediction, commit: float, compute: float, n: int) -> str:
    against = f"{baseline.step_s / acco.step_s:.2f}x the speed of {baseline.name} ({seconds(baseline.step_s)})"
    if acco.step_s <= 1.01 * compute:
        return (
            f"Everything is hidden: each round fits behind its part of the computation (R <= C/2), so acco takes C, "
            f"{against}. Nothing can be faster; at R = C/2 it would be 1.5x as fast as C + R."
        )
    if commit < compute / 2:
        return (
            f"R <= C/2, but with n = {n} one of the phases is shorter than its round: acco takes "
            f"{seconds(acco.step_s)}, {against}. An even n has equal phases."
        )
    if commit < compute:
        return (
            f"A part is hidden: past R = C/2 acco's two rounds take longer than the computation; a step takes "
            f"{seconds(acco.step_s)}, {against}. wp and dpu have one round and hide it until R = C: "
            f"{seconds(delayed.step_s)}."
        )
    return (
        f"The network is slower than the computation (R >= C): acco's two rounds take {seconds(acco.step_s)}, "
        f"{against}; they cost more than one that waits (C + R = {seconds(compute + commit)}), and wp and dpu, with "
        f"one round, take {seconds(delayed.step_s)}."
    )


def _int4(acco: Prediction, int4: Prediction, window: Work, estimate_s: float) -> str:
    hidden = int4.exposed_s <= 0.01 * window.compute_s
    hides = "everything is hidden" if hidden else f"{seconds(int4.exposed_s)} of it exposed"
    return (
        f'"estimate_comm": "int4" hides more: the ESTIMATE then takes {seconds(estimate_s)}, so phase A, which hides '
        f"the COMMIT, can have {window.estimate_fraction:.4g} of the computation; a step takes {seconds(int4.step_s)} "
        f"({hides}), {acco.step_s / int4.step_s:.2f}x the speed of plain acco. The COMMIT stays exact; measure your "
        "loss with it."
    )


def _no_int4(cluster: Cluster) -> str:
    in_host = cluster.ranks // cluster.host_count
    why = ""
    if in_host > 1 and cluster.backend == "nccl":
        why = f": its gradients go directly from rank to rank, and the {in_host} ranks of a host share its link"
    return f'"estimate_comm": "int4" would not be 2 % faster{why}.'


def _memory_cost(model: Model, ranks: int) -> str:
    own, zero1 = memory_bytes("acco", model, ranks), memory_bytes("zero1", model, ranks)
    return f"Model states: {own / 2**30:.3g} GiB a rank, {(own - zero1) / 2**30:.3g} GiB more than zero1."


def _larger_batch(commit: float, work: Work) -> str:
    n = 2 * math.ceil(commit / work.micro_batch_s * (1 - 1e-9))
    if n <= work.n:
        n = work.n + work.n % 2
    return f"If the batch may grow: n = {n} (a {n / work.n:.3g} times larger batch) hides everything in acco."


def _crossing(ratio: float | None, name: str, mode: str) -> str:
    if ratio is None:
        return f"{mode} is at no R/C faster than {name} here."
    if math.isinf(ratio):
        return f"{mode} stays faster than {name} up to R/C = 100."
    return f"{mode} stops paying against {name} at R/C = {ratio:.3g}."
