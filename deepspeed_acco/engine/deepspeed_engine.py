# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares what is used of DeepSpeed's engine (deepspeed/runtime/engine.py), and nothing else of it.

tests/engine/test_deepspeed_names.py checks that the installed DeepSpeed has all of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Engine(Protocol):
    """Declares the part of ``DeepSpeedEngine`` that this package calls, reads or sets."""

    # What is trained, and where.
    module: torch.nn.Module
    optimizer: Any  # the ZeRO wrapper
    basic_optimizer: Any  # what the JSON or the client named
    lr_scheduler: Any
    device: torch.device
    communication_data_type: torch.dtype
    checkpoint_engine: Any
    monitor: Any
    tput_timer: Any
    mpu: Any
    _config: Any

    # What was counted so far; adaptive windows and skipped steps set them.
    global_samples: int
    global_steps: int
    skipped_steps: int
    micro_steps: int

    # Ranks and what they train with.
    global_rank: int
    local_rank: int
    dp_world_size: int
    seq_dp_world_size: int
    mp_world_size: int
    has_moe_layers: bool
    pipeline_parallelism: bool
    inside_no_sync_ctxt: bool

    def gradient_accumulation_steps(self) -> int: ...
    def train_batch_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def zero_optimization_stage(self) -> int: ...
    def fp16_enabled(self) -> bool: ...
    def wall_clock_breakdown(self) -> bool: ...
    def optimizer_name(self) -> str | None: ...
    def optimizer_params(self) -> dict[str, Any] | None: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def step(self) -> None: ...
    def load_universal_checkpoint(self) -> bool: ...
    def use_node_local_storage(self) -> bool: ...
    def _get_ckpt_name(self, checkpoints_path: str, tag: str) -> str: ...
    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]: ...
    def _get_zero_param_shapes(self) -> list[dict[str, torch.Size]]: ...
    def _get_zero_ckpt_name(self, checkpoints_path: str, tag: str) -> str: ...
