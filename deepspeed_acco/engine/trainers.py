# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Knows whether HF Trainer or Accelerate runs the loop, and what they make of a value that is not known yet."""

from __future__ import annotations

import os

from torch import Tensor

from ..runtime.driver import RoundDriver

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
