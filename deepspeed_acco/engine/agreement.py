# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Compares over the ranks, at the start, everything that changes arithmetic or order. A difference would
otherwise train wrong without a word, or hang in the middle of training."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch

from ..optim import native
from ..runtime.communicator import Communicator
from .deepspeed_engine import Engine

_SHOWN = 300  # letters of a value in the error
_OF_PART = "parameters of group"


def require_agreement(comm: Communicator, values: Mapping[str, Any]) -> None:
    """Raises RuntimeError on every rank unless all ranks pass the same values; every rank must call it. The ranks that
    hold the parts of one model may differ in what only describes a part.

    Args:
        values: name: whatever has a ``repr`` that says all of it. Its hash is compared, so it may be long.
    """
    _require_same(comm.gather_objects, values, "data-parallel ranks")
    of_whole = {name: value for name, value in values.items() if not name.startswith(_OF_PART)}
    _require_same(comm.gather_from_parts, of_whole, "ranks with the parts of one model")


def _require_same(gather: Callable[[Any], list], values: Mapping[str, Any], ranks_in_words: str) -> None:
    digests = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in values.items()}
    of_ranks = gather(digests)
    # Of all ranks, so that all go on alike: one may have a parameter group more.
    names = dict.fromkeys(itertools.chain(*of_ranks))
    different = [name for name in names if any(theirs.get(name) != of_ranks[0].get(name) for theirs in of_ranks)]
    if not different:
        return
    texts = gather({name: _shortened(values[name]) for name in different if name in values})
    lines = []
    for name in different:
        ranks_with: dict[str, list[int]] = {}
        for rank, theirs in enumerate(texts):
            ranks_with.setdefault(theirs.get(name, "none"), []).append(rank)
        told = "; ".join(f"{text} on ranks {', '.join(map(str, ranks))}" for text, ranks in ranks_with.items())
        lines.append(f"{name}: {told}")
    raise RuntimeError(
        f"ACCO: the {ranks_in_words} differ, so they would not train the same model:\n  "
        + "\n  ".join(lines)
        + "\nStart every rank with the same model, configuration, versions and kernels"
    )


def _shortened(value: Any) -> str:
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[:_SHOWN]}... ({len(text)} letters, hash {digest})"


def what_must_agree(engine: Engine, wrapper) -> dict[str, Any]:
    """Returns what must be the same on all ranks, by name: as the JSON calls it where it stands there.

    Args:
        wrapper: DeepSpeed's ZeRO optimizer, ours.
    """
    raw = getattr(engine._config, "_param_dict", {})
    zero = raw.get("zero_optimization")
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups: dict[str, Any] = {}
    for number, (group, parameters) in enumerate(zip(wrapper.param_groups, wrapper.bit16_groups)):
        groups[f"parameter group {number}"] = {key: value for key, value in group.items() if key != "params"}
        # In the order of the flat group, which round_robin_gradients changes.
        groups[f"{_OF_PART} {number}"] = [
            (names.get(id(parameter), "?"), tuple(parameter.shape)) for parameter in parameters
        ]
    return {
        "optimizer.params": wrapper.settings,
        "levels": str(wrapper.levels),
        **groups,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": wrapper.clip_grad,
        "prescale_gradients": not wrapper.postscale_gradients,
        "gradient_predivide_factor": wrapper.gradient_predivide_factor,
        "round_robin_gradients": zero.get("round_robin_gradients", False) if isinstance(zero, dict) else None,
        "scheduler": raw.get("scheduler"),
        "precision": str(wrapper.dtype),
        "grad_accum_dtype": str(wrapper.gradient_accumulation_dtype),
        "communication_data_type": str(wrapper.communication_data_type),
        "loss scale": getattr(wrapper, "cur_scale", None) or wrapper.loss_scale,
        "monitor": wrapper.driver.measures_estimate,
        "kernels": native.kernels_name(engine.device),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "deepspeed_acco": _own_version()},
    }


def _own_version() -> str:
    return sys.modules[__package__.partition(".")[0]].__version__  # whose import has imported this one
