# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Asks DeepSpeed itself what it has against a JSON: some seconds, in which it and PyTorch are imported."""

from __future__ import annotations

import copy
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .problems import BATCH_KEYS

_LONGEST = 300  # letters of what DeepSpeed says


def problems_by_deepspeed(config: Mapping[str, Any], micro: int, n: int) -> Iterator[str]:
    """Yields what DeepSpeed refuses, if anything: the first that it meets."""
    # It would look for ranks, which there are not yet; that the batch is that of so many was checked before.
    alone = {key: value for key, value in config.items() if key not in BATCH_KEYS}
    alone |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": n}
    with _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(copy.deepcopy(alone))
        except Exception as cause:  # whatever its parts make of it
            said = textwrap.shorten(f"{type(cause).__name__}: {cause}", _LONGEST)
            yield f"DeepSpeed refuses it: {said}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what DeepSpeed logs on the way: the runs log it again."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
