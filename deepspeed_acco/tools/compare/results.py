# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares ``results.json`` of ``ds_acco compare``, version 1, as dataclasses; they write it and read it.

What has a default may be null or missing in a file (typed_json.py). Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...algorithm.schedules import SCHEDULES, Schedule
from ...settings import is_adaptive
from ..typed_json import ABOVE_ZERO, SIGNED, load, read, written
from ..words import shown

VERSION = 1
RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Holds a median with the ends of its 95 % interval."""

    median: float = field(metadata=ABOVE_ZERO)
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class LossInterval:
    """Holds a median loss with the ends of its 95 % interval; None of a training that diverged."""

    median: float | None = field(default=None, metadata=SIGNED)
    low: float | None = field(default=None, metadata=SIGNED)
    high: float | None = field(default=None, metadata=SIGNED)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Holds the number of trained parameters, and bytes of a weight, a communicated value and a summed gradient."""

    numel: int | None = None
    weight_bytes: int | None = None
    comm_bytes: int | None = None
    accumulation_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Holds the versions of the packages that ran."""

    torch: str | None = None
    deepspeed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Holds what runs of the blocking schedule measured, where communication follows computation.

    Attributes:
        compute_s: C, the gradients of a step.
        round_s: R, a round with nothing beside it.
        micro_batch_s: C / n.
        samples_per_s_alone: what all ranks compute together where nothing communicates.
        failed: why there is none of it.
    """

    compute_s: float | None = field(default=None, metadata=ABOVE_ZERO)
    round_s: float | None = None
    micro_batch_s: float | None = None
    samples_per_s_alone: float | None = None
    failed: str | None = None

    @property
    def times(self) -> tuple[float, float] | None:
        """Returns (C, R); None where they were not measured."""
        return (self.compute_s, self.round_s) if self.compute_s and self.round_s is not None else None


@dataclass(frozen=True, kw_only=True)
class Point:
    """Holds a validation of a training, as a line of metrics.jsonl has it: examples/train_gpt.py writes such lines.

    Attributes:
        seconds: of training until then, without validations.
        loss: of training, the mean since the validation before.
    """

    step: int | None = None
    samples: float | None = None
    seconds: float | None = None
    val_loss: float | None = field(default=None, metadata=SIGNED)
    loss: float | None = field(default=None, metadata=SIGNED)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Holds one run of one configuration.

    Attributes:
        number: of the pass, from 1.
        folder: relative to the comparison's.
        timed_steps: of the ``steps`` those that the figures rest on.
        step_s: their median.
        batch: samples of every step, all ranks together; None with fixed windows, which have one size.
    """

    number: int | None = field(default=None, metadata={"key": "pass"})
    folder: str | None = None
    steps: int | None = None
    timed_steps: int | None = None
    step_s: float | None = None
    curve: list[Point] = field(default_factory=list)
    batch: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Splits a step's time into computation, what training stood waiting for communication, and the rest."""

    compute_s: float
    exposed_s: float = field(metadata=SIGNED)
    overhead_s: float = field(metadata=SIGNED)
    note: str | None = None

    @property
    def parts(self) -> tuple[float, float, float]:
        """Returns computation, exposed communication and overhead, in this order."""
        return self.compute_s, self.exposed_s, self.overhead_s


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Holds what was measured of one DeepSpeed JSON.

    Attributes:
        name: the JSON's stem.
        file: its path, as given.
        schedule: ACCO's, and likewise ``accumulation``, ``estimate_comm`` and ``commit_comm``; None with another
            optimizer.
        stage: of ZeRO.
        a: micro-batches of phase A; None where there is one phase.
        step_s: None when it failed.
        samples_per_step: of all ranks, in a median step.
        estimate_s: its own ESTIMATE. commit_s: its own round at a window's end.
        sent_bytes: of a rank in a median step; None where it was not counted.
        interface_bytes: that a host sends in a median step, headers and all; None where no interface was named.
        bound_s: the shortest step that its schedule can have; None without one, or without a reference.
        of_bound: step / bound.
        hidden_share: part of the rounds' time that cost training nothing.
        idle_share: part of the step in which nothing is computed.
        peak_bytes: of each rank.
        failed: why it has no figures.
    """

    name: str
    file: str | None = None
    optimizer: str | None = None
    schedule: str | None = None
    stage: int | None = None
    accumulation: str | None = None
    estimate_comm: str | None = None
    commit_comm: str | None = None
    a: int | None = None
    step_s: Interval | None = None
    samples_per_step: float | None = None
    samples_per_s: Interval | None = None
    estimate_s: float | None = None
    commit_s: float | None = None
    sent_bytes: float | None = None
    interface_bytes: float | None = None
    bound_s: float | None = None
    of_bound: float | None = None
    split: Split | None = None
    hidden_share: float | None = None
    idle_share: float | None = None
    peak_bytes: list[float | None] = field(default_factory=list)
    failed: str | None = None
    runs: list[Pass]
    final_val_loss: LossInterval | None = None

    @property
    def is_acco(self) -> bool:
        """Tells whether the configuration is one of ACCO's, and no stage of DeepSpeed's own."""
        return self.schedule is not None

    @property
    def row(self) -> Schedule | None:
        """Returns the row of SCHEDULES; None where that has none by this name."""
        return SCHEDULES.get(self.schedule or "")

    @property
    def is_adaptive(self) -> bool:
        """Tells whether steps differ in size, so that only times per sample can be compared with another's."""
        return is_adaptive(self.accumulation)

    @property
    def has_quantized_estimate(self) -> bool:
        """Tells whether the ESTIMATE is sent in fewer bits than its dtype has."""
        return self.estimate_comm not in (None, "full")

    @property
    def has_quantized_commit(self) -> bool:
        """Tells likewise of the COMMIT, of which R of the reference then says nothing."""
        return self.commit_comm not in (None, "full")

    @property
    def peaks(self) -> list[float]:
        """Returns the peak memory of the ranks that tell it."""
        return [peak for peak in self.peak_bytes if peak is not None]

    @property
    def last_val_loss(self) -> float | None:
        """Returns the median of the last validation loss over the passes."""
        return self.final_val_loss.median if self.final_val_loss else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Compares a configuration of ACCO with one of DeepSpeed's own, by the time that a sample takes."""

    config: str
    baseline: str
    speedup: Interval | None = None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Says what a configuration of ACCO saves beside one of DeepSpeed's own."""

    config: str
    baseline: str
    saved_share: float | None = field(default=None, metadata=SIGNED)
    saved_hours_per_1000_accelerator_hours: float | None = field(default=None, metadata=SIGNED)
    idle_share: float | None = None
    hidden_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Holds the whole of ``results.json``.

    Attributes:
        command: as it was typed.
        machine, network: in words.
        emulated_ms: of a micro-batch, where the accelerator was emulated.
        n: micro-batches of a step on one rank.
        samples_per_step: nominal, of all ranks together.
        verdict: sentences.
    """

    version: int = VERSION
    command: str
    date: str
    machine: str
    script: str
    arguments: list[str]
    network: str
    emulated_ms: float | None = None
    tokens_per_sample: float | None = None
    passes: int
    world_size: int | None = None
    device: str | None = None
    model: Model = Model()
    n: int | None = None
    samples_per_step: int | None = None
    versions: Versions = Versions()
    reference: Reference = Reference()
    configs: list[Configuration]
    ratios: list[Ratio]
    manager: list[Saving]
    verdict: list[str]

    @property
    def running(self) -> list[Configuration]:
        """Returns the configurations that did not fail."""
        return [config for config in self.configs if not config.failed]

    @property
    def measured(self) -> list[tuple[Configuration, Interval]]:
        """Returns the configurations that did not fail and have a step time, with it."""
        return [(config, config.step_s) for config in self.running if config.step_s]


def write_whole(path: Path, content: Any) -> None:
    """Writes all of a JSON file or nothing: a reader never sees a part."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def write_results(path: Path, results: Results) -> None:
    """Writes ``results.json``."""
    write_whole(path, written(results))


class _NewerVersion(ValueError):
    pass


def read_results(path: Path) -> Results:
    """Reads ``results.json``.

    Raises:
        ValueError: broken, unreadable, of a newer version, or something else; says what is wrong and what to do.
    """
    try:
        data = load(path)
        if not isinstance(data, dict):
            raise ValueError(f"it holds {shown(data)}; allowed: an object")
        _check_version(path, data)
        return read(Results, data)
    except _NewerVersion:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path} is no results.json that can be read: {error}. Give the file that `ds_acco compare` wrote, its "
            "folder, or the folder of one run; where it was damaged, run `ds_acco compare` again"
        ) from error


def _check_version(path: Path, data: Mapping[str, Any]) -> None:
    version = data.get("version")
    if type(version) is int and version > VERSION:
        raise _NewerVersion(
            f"{path} has version {version}; this deepspeed_acco reads version {VERSION}. "
            "Update it (pip install -U deepspeed_acco), or take the one that wrote the file"
        )
    if type(version) is not int or version != VERSION:
        raise ValueError(f"its version is {shown(version)}; allowed: {VERSION}")
