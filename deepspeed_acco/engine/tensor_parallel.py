# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the ranks that hold the parts of one model, and what several of them have alike."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.runtime.utils import is_model_parallel_parameter

from ..runtime.layout import GroupLayout
from .bound_parameters import BoundParameters


def model_group_of(optimizer):
    """Returns DeepSpeed's group over the ranks that hold the parts of this rank's model; None where each holds all.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, ours.
    """
    return optimizer.model_parallel_group if optimizer.model_parallel_world_size > 1 else None


def repeated_spans(optimizer, bound: BoundParameters, layouts: Sequence[GroupLayout]) -> list[list[slice]]:
    """Returns where in this rank's shard of each group lies what the first rank of the model has as well and counts in
    the norm: all that is not marked as a part of a larger tensor (deepspeed/runtime/utils.py,
    ``is_model_parallel_parameter``; Megatron and AutoTP mark those)."""
    if model_group_of(optimizer) is None or optimizer.model_parallel_rank == 0:
        return [[] for _ in layouts]
    return [
        _in_shard((bound.span_of(param)[1:] for param in params if not is_model_parallel_parameter(param)), layout)
        for params, layout in zip(optimizer.bit16_groups, layouts)
    ]


def _in_shard(spans, layout: GroupLayout) -> list[slice]:
    """Returns the parts of (first element, elements) that lie in the rank's shard, counted from its beginning; what
    touches is one."""
    own = layout.shard_of(layout.rank)
    found: list[slice] = []
    for first, numel in sorted(spans):
        start, stop = max(first, own.start) - own.start, min(first + numel, own.stop) - own.start
        if start >= stop:
            continue
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(slice(start, stop))
    return found
