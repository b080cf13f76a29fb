# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What a user may write under ``"optimizer": {"type": "ACCO", "params": {...}}``: names, ranges, clear errors."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

from .algorithm.schedules import SCHEDULES

LANES = ("auto", "inline")
ADAPTIVE = "adaptive"
ACCUMULATIONS = ("fixed", ADAPTIVE)
LR_FOLLOWS = ("samples", "steps")
ESTIMATE_COMMS = {"full": 0, "int8": 8, "int4": 4}  # bits of a value; 0: in its dtype
AUTOS = ("auto", "measured")  # the same; HF Trainer and Accelerate take every "auto" for their own
FIRST_OF_AUTO = 0.5
MAX_WINDOW_GROWTH = 8  # default of max_window, in nominal windows


def _refuse(key: str, given: Any, allowed: str, fix: str) -> ValueError:
    return ValueError(f"ACCO: optimizer.params.{key} = {given!r} is not allowed; allowed: {allowed}. {fix}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_choice(key: str, value: Any, choices) -> None:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else "Set one of these."
        raise _refuse(key, value, ", ".join(f'"{choice}"' for choice in choices), hint)


def _check_number(key: str, value: Any, low: float, *, open_low: bool = False, below: float = math.inf) -> None:
    bound = f"a number {'>' if open_low else '>='} {low:g}" + (f" and < {below:g}" if below < math.inf else "")
    if not _is_number(value):
        raise _refuse(key, value, bound, "Write it as a JSON number, without quotes.")
    if value < low or (open_low and value == low) or value >= below:
        raise _refuse(key, value, bound, "Choose a value in that range.")


def check_adamw(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Raises ValueError for hyper-parameters that AdamW cannot use, naming the key as the JSON spells it."""
    _check_number("lr", lr, 0.0)
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise _refuse("betas", betas, "a list of two numbers", "For example [0.9, 0.999].")
    for beta in betas:
        if not _is_number(beta) or not 0.0 <= beta < 1.0:
            raise _refuse("betas", betas, "two numbers >= 0 and < 1", "For example [0.9, 0.999].")
    _check_number("eps", eps, 0.0)
    _check_number("weight_decay", weight_decay, 0.0)


def is_adaptive(accumulation: str | None) -> bool:
    """Tells whether windows grow until the round behind them is finished, so that steps differ in size."""
    return accumulation == ADAPTIVE


@dataclass(frozen=True)
class Settings:
    """ACCO's own keys (the rest of ``params`` is AdamW's).

    Attributes:
        schedule: ``acco``, ``wp``, ``dpu`` or ``sync`` (rounds.py).
        estimate_fraction: part of the window's micro-batches that phase A has, in (0, 1); ``auto`` or ``measured``: one
            half, until after 10 windows the split that was measured to be the fastest is taken (split.py).
        overlap_warmup_steps: so many first windows run as ``sync``.
        accumulation: ``fixed``: every window has ``gradient_accumulation_steps`` micro-batches; ``adaptive``: it has at
            least so many, and a rank goes on until its running round is finished.
        max_window: with ``adaptive``: a rank's micro-batches of one window at most, then it waits; None: 8 times
            ``gradient_accumulation_steps``.
        lr_follows: with ``adaptive``: the engine's scheduler moves by one for every ``train_batch_size`` ``samples`` of
            the commits finished, or at each of the ``steps``. With ``fixed`` both are the same.
        lane: ``auto``: a side stream on CUDA, a worker thread on CPU; ``inline``: blocking, for debugging.
        comm_timeout_s: timeout of ACCO's own process group in seconds; None: DeepSpeed's default.
        estimate_comm: what an ESTIMATE sends: ``full``, or gradients and changes of weights as ``int8`` or ``int4``
            (quantize.py). A COMMIT is always sent in full.
    """

    schedule: str = "acco"
    estimate_fraction: float | str = 0.5
    overlap_warmup_steps: int = 0
    accumulation: str = "fixed"
    lane: str = "auto"
    comm_timeout_s: float | None = None
    max_window: int | None = None
    lr_follows: str = "samples"
    estimate_comm: str = "full"

    def __post_init__(self):
        _check_choice("schedule", self.schedule, tuple(SCHEDULES))
        if self.estimate_fraction in AUTOS:
            if not SCHEDULES[self.schedule].has_two_phases:
                fix = 'Remove it, or set the schedule to "acco": the others have one phase.'
                allowed = f'a number with schedule = "{self.schedule}"'
                raise _refuse("estimate_fraction", self.estimate_fraction, allowed, fix)
        elif isinstance(self.estimate_fraction, str):
            allowed = 'a number > 0 and < 1, "auto", or "measured", which is the same'
            raise _refuse("estimate_fraction", self.estimate_fraction, allowed, "Write numbers without quotes.")
        else:
            _check_number("estimate_fraction", self.estimate_fraction, 0.0, open_low=True, below=1.0)
        _check_choice("estimate_comm", self.estimate_comm, tuple(ESTIMATE_COMMS))
        if self.estimate_bits and not SCHEDULES[self.schedule].has_two_phases:
            fix = 'Remove it, or set the schedule to "acco": the others make no estimate, and a COMMIT is sent in full.'
            raise _refuse("estimate_comm", self.estimate_comm, f'"full" with schedule = "{self.schedule}"', fix)
        steps = self.overlap_warmup_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise _refuse("overlap_warmup_steps", steps, "a whole number >= 0", "0 overlaps from the first step on.")
        _check_choice("accumulation", self.accumulation, ACCUMULATIONS)
        _check_choice("lane", self.lane, LANES)
        if self.comm_timeout_s is not None:
            _check_number("comm_timeout_s", self.comm_timeout_s, 0.0, open_low=True)
        _check_choice("lr_follows", self.lr_follows, LR_FOLLOWS)
        if self.max_window is not None:
            if not isinstance(self.max_window, int) or isinstance(self.max_window, bool) or self.max_window < 1:
                raise _refuse("max_window", self.max_window, "a whole number >= 1", "It counts micro-batches.")
            if not self.is_adaptive:
                fix = 'Remove it, or set accumulation to "adaptive".'
                raise _refuse("max_window", self.max_window, 'none with accumulation = "fixed"', fix)
        if self.is_adaptive and not SCHEDULES[self.schedule].overlaps:
            fix = 'Set the schedule to "acco", "wp" or "dpu": "sync" has no round to accumulate behind.'
            raise _refuse("accumulation", self.accumulation, '"fixed" with schedule = "sync"', fix)

    @property
    def is_adaptive(self) -> bool:
        return is_adaptive(self.accumulation)

    @property
    def estimate_bits(self) -> int:
        """Bits of a value that an ESTIMATE sends; 0: in full."""
        return ESTIMATE_COMMS[self.estimate_comm]

    @property
    def first_estimate_fraction(self) -> float:
        """That of the first windows."""
        return FIRST_OF_AUTO if isinstance(self.estimate_fraction, str) else self.estimate_fraction


ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay")
ACCO_KEYS = tuple(field.name for field in fields(Settings))


def refuse_unknown(keys) -> None:
    """Raises ValueError for the first key that neither AdamW nor ACCO has."""
    allowed = ADAMW_KEYS + ACCO_KEYS
    for key in keys:
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else "Remove it."
        raise ValueError(f"ACCO: unknown key optimizer.params.{key}; allowed: {', '.join(allowed)}. {hint}")


def max_window_micro_batches(window_micro_batches: int, max_window: int | None) -> int:
    """Micro-batches that a rank's adaptive window may have, of n at least.

    Raises:
        ValueError: for a ``max_window`` below n.
    """
    if max_window is None:
        return MAX_WINDOW_GROWTH * window_micro_batches
    if max_window < window_micro_batches:
        allowed = f">= gradient_accumulation_steps = {window_micro_batches}, the least that a window has"
        raise _refuse("max_window", max_window, allowed, "Raise it, or lower gradient_accumulation_steps.")
    return max_window
