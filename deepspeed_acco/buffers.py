# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The flat buffers of one rank, allocated once for life (sizes: README, "Memory").

Per parameter group: the live weights P (DeepSpeed's own flat buffer), the gradient accumulator A, the communication
buffer X (gradients go out of it, weights come back into it) and the reduced gradient of this rank's shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .layout import GroupLayout, pieces

_ALIGNMENT_BYTES = 16
_EXCHANGE_BYTES = 2**22


class FlatBuffers:
    """P, A, X and the reduced shards.

    Args:
        live: the flat live weights, one 1-D tensor per group, all of one dtype.
        layouts: how each group is sharded.
        accumulation_dtype, comm_dtype: dtypes of A and of the gradients in X.
    """

    def __init__(
        self,
        live: list[Tensor],
        layouts: list[GroupLayout],
        accumulation_dtype: torch.dtype,
        comm_dtype: torch.dtype,
    ):
        device = live[0].device
        self.live = [flat.detach() for flat in live]  # older DeepSpeed versions keep the graph of the flattening
        self.layouts = layouts
        self.grads = [torch.zeros(flat.numel(), dtype=accumulation_dtype, device=device) for flat in live]
        self.reduced = [torch.zeros(layout.shard_numel, dtype=torch.float32, device=device) for layout in layouts]
        self._comm, views = _allocate_comm(live, comm_dtype)
        self.comm_grads = [gradients for gradients, _ in views]
        self.comm_weights = [weights for _, weights in views]
        self.comm_shards = self._own_shards(self.comm_weights)
        self.live_shards = self._own_shards(self.live)

    def _own_shards(self, whole: list[Tensor]) -> list[Tensor]:
        return [flat[slice(*layout.shard_range(layout.rank))] for flat, layout in zip(whole, self.layouts)]

    def pack(self, scale: float, *, clears: bool) -> None:
        """X <- A * scale in the communication dtype; then A <- 0 if ``clears``."""
        for grads, packed in zip(self.grads, self.comm_grads):
            ops.pack(grads, packed, scale, clears=clears)

    def clear_gradients(self) -> None:
        """A <- 0."""
        for grads in self.grads:
            grads.zero_()

    def install(self) -> None:
        """P <- X. A copy: parameters, their views and DeepSpeed's mappings keep pointing at P."""
        for live, gathered in zip(self.live, self.comm_weights):
            live.copy_(gathered)

    def exchange(self) -> None:
        """Swaps P and X in place, piece by piece."""
        for live, gathered in zip(self.live, self.comm_weights):
            for start, length in pieces(live.numel(), _EXCHANGE_BYTES // live.element_size()):
                at = slice(start, start + length)
                kept = live[at].clone()
                live[at] = gathered[at]
                gathered[at] = kept

    def own_bytes(self) -> int:
        """Bytes of A, X and the reduced shards: what this library adds to weights and optimizer state."""
        return sum(tensor.nbytes for tensor in (self._comm, *self.grads, *self.reduced))

    def tensors(self) -> list[Tensor]:
        """P, A, X and the reduced shards, each once."""
        return [self._comm, *self.live, *self.grads, *self.reduced]


def _allocate_comm(live: list[Tensor], comm_dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One flat byte buffer, and for each group its view as gradients and its view as weights, on the same bytes."""
    weight_dtype = live[0].dtype
    itemsize = max(comm_dtype.itemsize, weight_dtype.itemsize)
    sizes = [-(-flat.numel() * itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for flat in live]
    comm = torch.zeros(sum(sizes), dtype=torch.uint8, device=live[0].device)
    views, offset = [], 0
    for flat, size in zip(live, sizes):
        part = comm[offset : offset + size]
        views.append((part.view(comm_dtype)[: flat.numel()], part.view(weight_dtype)[: flat.numel()]))
        offset += size
    return comm, views
