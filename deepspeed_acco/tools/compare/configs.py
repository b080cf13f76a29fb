# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the DeepSpeed JSONs of a comparison, and refuses those that would not train the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...algorithm.schedules import BLOCKING, DEFAULT, SCHEDULES
from ...settings import ADAMW_KEYS

REFERENCE = "reference"  # the runs of schedule sync that C and R come from
REFERENCE_KEYS = ("lane", "comm_timeout_s")  # ACCO's keys that it takes over


def read_configs(paths: Sequence[Path]):
    configs: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"CONFIG {path} is not a file; give the path of a DeepSpeed JSON")
        if path.stem in configs or path.stem == REFERENCE:
            other = files.get(path.stem, "the reference")
            raise ValueError(f"CONFIG {path} and {other} have the same name, {path.stem!r}. Rename one of them")
        try:
            config = json.loads(path.read_text())
        except ValueError as cause:
            raise ValueError(f"CONFIG {path} is not JSON: {cause}") from cause
        if not isinstance(config, dict):
            raise ValueError(f"CONFIG {path} is not a DeepSpeed JSON: it holds no object")
        configs[path.stem], files[path.stem] = config, str(path)
    return configs, files


def batch_of(config: Mapping[str, Any], world_size: int) -> tuple[Any, Any]:
    """Returns (micro-batch, n) of a DeepSpeed JSON, by DeepSpeed's rules; "auto" stays."""
    whole = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    n = config.get("gradient_accumulation_steps")
    if "auto" in (whole, micro, n):
        return micro, n
    if micro is None and whole is not None:
        micro = whole // (world_size * (n or 1))
    if n is None:
        n = whole // (world_size * micro) if whole is not None and micro else 1
    return micro, n


def _precision_of(config: Mapping[str, Any]) -> str:
    for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        for key in keys:
            enabled = config.get(key, {}).get("enabled", False)
            if enabled:
                return name if enabled is True else f"{name} {enabled}"
    return "fp32"


def require_alike(configs: Mapping[str, Mapping[str, Any]], world_size: int) -> None:
    """Raises ValueError unless all train the same batch in the same precision with the same clipping."""
    described = {}
    for name, config in configs.items():
        micro, n = batch_of(config, world_size)
        described[name] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": n,
            "precision (bf16, fp16)": _precision_of(config),
            "gradient_clipping": config.get("gradient_clipping", 0.0),
        }
    first, *others = described
    for other in others:
        for key, value in described[first].items():
            if described[other][key] != value:
                raise ValueError(
                    f"{key} is {value!r} in {first} and {described[other][key]!r} in {other}: they would not train "
                    "the same. Set it alike in all CONFIGs"
                )


def measures_reference(config: Mapping[str, Any]) -> bool:
    """Tells whether a JSON's runs measure C and R: its schedule overlaps nothing."""
    optimizer = config.get("optimizer", {})
    row = SCHEDULES.get(str(optimizer.get("params", {}).get("schedule", DEFAULT.name)))
    return optimizer.get("type") == "ACCO" and row is not None and row.blocks


def reference_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of the same training by ACCO's schedule ``sync``, where nothing communicates outside the step.

    Raises:
        ValueError: without an optimizer in the JSON.
    """
    if "optimizer" not in config:
        raise ValueError(
            f"CONFIG {name} has no optimizer, and the reference (ACCO's schedule sync) is derived from the first "
            "CONFIG. Give another one first"
        )
    derived = copy.deepcopy(dict(config))
    params = derived["optimizer"].get("params", {})
    # ACCO's other keys are of no meaning without overlap, or refused there.
    params = {key: params[key] for key in (*ADAMW_KEYS, *REFERENCE_KEYS) if key in params}
    if derived["optimizer"].get("type") != "ACCO":
        derived["zero_optimization"] = {"stage": 1}
    derived["optimizer"] = {"type": "ACCO", "params": {**params, "schedule": BLOCKING.name}}
    return derived
