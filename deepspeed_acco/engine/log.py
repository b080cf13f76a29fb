# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes ACCO's few lines where DeepSpeed's go."""

from __future__ import annotations

import logging
import math

from deepspeed.utils.logging import LoggerFactory


def logger() -> logging.Logger:
    """Returns a logger of the form of DeepSpeed's own, which hides what is not a warning; this one shows it."""
    name = "deepspeed_acco"
    if not logging.getLogger(name).handlers:
        LoggerFactory.create_logger(name, level=logging.INFO)
    return logging.getLogger(name)


def describe_bytes(count: int) -> str:
    """Returns ``12.3 MB``: decimal units."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) // 3), 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"
