# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lets a rank train at what it alone predicts of the running COMMIT (schedule ``local``; optim/local_prediction.py has
the arithmetic)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..optim import ops
from ..optim.adamw import AdamWHyper, AdamWShard
from ..optim.flat import pieces
from ..optim.local_prediction import SMALLEST_ROOT, Operands, block_count, kept_part
from .buffers import FlatBuffers
from .communicator import Communicator
from .round_inputs import RoundInputs
from .states import ResumeState

PIECE_NUMEL = 2**24  # whole blocks; so many of the changed weights are there at once, beside the buffers


class LocalPrediction:
    """Keeps the roots of all shards, and writes predictions into the live weights.

    Args:
        buffers: with room for the weights before the newest and for roots.

    Attributes:
        forgets_step: the next commit also brings what somebody else wrote, which is no step to repeat.
    """

    def __init__(self, buffers: FlatBuffers, shards: list[AdamWShard], comm: Communicator):
        self._buffers = buffers
        self._shards = shards
        self._comm = comm
        self.forgets_step = False

    def own_roots(self) -> list[Tensor]:
        """Returns this rank's part of the roots, fp32, one 1-D view per group."""
        return [roots[_roots_of(layout.comm_shard_of(layout.rank), layout)] for layout, roots in self._with_layouts()]

    def _with_layouts(self):
        return zip(self._buffers.layouts, self._buffers.roots)

    def write_own_roots(self, hyper: tuple[AdamWHyper, ...]) -> None:
        """Writes this rank's roots, behind a COMMIT's update, for the all-gather."""
        for shard, group, roots in zip(self._shards, hyper, self.own_roots()):
            ops.block_roots(shard.exp_avg_sq, shard.step, group.beta2, group.eps, roots)

    def fill_roots(self, hyper: tuple[AdamWHyper, ...]) -> None:
        """Makes all roots those of a state that no commit has touched; without the other ranks."""
        for (_, roots), group in zip(self._with_layouts(), hyper):
            roots.fill_(max(group.eps, SMALLEST_ROOT))

    def renew_roots(self, hyper: tuple[AdamWHyper, ...]) -> None:
        """Makes the roots those of the state as it is, where there are any; every rank must call it, while no round is
        in flight."""
        self.write_own_roots(hyper)
        if self._buffers.roots:
            self._comm.all_gather(self._buffers.roots, is_look=True)

    @torch.no_grad()
    def install(self, inputs: RoundInputs, has_newest: bool) -> None:
        """Writes the prediction into the live weights, of the gradients in A, which stay.

        Args:
            inputs: of the COMMIT of these gradients, which is about to start.
            has_newest: X has the newest true weights, or their change. Else the live ones are that, and the last step
                is not known.
        """
        buffers = self._buffers
        if not (has_newest or buffers.held):
            buffers.take_out()
        forgets = self.forgets_step or not has_newest
        kept = 0.0 if forgets else kept_part(self._comm.world_size, buffers.live[0].dtype)
        scale, is_finite = self._own_scale(inputs)
        for group, (shard, hyper) in enumerate(zip(self._shards, inputs.hyper)):
            before, live, grads = buffers.before[group], buffers.live[group], buffers.grads[group]
            for at, at_before, newest, roots, shard_numel in self._parts(group, has_newest):
                if forgets:
                    before[at_before] = newest
                on = Operands(newest, before[at_before], live[at], grads[at], roots, shard.step, shard_numel)
                ops.predict_locally(on, hyper, kept, scale, is_finite)
        self.forgets_step &= not has_newest
        buffers.hold(buffers.before)

    def _parts(self, group: int, has_newest: bool) -> Iterator[tuple[slice, slice, Tensor, Tensor, int]]:
        """Yields where each part of a group lies in P and in the weights before, its newest true weights, its roots,
        and how many elements of it belong to one shard."""
        buffers, layout, roots = self._buffers, self._buffers.layouts[group], self._buffers.roots[group]
        if not (buffers.held and has_newest):
            for in_flat, in_comm in layout.runs():
                at_before = in_flat if buffers.held else in_comm
                newest = buffers.live[group][in_flat] if buffers.held else buffers.comm_weights[group][in_comm]
                yield in_flat, at_before, newest, roots[_roots_of(in_comm, layout)], layout.shard_numel
            return
        for rank in range(layout.world_size):
            of_shard = roots[_roots_of(layout.comm_shard_of(rank), layout)]
            for start, numel in pieces(layout.shard_numel, PIECE_NUMEL):
                begin = rank * layout.shard_numel + start
                part = of_shard.narrow(0, block_count(start), block_count(numel))
                at = slice(begin, begin + numel)
                yield at, at, buffers.changed_copy(group, begin, numel), part, numel

    def _own_scale(self, inputs: RoundInputs) -> tuple[Tensor, Tensor]:
        """Returns what makes this rank's sum in A the mean of its own gradients, clipped by their own norm (fp32,
        0-dim), and whether all of them are finite (bool, 0-dim)."""
        factor = inputs.pre_scale * inputs.grad_scale
        if inputs.contribution is None:
            factor *= self._comm.world_size
        else:
            factor *= inputs.contribution.nominal / max(1, inputs.contribution.micro_batches)
        norm = ops.sum_of_squares(self._buffers.grads).sqrt() * factor
        scale = torch.full_like(norm, factor)
        if inputs.clip_grad > 0:
            scale /= ((norm + 1e-6) / inputs.clip_grad).clamp(min=1.0)
        return scale.float(), norm.isfinite()

    # ---- checkpoints

    def resume_state(self, grad_norm: float, is_shown: bool) -> ResumeState:
        """Returns what :meth:`restore` takes: with the whole weights that this rank trains at, which no other has.

        Args:
            is_shown: the true weights are exchanged with them for a look.
        """
        buffers = self._buffers
        before = [flat[layout.comm_shard_of(layout.rank)] for flat, layout in zip(buffers.before, buffers.layouts)]
        if self.forgets_step:
            before = buffers.live_shards if is_shown else buffers.comm_shards
        return ResumeState(
            buffers.host_copies(of_shown=is_shown),
            [],
            grad_norm,
            [shard.clone() for shard in before],
        )

    def restore(self, state: ResumeState) -> None:
        """Takes over what a checkpoint kept; the live weights are the true ones, X has those before the newest, and the
        roots were renewed of the loaded state."""
        buffers = self._buffers
        for before, gathered in zip(buffers.before, buffers.comm_weights):
            before.copy_(gathered)
        self.forgets_step = False
        buffers.take_out()
        for target, kept in zip(buffers.live, state.live):
            target.copy_(kept)


def _roots_of(in_comm: slice, layout) -> slice:
    """Returns where the roots of these whole shards lie, in the order of X."""
    numel, blocks = layout.shard_numel, block_count(layout.shard_numel)
    return slice(in_comm.start // numel * blocks, in_comm.stop // numel * blocks)
