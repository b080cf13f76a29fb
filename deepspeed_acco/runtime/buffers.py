# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds the flat buffers of one rank, allocated once for life (sizes: docs/explanation/design.md).

Per parameter group: the live weights P (DeepSpeed's own flat buffer), the gradient accumulator A, the communication
buffer X (gradients go out of it, weights come back into it) and the reduced gradient of this rank's shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..optim import ops
from ..optim.flat import pieces
from ..optim.quantization import are_finite, message_bytes, message_stride
from .layout import GroupLayout

_ALIGNMENT_BYTES = 16
_EXCHANGE_BYTES = 2**22


class FlatBuffers:
    """P, A, X and the reduced shards.

    Args:
        live: the flat live weights, one 1-D tensor per group, all of one dtype.
        layouts: how each group is sharded.
        accumulation_dtype, comm_dtype: dtypes of A and of the gradients in X.
        estimate_bits: an ESTIMATE's gradients and changes of weights lie in X as records of so many bits a value
            (optim/quantization.py); 0: as a COMMIT's.
    """

    def __init__(
        self,
        live: list[Tensor],
        layouts: list[GroupLayout],
        accumulation_dtype: torch.dtype,
        comm_dtype: torch.dtype,
        estimate_bits: int = 0,
    ):
        device = live[0].device
        self.live = [flat.detach() for flat in live]  # older DeepSpeed versions keep the graph of the flattening
        self.layouts = layouts
        self.grads = [torch.zeros(flat.numel(), dtype=accumulation_dtype, device=device) for flat in live]
        self.reduced = [torch.zeros(layout.shard_numel, dtype=torch.float32, device=device) for layout in layouts]
        self.estimate_bits = estimate_bits
        records = [_records_bytes(layout, estimate_bits) if estimate_bits else 0 for layout in layouts]
        self._comm, parts = _allocate_comm(live, comm_dtype, records)
        self.comm_grads = [part.view(comm_dtype)[: flat.numel()] for part, flat in zip(parts, live)]
        self.comm_weights = [part.view(flat.dtype)[: flat.numel()] for part, flat in zip(parts, live)]
        self.comm_records = [part[:count] for part, count in zip(parts, records)]
        self.comm_shards = self._own_shards(self.comm_weights)
        self.live_shards = self._own_shards(self.live)

    def _own_shards(self, whole: list[Tensor]) -> list[Tensor]:
        return [flat[slice(*layout.shard_range(layout.rank))] for flat, layout in zip(whole, self.layouts)]

    def pack(self, scale: float, *, clears: bool) -> None:
        """X <- A * scale in the communication dtype; then A <- 0 if ``clears``."""
        for grads, packed in zip(self.grads, self.comm_grads):
            ops.pack(grads, packed, scale, clears=clears)

    def pack_records(self, scale: float) -> None:
        """X <- A * scale as records, those of each rank's shard after those of the one before."""
        for layout, grads, records in zip(self.layouts, self.grads, self.comm_records):
            for rank in range(layout.world_size):
                message = self._message(records, layout, rank)
                ops.quantize(grads[slice(*layout.shard_range(rank))], message, self.estimate_bits, scale)

    def own_records(self) -> list[Tensor]:
        """This rank's part of the records in X."""
        return [self._message(records, layout, layout.rank) for layout, records in zip(self.layouts, self.comm_records)]

    def _message(self, records: Tensor, layout: GroupLayout, rank: int) -> Tensor:
        size = message_bytes(layout.shard_numel, self.estimate_bits)
        return records.narrow(0, rank * (records.numel() // layout.world_size), size)

    def clear_gradients(self) -> None:
        """A <- 0."""
        for grads in self.grads:
            grads.zero_()

    def install(self) -> None:
        """P <- X. A copy: parameters, their views and DeepSpeed's mappings keep pointing at P."""
        for live, gathered in zip(self.live, self.comm_weights):
            live.copy_(gathered)

    def install_change(self) -> None:
        """P <- P + the changes that X holds as records, the same bits on every rank; P stays where any of them is not
        finite."""
        bits = self.estimate_bits
        are_all_finite = [
            are_finite(records, layout.world_size, layout.shard_numel, bits)
            for layout, records in zip(self.layouts, self.comm_records)
        ]
        is_added = torch.stack(are_all_finite).all()
        for layout, live, records in zip(self.layouts, self.live, self.comm_records):
            for rank in range(layout.world_size):
                shard = live[slice(*layout.shard_range(rank))]
                ops.add_change(self._message(records, layout, rank), is_added, shard, bits)

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


def _records_bytes(layout: GroupLayout, bits: int) -> int:
    return layout.world_size * message_stride(layout.shard_numel, bits)


def _allocate_comm(live: list[Tensor], comm_dtype: torch.dtype, records: list[int]) -> tuple[Tensor, list[Tensor]]:
    """One flat byte buffer, and the part of it that each group has for gradients, weights or records in turn."""
    itemsize = max(comm_dtype.itemsize, live[0].element_size())
    # Records are smaller than 16-bit values, but for a tiny shard, whose scale weighs more.
    needed = [max(flat.numel() * itemsize, of_records) for flat, of_records in zip(live, records)]
    sizes = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in needed]
    comm = torch.zeros(sum(sizes), dtype=torch.uint8, device=live[0].device)
    return comm, list(comm.split(sizes))
