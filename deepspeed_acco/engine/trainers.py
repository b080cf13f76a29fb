# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Knows whether HF Trainer or Accelerate runs the loop, what they make of a value that is not known yet, and which
engines they build for something else than training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..runtime.driver import RoundDriver
from .json_checks import section_of

VARIABLE = "ACCELERATE_USE_DEEPSPEED"  # set by HF's TrainingArguments, by Accelerator and by `accelerate launch`


def is_running_loop() -> bool:
    """Tells whether one of them does."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on", "y", "t")


def norm_to_tell(driver: RoundDriver) -> Tensor | None:
    """Returns the gradient norm that the engine tells after a step: of the newest finished COMMIT.

    Before the first one there is none. The trainers log nothing then; a loop of the user's gets 0.0, since it may
    compute with what ZeRO-1 always knows.
    """
    is_known = driver.outcomes.last_commit is not None
    return driver.grad_norm if is_known or not is_running_loop() else None


def is_for_reference_model(raw: Mapping[str, Any]) -> bool:
    """Tells whether a JSON is the one that Accelerate trains with, but for ZeRO stage 0.

    TRL makes an engine of it for the model that it compares with and never trains (``trl.models.prepare_deepspeed``).
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.is_initialized():
        return False
    plugin = accelerate.AcceleratorState().deepspeed_plugin
    if plugin is None or section_of(raw, "zero_optimization").get("stage") != 0:
        return False
    trains = plugin.deepspeed_config
    zero = {**section_of(trains, "zero_optimization"), "stage": 0}
    return raw != trains and raw == {**trains, "zero_optimization": zero}
