# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds the flat buffers of one rank, allocated once for life (sizes: docs/explanation/design.md).

Per parameter group: the live weights P (DeepSpeed's own flat buffer), the gradient accumulator A, the communication
buffer X (gradients go out of it, weights come back into it) and the reduced gradient of this rank's shard. In X the
shards lie by their places in the levels (levels.py); packing and installing move them in their one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..optim import ops
from ..optim.flat import Shards
from ..optim.local_prediction import block_count
from ..optim.quantization import are_finite, message_bytes, message_stride
from . import devices
from .encoding import Encoding
from .layout import GroupLayout

_ALIGNMENT_BYTES = 16


class FlatBuffers:
    """Holds P, A, X and the reduced shards.

    Args:
        live: the flat live weights, one 1-D tensor per group, all of one dtype.
        layouts: how each group is sharded.
        accumulation_dtype, comm_dtype: dtypes of A and of the gradients in X.
        predicts_locally: the schedule ``local`` needs the true weights before the newest, in the order of X, and a root
            for each block of all shards (optim/local_prediction.py).
        estimate_bits: an ESTIMATE sends gradients and changes of weights between hosts as records of so many bits a
            value (optim/quantization.py); 0: as a COMMIT.

    Attributes:
        arenas: X's bytes, uint8, one 1-D tensor per group.
    """

    def __init__(
        self,
        live: list[Tensor],
        layouts: list[GroupLayout],
        accumulation_dtype: torch.dtype,
        comm_dtype: torch.dtype,
        estimate_bits: int = 0,
        predicts_locally: bool = False,
    ):
        device = live[0].device
        self.live = [flat.detach() for flat in live]  # older DeepSpeed versions keep the graph of the flattening
        self.layouts = layouts
        self.grads = [torch.zeros(flat.numel(), dtype=accumulation_dtype, device=device) for flat in live]
        self.reduced = [torch.zeros(layout.shard_numel, dtype=torch.float32, device=device) for layout in layouts]
        self.estimate_bits = estimate_bits
        records = [_records_bytes(layout, estimate_bits) if estimate_bits else 0 for layout in layouts]
        # Between two halves where collectives move whole messages: what leaves, and as much that arrives.
        halves = 2 if devices.uses_nccl(device) and layouts[0].levels.is_flat else 1
        self._comm, self.arenas = _allocate_comm(live, comm_dtype, [halves * count for count in records])
        self.comm_grads = [arena.view(comm_dtype)[: flat.numel()] for arena, flat in zip(self.arenas, live)]
        self.comm_weights = [arena.view(flat.dtype)[: flat.numel()] for arena, flat in zip(self.arenas, live)]
        self.comm_records = [arena[:count] for arena, count in zip(self.arenas, records)]
        self.comm_shards = [
            flat[layout.comm_shard_of(layout.rank)] for flat, layout in zip(self.comm_weights, self.layouts)
        ]
        self.live_shards = [flat[layout.shard_of(layout.rank)] for flat, layout in zip(self.live, self.layouts)]
        levels = layouts[0].levels
        self._shards = Shards.of([levels.place(rank) for rank in range(levels.world_size)], device)
        # From P to X and back; None: they have one order.
        self._to_comm = None if levels.is_flat else self._shards
        self._to_live = None if levels.is_flat else self._shards.inverse()
        self.before: list[Tensor] = []
        self.roots: list[Tensor] = []
        if predicts_locally:
            self.before = [torch.zeros_like(flat) for flat in self.live]
            counts = [layout.world_size * block_count(layout.shard_numel) for layout in layouts]
            self.roots = [torch.zeros(count, dtype=torch.float32, device=device) for count in counts]

    def encoding(self, bits: int) -> Encoding:
        """Returns how gradients travel that are sent in so many bits."""
        return Encoding(self.comm_grads[0].dtype, bits)

    def pack(self, scale: float, bits: int, *, clears: bool) -> None:
        """Writes A * scale to X, then zeroes A if ``clears``: in the communication dtype, or, where they go to other
        hosts as they are, as records of ``bits``."""
        for layout, grads, packed, records in zip(self.layouts, self.grads, self.comm_grads, self.comm_records):
            if bits and layout.levels.is_flat:
                assert not clears, "what lost bits is needed again"
                ops.quantize(grads, records, bits, scale, self._shards)
            else:
                ops.pack(grads, packed, scale, clears=clears, shards=self._to_comm)

    def own_records(self) -> list[Tensor]:
        """Returns this rank's part of the records in X, uint8, one 1-D view per group."""
        own = []
        for layout, records in zip(self.layouts, self.comm_records):
            begin = layout.levels.place(layout.rank) * (records.numel() // layout.world_size)
            own.append(records.narrow(0, begin, message_bytes(layout.shard_numel, self.estimate_bits)))
        return own

    def clear_gradients(self) -> None:
        """Zeroes A."""
        for grads in self.grads:
            grads.zero_()

    def install(self) -> None:
        """Copies the weights in X to P: parameters, their views and DeepSpeed's mappings keep pointing at P."""
        for live, gathered in zip(self.live, self.comm_weights):
            ops.copy_shards(gathered, live, self._to_live)

    def take_out(self) -> None:
        """Copies the weights in P to X."""
        for live, gathered in zip(self.live, self.comm_weights):
            ops.copy_shards(live, gathered, self._to_comm)

    def install_change(self) -> None:
        """Adds to P the changes that X holds as records, the same bits on every rank; nothing where any of them is not
        finite."""
        bits = self.estimate_bits
        are_all_finite = [
            are_finite(records, layout.world_size, layout.shard_numel, bits)
            for layout, records in zip(self.layouts, self.comm_records)
        ]
        is_added = torch.stack(are_all_finite).all()
        for live, records in zip(self.live, self.comm_records):
            ops.add_change(records, is_added, live, bits, self._shards)

    def true_copy(self, group: int, start: int, numel: int) -> Tensor:
        """Returns a copy of elements of X's weights, by their places in the flat group: 1-D."""
        layout, weights = self.layouts[group], self.comm_weights[group]
        parts = []
        for in_flat, in_comm in layout.runs():
            first, last = max(start, in_flat.start), min(start + numel, in_flat.stop)
            if first < last:
                offset = in_comm.start - in_flat.start
                parts.append(weights[first + offset : last + offset])
        return torch.cat(parts)

    def host_copies(self, of_shown: bool) -> list[Tensor]:
        """Returns copies in host memory of the weights that training has: those in X where P shows others."""
        copies = [torch.empty(flat.numel(), dtype=flat.dtype) for flat in self.live]
        if not of_shown:
            for copy, live in zip(copies, self.live):
                copy.copy_(live)
            return copies
        for copy, layout, weights in zip(copies, self.layouts, self.comm_weights):
            for in_flat, in_comm in layout.runs():
                copy[in_flat] = weights[in_comm]
        return copies

    def exchange(self) -> None:
        """Swaps P and X in place."""
        for live, gathered in zip(self.live, self.comm_weights):
            ops.swap_shards(live, gathered, self._to_comm)

    def own_bytes(self) -> int:
        """Returns the bytes of all but P: what this library adds to weights and optimizer state."""
        return sum(tensor.nbytes for tensor in self.tensors()) - sum(flat.nbytes for flat in self.live)

    def tensors(self) -> list[Tensor]:
        """Returns P, A, X, the reduced shards and what a local prediction needs, each once."""
        return [self._comm, *self.live, *self.grads, *self.reduced, *self.before, *self.roots]


def _records_bytes(layout: GroupLayout, bits: int) -> int:
    return layout.world_size * message_stride(layout.shard_numel, bits)


def _allocate_comm(live: list[Tensor], comm_dtype: torch.dtype, records: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Returns a flat byte buffer, and the part of it that each group has for gradients, weights or records in turn."""
    itemsize = max(comm_dtype.itemsize, live[0].element_size())
    # Records are smaller than 16-bit values, but for a tiny shard, whose scale weighs more.
    needed = [max(flat.numel() * itemsize, of_records) for flat, of_records in zip(live, records)]
    sizes = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in needed]
    comm = torch.zeros(sum(sizes), dtype=torch.uint8, device=live[0].device)
    return comm, list(comm.split(sizes))
