# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says which keys of a DeepSpeed JSON HF Trainer knows under names of its own, and fills where they are "auto"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from ...engine.json_checks import AUTO, refusal
from ...settings import ACCO_KEYS

# The arguments of TrainingArguments (transformers/integrations/deepspeed.py), as its command line spells them.
ARGUMENTS = {
    "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size",),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps",),
    "gradient_clipping": ("--max_grad_norm",),
    "optimizer.params.lr": ("--learning_rate",),
    "optimizer.params.betas": ("--adam_beta1", "--adam_beta2"),
    "optimizer.params.eps": ("--adam_epsilon",),
    "optimizer.params.weight_decay": ("--weight_decay",),
    "scheduler.params.warmup_max_lr": ("--learning_rate",),
    "scheduler.params.warmup_num_steps": ("--warmup_steps",),
    "fp16.enabled": ("--fp16",),
    "bf16.enabled": ("--bf16",),
}
# It computes these, or Accelerate below it does.
COMPUTED = (
    "train_batch_size",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.total_num_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
)


class FilledBy(Enum):
    """Says who writes values in the place of "auto"."""

    NOBODY = "nobody"
    HF = "HF Trainer"
    A_SCRIPT = "a script that is not known"


def arguments_in(problem: str) -> list[str]:
    """Returns the arguments of HF Trainer that set the keys which a problem names."""
    named = {key for key in ARGUMENTS if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem)}
    return list(dict.fromkeys(argument for key in ARGUMENTS if key in named for argument in ARGUMENTS[key]))


def autos_of(config: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yields the places, levels joined by dots, at which an object has the value "auto"."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from autos_of(value, f"{place}{key}.")
        elif value == AUTO:
            yield place + key


def problems_with_trainer(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields each "auto" that HF Trainer does not fill, of which Accelerate makes an error."""
    for place in autos_of(config):
        if place in ARGUMENTS or place in COMPUTED:
            continue
        fix = "Write one"
        if place.removeprefix("optimizer.params.") in ACCO_KEYS:
            fix = 'Write "measured"' if place.endswith(".estimate_fraction") else 'Leave it out, which means "auto"'
        yield refusal(place, AUTO, "a value: HF Trainer takes every auto for its own, and has none for this key", fix)


def without_filled(config: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Returns the JSON without the values "auto" that HF Trainer fills."""
    left = {}
    for key, value in config.items():
        if isinstance(value, dict):
            left[key] = without_filled(value, f"{place}{key}.")
        elif not (value == AUTO and (place + key in ARGUMENTS or place + key in COMPUTED)):
            left[key] = value
    return left
