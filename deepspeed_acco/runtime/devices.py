# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says what the runtime must know of a type of device, in one place. The tests of the streams' order answer otherwise
(tests/streams), so ask by ``devices.has_streams(device)`` and not by a name of your own."""

from __future__ import annotations

import torch


def has_streams(device: torch.device) -> bool:
    """Tells whether work on the device is enqueued on streams while the host goes on."""
    return device.type == "cuda"


def uses_nccl(device: torch.device) -> bool:
    """Tells whether NCCL moves the rounds; else gloo does."""
    return device.type == "cuda"
