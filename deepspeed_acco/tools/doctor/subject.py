# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says what the checks train and measure: by the user's DeepSpeed JSON, and by the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ...algorithm.schedules import SCHEDULES, Schedule
from ...engine.json_checks import AUTO, names_acco, section_of, truth_of
from ...runtime.communicator import Communicator
from ...settings import ACCO_KEYS, Settings
from ..check.reading import batch_of
from ..compare.configs import check, read_configs
from ..words import shown

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# So large that rounding does not hide what is compared; the JSON's own may be 1e-5, or a scheduler's.
LEARNING_RATE = 1e-2
_MOST_MICRO_BATCHES = 4
# Keys that only say how long windows and runs are.
_LEFT_OUT = ("lr", "lane", "comm_timeout_s", "accumulation", "max_window", "lr_follows", "overlap_warmup_steps")


@dataclass(frozen=True)
class Training:
    """Holds what of the user's JSON is trained with.

    Attributes:
        precision: fp32, bf16 or fp16.
        n: gradient_accumulation_steps, of which more than 4 show nothing more.
        params: ACCO's, without the learning rate and what says how long windows are.
    """

    precision: str
    n: int = _MOST_MICRO_BATCHES
    clip: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Returns that of the weights."""
        return PRECISIONS[self.precision]

    @property
    def settings(self) -> Settings:
        """Returns ACCO's settings, where the schedule is no more "auto"."""
        return Settings(**{key: self.params[key] for key in ACCO_KEYS if key in self.params}).of_window(self.n)

    @property
    def schedule(self) -> Schedule:
        """Returns the schedule's row."""
        return SCHEDULES[self.settings.schedule]


def training_of(path: Path | None, precision: str | None, device: torch.device, world_size: int) -> Training:
    """Returns what is trained.

    Args:
        path: of a DeepSpeed JSON with the optimizer ACCO; None: ACCO's defaults.
        precision: None: the JSON's; without one bf16 on CUDA, else fp32.

    Raises:
        ValueError: the JSON cannot be used.
    """
    training = _training_of(path, precision, "bf16" if device.type == "cuda" else "fp32", world_size)
    if training.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("precision fp16 is not allowed: DeepSpeed does not train in it on these devices")
    return training


def _training_of(path: Path | None, precision: str | None, default: str, world_size: int) -> Training:
    if path is None:
        return Training(precision or default)
    configs, files = read_configs([path])
    ((name, config),) = configs.items()
    check(files[name], config, world_size, is_filled=True)
    optimizer = section_of(config, "optimizer")
    if not names_acco(config):
        raise ValueError(f'CONFIG {path}: optimizer.type is {shown(optimizer.get("type"))}; allowed: "ACCO"')
    given = {key: value for key, value in section_of(optimizer, "params").items() if value != AUTO}
    _, n = batch_of(config, world_size)
    clip = config.get("gradient_clipping", 0.0)
    return Training(
        precision or _precision_of(config),
        _MOST_MICRO_BATCHES if n == AUTO else min(n, _MOST_MICRO_BATCHES),
        1.0 if clip == AUTO else float(clip),
        {key: value for key, value in given.items() if key not in _LEFT_OUT},
    )


def _precision_of(config: Mapping[str, Any]) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        if truth_of(section_of(config, name).get("enabled")):
            return name.replace("bfloat", "bf")
    return "fp32"


@dataclass(frozen=True)
class Subject:
    """Holds what every check is given.

    Attributes:
        numel: parameters whose rounds are measured; None: as many as take about a third of a second.
        timeout_s: how long a collective of a check waits for a rank.
        control: the ranks' own channel, on which nothing but findings and figures are exchanged.
    """

    training: Training
    device: torch.device
    numel: int | None
    timeout_s: float
    control: Communicator

    def slowest(self, seconds: float) -> float:
        """Returns the longest time of all ranks; every rank must call it."""
        return max(self.control.gather_objects(seconds))
