# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small network on the ranks' own devices: against the one-process reference, and on both lanes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from ...algorithm.reference import Reference, ReferenceHyper
from ...algorithm.window import phase_a_micro_batches
from ...engine.true_weights import true_weights
from ...runtime.levels import Levels
from ...settings import ADAMW_KEYS, AdamWKeys
from .finding import FAIL, OK, Finding
from .subject import LEARNING_RATE, Subject

_SAMPLES, _FEATURES, _HIDDEN, _TARGETS = 4, 7, 13, 3  # odd: the last shard has padding
_WINDOWS, _MOST_MICRO_BATCHES = 12, 4096
_LOSS_SCALE = 128.0  # of fp16
_TOLERANCE = 1e-4  # of the distance moved: fp32 against float64
# Where float32 and float64 put a weight on two sides of a rounding boundary, one 16-bit weight differs by one unit in
# the last place; schedules differ by 1e-2 and more.
_TOLERANCE_16_BIT = 3e-3
_NCCL_TOLERANCE_16_BIT = 5e-3  # times the root of the ranks: it rounds every partial sum
_LARGEST_TOLERANCE = 5e-2
_LONGEST_PAUSE_S = 3e-3
_REPORT = "Try again with DEEPSPEED_ACCO_KERNELS=torch, which tells kernels and network apart, and report this"
_CYCLES_PER_S = 1.5e9


def _network(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Returns the network, the same on every rank, of the weights that training begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = (nn.Linear(_FEATURES, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, _HIDDEN), nn.Tanh())
        return nn.Sequential(*layers, nn.Linear(_HIDDEN, _TARGETS)).to(device, dtype)


def _batch(rank: int, window: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets of one micro-batch; every one differs, so that a mixed-up order shows."""
    generator = torch.Generator().manual_seed(1 + micro_batch + 100 * window + 10_000 * rank)
    x = torch.randn(_SAMPLES, _FEATURES, generator=generator)
    return x, torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x.square().mean(1)], 1)


def _loss(network: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    x, y = (part.to(like) for part in batch)
    return (network(x) - y).square().mean()


def _windows(subject: Subject) -> int:
    """Returns how many windows are trained: the reference computes those of all ranks."""
    of_a_window = subject.training.n * subject.control.world_size
    return max(4, min(_WINDOWS, _MOST_MICRO_BATCHES // of_a_window))


@contextmanager
def one_thread() -> Iterator[None]:
    """Takes one thread: at these sizes others only wait, and steps in 16 bit take up to thirty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the run


@dataclass(frozen=True)
class _Trained:
    """Holds what a run has come to: true weights in fp32, what the module holds at the end, 1-D; and its layout."""

    true: Tensor
    live: Tensor
    shard_numels: list[int]
    levels: Levels


def _config(subject: Subject, lane: str) -> dict[str, Any]:
    training = subject.training
    params = {**training.params, "lr": LEARNING_RATE, "lane": lane, "comm_timeout_s": subject.timeout_s}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": _SAMPLES,
        "gradient_accumulation_steps": training.n,
        "gradient_clipping": training.clip,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "ACCO", "params": params},
        "steps_per_print": 10**9,
    }
    if training.precision != "fp32":
        config[training.precision] = {"enabled": True}
    if training.precision == "fp16":
        config["fp16"]["loss_scale"] = _LOSS_SCALE
    return config


def _train(subject: Subject, lane: str, pause: Callable[[], None] | None = None) -> _Trained:
    """Trains through ``deepspeed.initialize``, as a user's script does.

    Args:
        pause: called in every forward, on its stream, and before and behind every round, on the round's.
    """
    network = _network(torch.float32, subject.device)
    parameters = list(network.parameters())
    engine, *_ = deepspeed.initialize(model=network, model_parameters=parameters, config=_config(subject, lane))
    if pause is not None:
        network.register_forward_hook(lambda *_: pause())
        _pause_in_rounds(engine.optimizer.lane, pause)
    try:
        for window in range(_windows(subject)):
            for micro_batch in range(subject.training.n):
                engine.backward(_loss(engine, _batch(subject.control.rank, window, micro_batch), parameters[0]))
                engine.step()
        shard_numels, levels = engine.optimizer.shard_numels(), engine.optimizer.levels
        with true_weights(engine):
            true = _flat([safe_get_full_fp32_param(param) for param in parameters])
    finally:
        engine.destroy()
    return _Trained(true, _flat(parameters), shard_numels, levels)


def _pause_in_rounds(lane: Any, pause: Callable[[], None]) -> None:
    start = lane.start

    def paused(round_: Callable[[], Any]) -> Any:
        pause()
        result = round_()
        pause()
        return result

    lane.start = lambda round_, name: start(lambda: paused(round_), name)


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# ---- the reference


def _reference(subject: Subject, run: _Trained) -> tuple[Tensor, Tensor]:
    """Returns the true weights before and after the same training in one process, float64, 1-D. In 16 bit forward and
    backward run in that dtype on the same rounded weights, and sums are rounded where the run rounds them."""
    training, ranks = subject.training, subject.control.world_size
    dtype, in_fp16 = training.dtype, training.precision == "fp16"
    scale, share = (_LOSS_SCALE, 1 / ranks) if in_fp16 else (1.0, 1.0)  # fp16 is divided before it is summed
    is_exact = dtype is torch.float32
    network = _network(dtype, subject.device)
    start = _flat(list(network.parameters())).double()
    network = network.double() if is_exact else network
    parameters = list(network.parameters())

    def gradient(weights: list[Tensor], rank: int, window: int, micro_batch: int) -> list[Tensor]:
        torch.nn.utils.vector_to_parameters(weights[0].to(parameters[0]), parameters)
        loss = _loss(network, _batch(rank, window, micro_batch), parameters[0])
        return [_flat(list(torch.autograd.grad(loss / training.n * scale, parameters)))]

    def rounded(total: Tensor, factor: float) -> Tensor:
        return total if is_exact else (total * factor).to(dtype).double() / (share * scale)

    adamw = AdamWKeys(**{key: training.params[key] for key in ADAMW_KEYS if key in training.params})
    settings, wire = training.settings, training.settings.wire
    reference = Reference(
        [start],
        [ReferenceHyper(LEARNING_RATE, *adamw.betas, adamw.eps, adamw.weight_decay)],
        settings.schedule,
        ranks,
        training.clip,
        most_kept=1.0 if is_exact else 0.5,  # in 16 bits
        see=(lambda weights: weights) if is_exact else (lambda weights: weights.float().to(dtype)),
        accumulate=lambda total, new: (total.to(new) + new).to(new),
        send=lambda total: rounded(total, share),
        ranks_per_host=run.levels.ranks_per_host,
        pass_on=lambda total: rounded(total, share * scale),
        stands_on_true_after_skip=in_fp16,
        estimate_bits=(wire.estimate and wire.estimate.gradient) or None,
        commit_bits=(wire.commit.gradient, wire.commit.change) if wire.commit else None,
        loss_scale=scale,
        shard_numels=run.shard_numels,
    )
    n = training.n
    in_a = phase_a_micro_batches(n, settings.first_estimate_fraction) if training.schedule.has_two_phases else n
    for _ in range(_windows(subject)):
        reference.run_window(gradient, n, in_a)
    return start, reference.shown[0]


def _tolerance(subject: Subject) -> float:
    if subject.training.precision == "fp32":
        return _TOLERANCE
    if subject.device.type != "cuda":
        return _TOLERANCE_16_BIT
    return min(_LARGEST_TOLERANCE, _NCCL_TOLERANCE_16_BIT * subject.control.world_size**0.5)


# ---- the checks


@one_thread()
def check_equality(subject: Subject) -> Finding:
    """Trains a small network, and compares its weights with those of the reference."""
    run = _train(subject, "auto")
    before, after = _reference(subject, run)
    distance = float((run.true.double() - after).norm() / (after - before).norm())
    tolerance, windows = _tolerance(subject), _windows(subject)
    if not math.isfinite(distance):
        return Finding(FAIL, "The weights are not finite.", _REPORT)
    if not run.live.equal(run.true.to(run.live)):
        return Finding(FAIL, "The module's weights at the end are not those of the shards.", _REPORT)
    figures = {"distance": distance, "tolerance": tolerance, "steps": windows}
    told = f"{windows} steps in {subject.training.precision} end beside the reference (one process, float64), apart by "
    told += f"{distance:.1e} of the way; allowed is {tolerance:.0e}."
    return Finding(OK, told, figures=figures) if distance < tolerance else Finding(FAIL, told, _REPORT, figures)


@one_thread()
def check_lanes(subject: Subject) -> Finding:
    """Trains on both lanes, the overlapping one with random delays, and compares bits."""
    choose = random.Random(subject.control.rank)

    def pause() -> None:
        seconds = choose.random() * _LONGEST_PAUSE_S
        if subject.device.type == "cuda":
            torch.cuda._sleep(int(seconds * _CYCLES_PER_S))
        else:
            time.sleep(seconds)

    overlapped, inline = _train(subject, "auto", pause), _train(subject, "inline")
    differing = int((overlapped.true != inline.true).sum() + (overlapped.live != inline.live).sum())
    figures = {"differing_weights": differing, "longest_delay_s": _LONGEST_PAUSE_S}
    if not differing:
        told = "The lanes auto, with random delays in forwards and rounds, and inline give the same bits."
        return Finding(OK, told, figures=figures)
    advice = 'Train with "lane": "inline" until it is found, and report this'
    return Finding(FAIL, f"{differing} weights differ between the lanes auto and inline.", advice, figures)
