# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares what may stand under ``"optimizer": {"type": "ACCO", "params": {...}}``: names, ranges, clear errors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from .algorithm.schedules import AUTO, DEFAULT, DEFAULT_OF_ONE, SCHEDULES, chosen, names_of
from .algorithm.wire import COMMIT_COMMS, ESTIMATE_COMMS, Wire

Lane = Literal["auto", "inline"]
Accumulation = Literal["fixed", "adaptive"]
LrFollows = Literal["samples", "steps"]
EstimateComm = Literal["full", "int8", "int4"]
CommitComm = Literal["full", "int8"]
RanksPerHost = Literal["auto"]
Auto = Literal["auto", "measured"]  # the same; HF Trainer and Accelerate take every "auto" for their own

FIRST_OF_AUTO = 0.5
MAX_WINDOW_GROWTH = 8  # default of max_window, in nominal windows
LARGEST_FLOAT = 3e38  # of fp32, in which updates are computed and norms are clipped
LARGEST_COUNT = 2**31 - 1


# ---- what a value may be: each class checks it and describes it, for messages and in the JSON schema


def _refuse(key: str, given: Any, allowed: str, fix: str) -> ValueError:
    return ValueError(f"ACCO: optimizer.params.{key} = {given!r} is not allowed; allowed: {allowed}. {fix}")


def _quoted(names: Iterable[str]) -> list[str]:
    return [f'"{name}"' for name in names]


@dataclass(frozen=True)
class _Choice:
    """Allows one of the names: those that the collection has now, since rows may be added to SCHEDULES; or a word."""

    names: Collection[str]
    words: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        allowed = [*self.words, *self.names]
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f'Did you mean "{near[0]}"?' if near else "Set one of these."
            raise _refuse(key, value, ", ".join(_quoted(allowed)), hint)

    def schema(self) -> dict[str, Any]:
        return {"enum": [*self.words, *self.names]}


@dataclass(frozen=True)
class _Number:
    """Allows a finite number from ``low`` on, or above it, below ``below`` or up to ``high``; or one of the words."""

    low: float = 0.0
    is_low_open: bool = False
    below: float = math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, str) and value in self.words:
            return
        bound = f"a number {'>' if self.is_low_open else '>='} {self.low:g}"
        bound += f" and < {self.below:g}" if self.below < math.inf else ""
        bound += f" and <= {self.high:g}" if self.high < math.inf else ""
        words = _quoted(self.words)
        allowed = ", ".join([bound, *words[:-1]]) + (f", or {words[-1]}" if words else "")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:  # NaN
            raise _refuse(key, value, allowed, "Write it as a JSON number, without quotes.")
        if abs(value) > LARGEST_FLOAT:
            raise _refuse(key, value, allowed, f"Choose a value of at most {LARGEST_FLOAT:g}.")
        if not self.low <= value <= self.high or (self.is_low_open and value == self.low) or value >= self.below:
            raise _refuse(key, value, allowed, "Choose a value in that range.")

    def schema(self) -> dict[str, Any]:
        number: dict[str, Any] = {
            "type": "number",
            "exclusiveMinimum" if self.is_low_open else "minimum": self.low,
            **({"exclusiveMaximum": self.below} if self.below < math.inf else {}),
            **({"maximum": self.high} if self.high < math.inf else {}),
        }
        return {"anyOf": [number, {"enum": list(self.words)}]} if self.words else number


@dataclass(frozen=True)
class _Whole:
    """Allows a whole number from ``low`` on, or one of the words."""

    low: int
    hint: str
    words: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, str) and value in self.words:
            return
        allowed = " or ".join([f"a whole number >= {self.low}", *_quoted(self.words)])
        if not isinstance(value, int) or isinstance(value, bool) or value < self.low:
            raise _refuse(key, value, allowed, self.hint)
        if value > LARGEST_COUNT:
            raise _refuse(key, value, allowed, f"Choose a value of at most {LARGEST_COUNT}.")

    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.low}
        return {"anyOf": [number, {"enum": list(self.words)}]} if self.words else number


class _Betas:
    """Allows two numbers >= 0 and < 1."""

    def check(self, key: str, value: Any) -> None:
        example = "For example [0.9, 0.999]."
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise _refuse(key, value, "a list of two numbers", example)
        for beta in value:
            if not isinstance(beta, (int, float)) or isinstance(beta, bool) or not 0.0 <= beta < 1.0:
                raise _refuse(key, value, "two numbers >= 0 and < 1", example)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": _Number(below=1.0).schema(), "minItems": 2, "maxItems": 2}


def _key(default: Any, allowed: _Choice | _Number | _Whole | _Betas, description: str) -> Any:
    """Makes a field of Settings or AdamWKeys; one whose default is None may be None."""
    return field(default=default, metadata={"allowed": allowed, "description": description})


def _check_keys(keys: Settings | AdamWKeys) -> None:
    for key in fields(keys):
        value = getattr(keys, key.name)
        if value is not None or key.default is not None:
            key.metadata["allowed"].check(key.name, value)


# ---- the keys


@dataclass(frozen=True)
class AdamWKeys:
    """Holds AdamW's keys under ``params``, with the defaults of torch.optim.AdamW.

    Raises:
        ValueError: for a value that AdamW cannot use, naming the key as the JSON spells it.
    """

    lr: float = _key(1e-3, _Number(), "learning rate")
    betas: tuple[float, float] = _key((0.9, 0.999), _Betas(), "decay of the averages of the gradient and its square")
    eps: float = _key(1e-8, _Number(), "added to the root of the averaged square")
    weight_decay: float = _key(1e-2, _Number(), "decoupled weight decay")

    def __post_init__(self):
        _check_keys(self)


def is_adaptive(accumulation: str | None) -> bool:
    """Tells whether windows grow until the round behind them is finished, so that steps differ in size."""
    return accumulation == "adaptive"


@dataclass(frozen=True)
class Settings:
    """Holds ACCO's own keys under ``params``; each field says what its key means.

    Raises:
        ValueError: for a value that is not allowed, or not together with another, naming the key as the JSON spells it.
    """

    schedule: str = _key(
        AUTO,
        _Choice(SCHEDULES, words=(AUTO,)),
        f"which rounds run behind which computation; {AUTO}: {DEFAULT.name} where gradient_accumulation_steps >= "
        f"{DEFAULT.least_micro_batches}, else {DEFAULT_OF_ONE.name}",
    )
    estimate_fraction: float | Auto = _key(
        0.5,
        _Number(is_low_open=True, below=1.0, words=get_args(Auto)),
        "part of the window's micro-batches that phase A has; auto or measured, which are the same: one half, until "
        "after 10 windows the split that was measured to be the fastest is taken",
    )
    overlap_warmup_steps: int = _key(
        0, _Whole(0, "0 overlaps from the first step on."), "so many first windows run as sync"
    )
    accumulation: Accumulation = _key(
        "fixed",
        _Choice(get_args(Accumulation)),
        "fixed: every window has gradient_accumulation_steps micro-batches; adaptive: it has at least so many, and a "
        "rank goes on until its running round is finished",
    )
    lane: Lane = _key(
        "auto",
        _Choice(get_args(Lane)),
        "auto: rounds run on a side stream on CUDA and in a worker thread on CPU; inline: blocking, for debugging",
    )
    comm_timeout_s: float | None = _key(
        None,
        _Number(is_low_open=True, below=1e9),
        "seconds that rounds, and DeepSpeed's collectives in steps and checkpoints, wait for a rank; null: DeepSpeed's "
        "default",
    )
    max_window: int | None = _key(
        None,
        _Whole(1, "It counts micro-batches."),
        "with adaptive accumulation: a rank's micro-batches of one window at most, then it waits; null: "
        f"{MAX_WINDOW_GROWTH} times gradient_accumulation_steps",
    )
    lr_follows: LrFollows = _key(
        "samples",
        _Choice(get_args(LrFollows)),
        "with adaptive accumulation: the engine's scheduler moves by one for every train_batch_size samples of the "
        "commits finished, or at each of the steps",
    )
    estimate_comm: EstimateComm = _key(
        "full",
        _Choice(get_args(EstimateComm)),
        "what an ESTIMATE sends: values in full, or gradients and changes of weights in 8 or 4 bits",
    )
    commit_comm: CommitComm = _key(
        "full",
        _Choice(get_args(CommitComm)),
        f"what a COMMIT sends: values in full, or gradients in {COMMIT_COMMS['int8'].gradient} bits and changes of "
        f"weights in {COMMIT_COMMS['int8'].change}, of which the master weights keep what is lost",
    )
    ranks_per_host: int | RanksPerHost = _key(
        "auto",
        _Whole(1, "It counts data-parallel ranks.", words=get_args(RanksPerHost)),
        "so many consecutive data-parallel ranks share a host: rounds reduce inside it before they go to other hosts; "
        "auto: as the launcher started them; 1: rounds do not look at hosts",
    )

    sm_share: float = _key(
        1.0,
        _Number(is_low_open=True, high=1.0),
        "on CUDA: the share of the multiprocessors that the kernels of a round and its collectives may take; 1: as "
        "many as they have use for",
    )

    def __post_init__(self):
        _check_keys(self)
        if self.max_window is not None and not self.is_adaptive:
            fix = 'Remove it, or set accumulation to "adaptive".'
            raise _refuse("max_window", self.max_window, 'none with accumulation = "fixed"', fix)
        if self.schedule == AUTO:
            return
        schedule = SCHEDULES[self.schedule]
        if not schedule.has_two_phases:
            remove = f"Remove it, or set the schedule to {names_of(lambda row: row.has_two_phases)}"
            if isinstance(self.estimate_fraction, str):
                allowed = f'a number with schedule = "{self.schedule}"'
                fix = f"{remove}: the others have one phase."
                raise _refuse("estimate_fraction", self.estimate_fraction, allowed, fix)
            if self.estimate_comm != "full":
                fix = f"{remove}: the others make no estimate; commit_comm is for their COMMITs."
                raise _refuse("estimate_comm", self.estimate_comm, f'"full" with schedule = "{self.schedule}"', fix)
        if self.is_adaptive and not schedule.overlaps:
            overlapping = names_of(lambda row: row.overlaps)
            fix = f'Set the schedule to {overlapping}: "{self.schedule}" has no round to accumulate behind.'
            raise _refuse("accumulation", self.accumulation, f'"fixed" with schedule = "{self.schedule}"', fix)

    def of_window(self, n: int) -> Settings:
        """Returns the settings for windows of n micro-batches, where the schedule is no more "auto".

        Raises:
            ValueError: the schedule that "auto" stands for does not take another key's value.
        """
        schedule = chosen(self.schedule, n)
        try:
            return replace(self, schedule=schedule)
        except ValueError as refusal:
            raise ValueError(f'{refusal} (gradient_accumulation_steps = {n}: there "{AUTO}" is "{schedule}")') from None

    @property
    def is_adaptive(self) -> bool:
        """Tells whether a window goes on until the round behind it is finished."""
        return is_adaptive(self.accumulation)

    @property
    def wire(self) -> Wire:
        """Returns in how many bits the rounds of the schedule send; it is no more "auto"."""
        estimates = SCHEDULES[self.schedule].has_two_phases
        return Wire(ESTIMATE_COMMS[self.estimate_comm] if estimates else None, COMMIT_COMMS[self.commit_comm])

    def without_effect(self, device_type: str) -> dict[str, str]:
        """Returns the keys that were set and change nothing there and beside the others, each with the reason."""
        schedule = SCHEDULES.get(self.schedule, DEFAULT)  # of "auto" only a window's size tells
        reasons = {
            "estimate_fraction": "" if schedule.has_two_phases else f'the schedule "{self.schedule}" has one phase',
            "overlap_warmup_steps": "" if schedule.overlaps else f'the schedule "{self.schedule}" overlaps nothing',
            "sm_share": "" if device_type == "cuda" else f"there are no multiprocessors to share on {device_type}",
            "lr_follows": "" if self.is_adaptive else 'with accumulation = "fixed" all steps have as many samples',
        }
        return {
            key: reason for key, reason in reasons.items() if reason and getattr(self, key) != getattr(Settings, key)
        }

    @property
    def first_estimate_fraction(self) -> float:
        """Returns the part of the first windows' micro-batches that phase A has."""
        return FIRST_OF_AUTO if isinstance(self.estimate_fraction, str) else self.estimate_fraction


ADAMW_KEYS = tuple(key.name for key in fields(AdamWKeys))
ACCO_KEYS = tuple(key.name for key in fields(Settings))


def refuse_unknown(keys) -> None:
    """Raises ValueError for the first key that neither AdamW nor ACCO has."""
    allowed = ADAMW_KEYS + ACCO_KEYS
    for key in keys:
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else "Remove it."
        raise ValueError(f"ACCO: unknown key optimizer.params.{key}; allowed: {', '.join(allowed)}. {hint}")


def max_window_micro_batches(window_micro_batches: int, max_window: int | None) -> int:
    """Returns the micro-batches that a rank's adaptive window may have, of n at least.

    Raises:
        ValueError: for a ``max_window`` below n.
    """
    if max_window is None:
        return MAX_WINDOW_GROWTH * window_micro_batches
    if max_window < window_micro_batches:
        allowed = f">= gradient_accumulation_steps = {window_micro_batches}, the least that a window has"
        raise _refuse("max_window", max_window, allowed, "Raise it, or lower gradient_accumulation_steps.")
    return max_window


# ---- for editors


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 7) of a DeepSpeed JSON in so far as it concerns ACCO.

    It has the values of each key and allows whatever else is in the file. What keys forbid each other is checked when
    training starts.
    """
    properties: dict[str, Any] = {}
    for key in (*fields(AdamWKeys), *fields(Settings)):
        allowed = key.metadata["allowed"].schema()
        if key.name in ADAMW_KEYS:
            allowed = {"anyOf": [allowed, {"const": "auto", "description": "filled by HF Trainer and Accelerate"}]}
        if key.default is None:
            allowed = {"anyOf": [allowed, {"type": "null"}]}
        properties[key.name] = {"description": key.metadata["description"], "default": key.default, **allowed}
    is_acco = {"properties": {"type": {"const": "ACCO"}}, "required": ["type"]}
    params = {"type": "object", "properties": properties, "additionalProperties": False}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "DeepSpeed JSON with the optimizer ACCO",
        "type": "object",
        "properties": {"optimizer": {"if": is_acco, "then": {"properties": {"params": params}}}},
    }
