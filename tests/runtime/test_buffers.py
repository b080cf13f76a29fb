# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The flat buffers of one rank, without a process group."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_acco.algorithm.wire import IN_FULL, Bits, Wire
from deepspeed_acco.optim import quantization
from deepspeed_acco.runtime.buffers import FlatBuffers
from deepspeed_acco.runtime.layout import GroupLayout
from deepspeed_acco.runtime.levels import Levels


class Count(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _buffers(levels, bits=0, shard_numel=262):
    """Returns the buffers of rank 0, with a first group in which all values differ and a small second one."""
    layouts = [GroupLayout(numel * levels.world_size, levels, 0) for numel in (shard_numel, 2)]
    live = [torch.arange(layout.padded_numel, dtype=torch.float32) for layout in layouts]
    return FlatBuffers(live, layouts, torch.float32, torch.float32, Wire(Bits(bits, bits)))


LEVELS = (Levels.consecutive(6, 3), Levels(((5, 1, 2), (0, 4, 3))), Levels.flat(4), Levels.flat(1))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_shards_lie_by_their_places(native, levels):
    buffers, numel = _buffers(levels), 262
    shown = buffers.live[0].clone()
    buffers.take_out()
    for rank in range(levels.world_size):
        at, place = slice(rank * numel, (rank + 1) * numel), levels.place(rank)
        assert torch.equal(buffers.comm_weights[0][place * numel : (place + 1) * numel], shown[at])
    buffers.live[0].zero_()
    buffers.exchange()
    assert torch.equal(buffers.live[0], shown) and not buffers.comm_weights[0].any()
    buffers.exchange()
    buffers.install()
    assert torch.equal(buffers.live[0], shown)
    buffers.grads[0].copy_(shown)
    buffers.pack(0.5, IN_FULL, clears=True)
    buffers.install()  # of gradients, which have the places of weights
    assert torch.equal(buffers.live[0], shown / 2) and not buffers.grads[0].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_changes_are_added_to_the_shards_they_are_of(native, levels, bits):
    buffers, numel = _buffers(levels, bits), 262
    stride = buffers.comm_records(bits)[0].numel() // levels.world_size
    for rank in range(levels.world_size):
        place = levels.place(rank)
        message = buffers.comm_records(bits)[0][place * stride :][: quantization.message_bytes(numel, bits)]
        quantization.encode(torch.full((numel,), 1.0 + rank), message, bits)
    before = buffers.live[0].clone()
    buffers.add_estimate()
    added = (buffers.live[0] - before).view(-1, numel)
    # A scale is rounded up to bf16: by 1 / 128 at most.
    expected = torch.arange(1.0, 1.0 + levels.world_size)[:, None].expand_as(added)
    torch.testing.assert_close(added, expected, rtol=2.0**-7, atol=1e-4)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_operators_do_not_grow_with_the_ranks(native, bits, ranks_per_host):
    """Each of them is a launch on CUDA."""
    counted = []
    for ranks in (4, 16):
        buffers = _buffers(Levels.consecutive(ranks, ranks_per_host), bits)
        with Count() as count:
            buffers.pack(0.5, Bits(bits, bits), clears=False)
            buffers.pack(1.0, IN_FULL, clears=True)
            buffers.install()
            buffers.take_out()
            buffers.exchange()
            if bits:
                buffers.add_estimate()
        counted.append(count.calls)
    assert counted[0] == counted[1]
    assert counted[0]["deepspeed_acco.pack.default"] >= 2
