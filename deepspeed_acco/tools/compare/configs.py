# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the DeepSpeed JSONs of a comparison, and refuses what cannot be trained with, or would not train the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...algorithm.schedules import BLOCKING, SCHEDULES
from ...engine.json_checks import AUTO, PRECISIONS, names_acco, refusal, section_of, truth_of
from ...settings import ACCO_KEYS, ADAMW_KEYS, Settings
from ..check.by_deepspeed import problems_by_deepspeed
from ..check.problems import checked
from ..check.reading import batch_of, read_config
from ..check.trainers import FilledBy, autos_of
from ..words import shown

REFERENCE = "reference"  # the runs of schedule sync that C and R come from
REFERENCE_KEYS = ("lane", "comm_timeout_s")  # ACCO's keys that it takes over


# ---- reading


def read_configs(paths: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the contents and the path of each JSON, by its stem.

    Raises:
        ValueError: no file, no JSON as DeepSpeed reads it, or a name that cannot be one; names the file.
    """
    configs: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for path in paths:
        name = path.stem
        config = read_config(path)
        if not name.isprintable() or name in (".", ".."):
            raise ValueError(f"CONFIG {path} has the name {shown(name)}; allowed: what can be printed. Rename it")
        if name in configs or name == REFERENCE:
            other = files.get(name, "the reference")
            raise ValueError(f"CONFIG {path} and {other} have the same name, {name!r}. Rename one of them")
        configs[name], files[name] = config, str(path)
    return configs, files


# ---- what is allowed


def check(file: str, config: Mapping[str, Any], world_size: int, is_filled: bool) -> None:
    """Raises ValueError for what the ranks would refuse when they start, or what cannot be compared: names the file,
    the key, its value, and what is allowed.

    Args:
        is_filled: whether the script may write values in the place of every ``auto``.
    """
    found = list(_problems(config, world_size, is_filled))
    if found:
        others = f" (and {len(found) - 1} more: ds_acco check {file})" if len(found) > 1 else ""
        raise ValueError(f"CONFIG {file}: {found[0]}{others}")


def _problems(config: Mapping[str, Any], world_size: int, is_filled: bool) -> Iterator[str]:
    found = checked(config, FilledBy.A_SCRIPT if is_filled else FilledBy.NOBODY, world_size)
    yield from found.problems
    if found.problems:
        return
    name = section_of(config, "optimizer").get("type")
    if "optimizer" in config and not (isinstance(name, str) and name.strip() == name != ""):
        yield refusal("optimizer.type", name, '"ACCO", or the name of another optimizer', "Write it so")
    own = {f"optimizer.params.{key}" for key in ACCO_KEYS} if names_acco(config) else set()
    autos = [place for place in autos_of(config) if place not in own]
    if autos and not is_filled:
        yield (
            f'{autos[0]} is "auto", which HF Trainer and Accelerate fill in, and this script does not; allowed: '
            "a value. Write it, or give the --script of a trainer"
        )
    if not autos:
        yield from problems_by_deepspeed(config, *batch_of(config, world_size))


# ---- what they say


def _precision_of(config: Mapping[str, Any]) -> str:
    for name, keys in PRECISIONS.items():
        for key in keys:
            enabled = section_of(config, key).get("enabled", False)
            if enabled == AUTO or truth_of(enabled):
                return f"{name} {AUTO}" if enabled == AUTO else name
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
    """Tells whether a JSON's runs measure C and R: its schedule overlaps nothing, and its rounds are in full."""
    params = section_of(section_of(config, "optimizer"), "params")
    row = SCHEDULES.get(str(params.get("schedule", AUTO)))
    is_in_full = params.get("commit_comm", Settings.commit_comm) == Settings.commit_comm
    return names_acco(config) and row is not None and row.blocks and is_in_full


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
    params = section_of(derived["optimizer"], "params")
    # ACCO's other keys are of no meaning without overlap, or refused there.
    params = {key: params[key] for key in (*ADAMW_KEYS, *REFERENCE_KEYS) if key in params}
    if not names_acco(derived):
        derived["zero_optimization"] = {"stage": 1}
    derived["optimizer"] = {"type": "ACCO", "params": {**params, "schedule": BLOCKING.name}}
    return derived
