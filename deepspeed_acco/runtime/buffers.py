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

from ..algorithm.wire import Bits, Wire
from ..optim import ops
from ..optim.flat import Shards
from ..optim.local_prediction import block_count
from ..optim.quantization import BLOCK, are_finite, message_bytes, message_stride, record_bytes
from . import devices
from .encoding import Encoding
from .layout import GroupLayout

_ALIGNMENT_BYTES = 16
_ALL_IN_FULL = Wire()


class FlatBuffers:
    """Holds P, A, X and the reduced shards.

    Args:
        live: the flat live weights, one 1-D tensor per group, all of one dtype.
        layouts: how each group is sharded.
        accumulation_dtype, comm_dtype: dtypes of A and of the gradients in X.
        wire: the bits of what is sent, in records (optim/quantization.py). X is as large as the largest of it.
        predicts_locally: the schedule ``local`` needs a root for each block of all shards (optim/local_prediction.py),
            and the true weights before the newest, in the order of X; in that of P where changes arrive.

    Attributes:
        arenas: X's bytes, uint8, one 1-D tensor per group.
        held: where a COMMIT brings changes, what every rank holds of this rank's shard, to which the next one is
            added: of P, or of the true weights where each rank has its own P. 1-D, one per group; else empty.
    """

    def __init__(
        self,
        live: list[Tensor],
        layouts: list[GroupLayout],
        accumulation_dtype: torch.dtype,
        comm_dtype: torch.dtype,
        wire: Wire = _ALL_IN_FULL,
        predicts_locally: bool = False,
    ):
        device = live[0].device
        self.wire = wire
        self.live = [flat.detach() for flat in live]  # older DeepSpeed versions keep the graph of the flattening
        self.layouts = layouts
        self.grads = [torch.zeros(flat.numel(), dtype=accumulation_dtype, device=device) for flat in live]
        self.reduced = [torch.zeros(layout.shard_numel, dtype=torch.float32, device=device) for layout in layouts]
        self._comm_dtype = comm_dtype
        self._comm, self.arenas = self._allocate_comm()
        self.live_shards = [flat[layout.shard_of(layout.rank)] for flat, layout in zip(self.live, self.layouts)]
        self.held = [shard.clone() for shard in self.live_shards] if wire.commit.change else []
        self._always = torch.ones((), dtype=torch.bool, device=device)
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

    def _allocate_comm(self) -> tuple[Tensor, list[Tensor]]:
        """Returns a flat byte buffer, and the part of it that each group has for gradients, weights or records in
        turn."""
        itemsize, levels = max(self._comm_dtype.itemsize, self.live[0].element_size()), self.layouts[0].levels
        # Where collectives move whole messages, as much arrives beside what leaves.
        halves = 2 if devices.uses_nccl(self.live[0].device) and levels.is_flat and not self.wire.commit else 1
        sizes = []
        for layout in self.layouts:
            needed = [0]
            for bits in self.wire.rounds():
                first = self._first_bits(bits)
                needed.append(halves * _records_bytes(layout, first) if first else layout.padded_numel * itemsize)
                needed.append(_records_bytes(layout, bits.change) if bits else layout.padded_numel * itemsize)
            sizes.append(-(-max(needed) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        comm = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.live[0].device)
        return comm, list(comm.split(sizes))

    def _first_bits(self, bits: Bits) -> int:
        """Returns the bits of a gradient where it leaves X first, to another host or inside this one; 0: in full."""
        return bits.gradient if self.layouts[0].levels.is_flat or not bits else self.wire.inner_gradient

    def _as_values(self, dtype: torch.dtype) -> list[Tensor]:
        sizes = [layout.padded_numel * dtype.itemsize for layout in self.layouts]
        assert all(arena.numel() >= size for arena, size in zip(self.arenas, sizes)), "X holds records alone"
        return [arena[:size].view(dtype) for arena, size in zip(self.arenas, sizes)]

    @property
    def comm_weights(self) -> list[Tensor]:
        """Returns X as weights in their dtype, 1-D, one view per group."""
        return self._as_values(self.live[0].dtype)

    @property
    def comm_shards(self) -> list[Tensor]:
        """Returns this rank's parts of :attr:`comm_weights`."""
        return [flat[layout.comm_shard_of(layout.rank)] for flat, layout in zip(self.comm_weights, self.layouts)]

    def gathered(self, bits: Bits) -> list[Tensor]:
        """Returns what a round of these bits gathers in X: weights, or the records of their changes."""
        return self.comm_records(bits.change) if bits.change else self.comm_weights

    def comm_records(self, bits: int) -> list[Tensor]:
        """Returns X as records of all shards with so many bits a value, uint8, 1-D, one view per group."""
        return [arena[: _records_bytes(layout, bits)] for arena, layout in zip(self.arenas, self.layouts)]

    def own_records(self, bits: int, arenas: list[Tensor] | None = None) -> list[Tensor]:
        """Returns this rank's parts of :meth:`comm_records`, or of copies of X."""
        own = []
        for layout, arena in zip(self.layouts, self.arenas if arenas is None else arenas):
            begin = layout.levels.place(layout.rank) * message_stride(layout.shard_numel, bits)
            own.append(arena.narrow(0, begin, message_bytes(layout.shard_numel, bits)))
        return own

    def encoding(self, bits: Bits) -> Encoding:
        """Returns how gradients travel in rounds of these bits."""
        return Encoding(self._comm_dtype, bits.gradient, self.wire.inner_gradient if bits else 0)

    def pack(self, scale: float, bits: Bits, *, clears: bool) -> None:
        """Writes A * scale to X, then zeroes A if ``clears``: in the communication dtype, or as records where they
        leave so."""
        first = self._first_bits(bits)
        if not first:
            for grads, packed in zip(self.grads, self._as_values(self._comm_dtype)):
                ops.pack(grads, packed, scale, clears=clears, shards=self._to_comm)
            return
        for grads, records in zip(self.grads, self.comm_records(first)):
            ops.quantize(grads, records, first, scale, self._shards)
        if clears:
            self.clear_gradients()

    def clear_gradients(self) -> None:
        """Zeroes A."""
        for grads in self.grads:
            grads.zero_()

    def install(self) -> None:
        """Copies the weights in X to P: parameters, their views and DeepSpeed's mappings keep pointing at P."""
        for live, gathered in zip(self.live, self.comm_weights):
            ops.copy_shards(gathered, live, self._to_live)

    def take_true(self) -> None:
        """Copies the true weights beside P, where changes arrive, to P."""
        for live, before in zip(self.live, self.before):
            live.copy_(before)

    def take_out(self) -> None:
        """Copies the weights in P to X."""
        for live, gathered in zip(self.live, self.comm_weights):
            ops.copy_shards(live, gathered, self._to_comm)

    def add_estimate(self) -> None:
        """Adds to P the ESTIMATE's change, which X holds as records, the same bits on every rank; nothing where any of
        them is not finite."""
        assert self.wire.estimate is not None, "the schedule has ESTIMATEs"
        bits = self.wire.estimate.change
        are_all_finite = [
            are_finite(records, layout.world_size, layout.shard_numel, bits)
            for layout, records in zip(self.layouts, self.comm_records(bits))
        ]
        self._add(self.live, bits, torch.stack(are_all_finite).all())

    def add_commit(self, to: list[Tensor]) -> None:
        """Adds the COMMIT's change, which X holds as records, to weights in the order of P. Master weights that are not
        finite come out as such."""
        self._add(to, self.wire.commit.change, self._always)

    def _add(self, to: list[Tensor], bits: int, is_added: Tensor) -> None:
        for weights, records in zip(to, self.comm_records(bits)):
            ops.add_change(records, is_added, weights, bits, self._shards)

    def hold(self, weights: list[Tensor]) -> None:
        """Takes this rank's shards of these weights, in the order of P, for what every rank holds."""
        for held, flat, layout in zip(self.held, weights, self.layouts):
            held.copy_(flat[layout.shard_of(layout.rank)])

    def changed_copy(self, group: int, start: int, numel: int) -> Tensor:
        """Returns a copy of elements of what every rank holds with the COMMIT's change, which X holds, added to it.

        Args:
            start, numel: of the flat group.
        """
        bits, layout = self.wire.commit.change, self.layouts[group]
        records, shard_numel = self.comm_records(bits)[group], layout.shard_numel
        weights, parts = (self.before or self.live)[group], []
        for rank in range(start // shard_numel, -(-(start + numel) // shard_numel)):
            shard = layout.shard_of(rank)
            first, last = max(start, shard.start), min(start + numel, shard.stop)
            begin = first - (first - shard.start) % BLOCK  # a change is added to whole blocks
            end = min(shard.stop, last + (shard.start - last) % BLOCK)
            part = weights[begin:end].clone()
            message = records[layout.levels.place(rank) * message_stride(shard_numel, bits) :]
            offset = (begin - shard.start) // BLOCK * record_bytes(bits)
            ops.add_change(message[offset : offset + message_bytes(end - begin, bits)], self._always, part, bits)
            parts.append(part[first - begin : last - begin])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
        if not of_shown:
            return [live.to("cpu", copy=True) for live in self.live]
        copies = [torch.empty(flat.numel(), dtype=flat.dtype) for flat in self.live]
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
        """Returns P, A, X, the reduced shards, those held and what a local prediction needs, each once."""
        return [self._comm, *self.live, *self.grads, *self.reduced, *self.held, *self.before, *self.roots]


def _records_bytes(layout: GroupLayout, bits: int) -> int:
    return layout.world_size * message_stride(layout.shard_numel, bits)
