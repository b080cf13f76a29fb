# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Where ACCO's few lines go."""

from __future__ import annotations

import logging

from deepspeed.utils.logging import LoggerFactory


def logger() -> logging.Logger:
    """DeepSpeed's own logger hides what is not a warning; this one has its form and shows them."""
    name = "deepspeed_acco"
    if not logging.getLogger(name).handlers:
        LoggerFactory.create_logger(name, level=logging.INFO)
    return logging.getLogger(name)
