# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads what DeepSpeed prints about a run: its timers, its throughput, and facts about the run itself.

With ``"wall_clock_breakdown": true`` rank 0 prints one line of timers for each micro-batch, one for the step, and, in
ZeRO stages 1 and 2, one of the optimizer before the last micro-batch's (deepspeed/utils/timer.py, runtime/engine.py,
runtime/zero/stage_1_and_2.py). Up to version 0.16 they stand behind a logger's head, later behind ``[Rank 0]``; up to
0.9 fwd and bwd were written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..words import counted

_TIMERS = re.compile(r"time \(ms\)((?: \| \w+: [0-9.]+)+)")
_TIMER = re.compile(r"(\w+): ([0-9]{1,15}(?:\.[0-9]+)?)(?![0-9.])")
_THROUGHPUT = re.compile(r"RunningAvgSamplesPerSec=([0-9.e+-]+), CurrSamplesPerSec=([0-9.e+-]+)")
_MICRO = "_microstep"
_CONFIG_BEGINS = re.compile(r"\bjson = \{$")
_LONGEST_CONFIG = 10_000  # lines
_COUNT = r"([0-9][0-9,]{0,20})"


def _whole(digits: str) -> int:
    return int(digits.replace(",", ""))


@dataclass(frozen=True)
class Fact:
    """Holds something that is known about the run, and where it stands."""

    value: Any
    source: str


# Of the launcher, of DeepSpeed's list of its configuration, of HF Trainer and PEFT. What stands later counts.
_FACTS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("ranks", rf"\bdist_world_size={_COUNT}", _whole),
    ("ranks", rf"\bworld_size \.* {_COUNT}$", _whole),
    ("hosts", rf"\bnnodes={_COUNT}", _whole),
    ("stage", r"\bZeRO stage ([0-3]) optimizer", _whole),
    ("stage", r"\bzero_optimization_stage \.* ([0-3])$", _whole),
    ("n", rf"\bgradient_accumulation_steps \.* {_COUNT}$", _whole),
    ("n", rf"\bGradient Accumulation steps = {_COUNT}$", _whole),
    ("micro_batch", rf"\btrain_micro_batch_size_per_gpu \.* {_COUNT}$", _whole),
    ("micro_batch", rf"\bInstantaneous batch size per device = {_COUNT}$", _whole),
    ("params", rf"\bNumber of trainable parameters = {_COUNT}$", _whole),
    ("params", rf"\btrainable params: {_COUNT} \|\|", _whole),
    ("device", r"\bSetting ds_accelerator to (\w+)", str),
)
_FACT_PATTERNS = [(name, re.compile(pattern), read) for name, pattern, read in _FACTS]
_OF_A_FACT = re.compile(r"world_size|nnodes|stage|ccumulation.steps|batch.size|parameters = |params: |accelerator")


@dataclass(frozen=True)
class Step:
    """Holds the timers of one step, in seconds by name, without ``_microstep``.

    Attributes:
        micro_batches: a mapping for each, the last one's with the end of the step.
        optimizer: ``optimizer_allgather`` and its like; empty where the stage has none.
    """

    micro_batches: tuple[Mapping[str, float], ...]
    optimizer: Mapping[str, float]


@dataclass
class Log:
    """Holds what was found in a log.

    Attributes:
        lines: of the file; a progress bar's returns count as ends of lines.
        timer_lines: those that count in ``steps``.
        steps: the whole ones, in their order.
        samples_per_s: of all ranks, a value for each line of throughput: DeepSpeed's CurrSamplesPerSec.
        average_samples_per_s: the newest RunningAvgSamplesPerSec.
        facts: about the run, by name: ranks, hosts, stage, n, micro_batch, params, device.
        config: the DeepSpeed JSON that the log holds, if any.
    """

    lines: int = 0
    timer_lines: int = 0
    steps: list[Step] = field(default_factory=list)
    samples_per_s: list[float] = field(default_factory=list)
    average_samples_per_s: float | None = None
    facts: dict[str, Fact] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def read_log(path: Path) -> Log:
    """Returns what DeepSpeed said in a log.

    Raises:
        ValueError: no file, or nothing in it is a time of DeepSpeed's.
    """
    if not path.is_file():
        raise ValueError(f"LOG {path} is not a file; give what rank 0 of a DeepSpeed run has printed")
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            log = _read_lines(line.rstrip() for line in file)
    except OSError as error:
        raise ValueError(f"LOG {path} cannot be read: {error.strerror}") from error
    if not log.steps and log.average_samples_per_s is None:
        raise ValueError(
            f"LOG {path} has no step's time in {counted(log.lines, 'line')}{_half(log)}. Allowed: what rank 0 of a "
            'DeepSpeed run prints with "wall_clock_breakdown": true (time (ms) | fwd_microstep: ...), or at least '
            "lines with RunningAvgSamplesPerSec"
        )
    return log


def _half(log: Log) -> str:
    """Says what there is of steps that are not whole."""
    return f", though {counted(log.timer_lines, 'line')} of timers" if log.timer_lines else ""


def _read_lines(lines: Iterable[str]) -> Log:
    log = Log()
    micro_batches: list[Mapping[str, float]] = []
    optimizer: Mapping[str, float] = {}
    counted_lines = _counting(lines, log)
    for line in counted_lines:
        found = _TIMERS.search(line)
        if found:
            timers = {_today(name): float(digits) / 1e3 for name, digits in _TIMER.findall(found[1])}
            if any(name.endswith(_MICRO) for name in timers):
                log.timer_lines += 1
                micro_batches.append({name.removesuffix(_MICRO): seconds for name, seconds in timers.items()})
            elif any(name.startswith("optimizer_") for name in timers):
                log.timer_lines += 1
                optimizer = timers
            elif "step" in timers:
                log.timer_lines += 1
                if micro_batches and all({"fwd", "bwd", "bwd_inner", "step"} <= set(one) for one in micro_batches):
                    log.steps.append(Step(tuple(micro_batches), optimizer))
                micro_batches, optimizer = [], {}
            continue
        speed = _THROUGHPUT.search(line)
        if speed:
            _note_speed(log, *speed.groups())
        elif _CONFIG_BEGINS.search(line):
            log.config = _config_in(counted_lines) or log.config
        elif _OF_A_FACT.search(line):
            _note_facts(log, line)
    return log


def _counting(lines: Iterable[str], log: Log) -> Iterator[str]:
    for line in lines:
        log.lines += 1
        yield line


def _today(name: str) -> str:
    """Returns a timer's name in the spelling since 0.10."""
    return re.sub(r"^backward", "bwd", re.sub(r"^forward", "fwd", name))


def _note_speed(log: Log, average: str, current: str) -> None:
    try:
        values = float(average), float(current)
    except ValueError:
        return  # dashes and dots that are no number
    if all(0 < value < float("inf") for value in values):
        log.average_samples_per_s = values[0]
        log.samples_per_s.append(values[1])


def _note_facts(log: Log, line: str) -> None:
    for name, pattern, read in _FACT_PATTERNS:
        found = pattern.search(line)
        if found:
            log.facts[name] = Fact(read(found[1]), f"line {log.lines} of the log")


def _config_in(lines: Iterator[str]) -> dict[str, Any] | None:
    """Returns the JSON whose first line, with a brace, has been read; None where it is cut off or something stands in
    between."""
    text = "{"
    for line, _ in zip(lines, range(_LONGEST_CONFIG)):
        text += line
        if line == "}":
            break
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
