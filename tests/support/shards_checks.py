# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what moves all shards of a flat tensor at once, the same on every device: used by tests/optim (CPU) and
tests/gpu (CUDA)."""

from __future__ import annotations

import torch

from deepspeed_acco.optim import quantization as plain
from deepspeed_acco.optim.flat import Shards
from tests.support.kernel_checks import Surrounded, same_bits
from tests.support.quantization_checks import CANARY_BYTE, hurting_values

# Orders of shards: two levels of 2 x 2 and of 2 x 3 ranks, some that are not their own inverse, none, one shard.
PLACES = ((0, 2, 1, 3), (1, 2, 0), (0, 2, 4, 1, 3, 5), (4, 0, 5, 2, 1, 3), (0, 1, 2), (0,))
# Elements of a shard: even as DeepSpeed pads them, and odd; around a record and around a tile of the CUDA kernels.
SIZES = (0, 1, 2, 6, 255, 258, 2046, 2048, 2050, 4099)


def _values(places, numel, dtype, device, seed=0):
    values = torch.randn(len(places) * numel, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)


def _placed(values, places):
    """Returns a copy with every shard at its place."""
    table = values.view(len(places), -1)
    placed = torch.empty_like(table)
    placed[list(places)] = table
    return placed.flatten()


def check_pack(ops, places, numel, grad_dtype, packed_dtype, device="cpu", shift=0):
    """Checks that every shard is at its place, its products rounded once, cleared or not."""
    shards = Shards.of(places, torch.device(device))
    for scale, clears in ((1.0, True), (1 / 3, False)):
        values = _values(places, numel, grad_dtype, device)
        operands = Surrounded(values.numel(), device)
        grads = operands.operand(values, grad_dtype, shift)
        packed = operands.operand(torch.zeros_like(values), packed_dtype, 2 * shift)
        ops.pack(grads, packed, scale, clears=clears, shards=shards)
        products = (values.float() * torch.tensor(scale, dtype=torch.float32, device=device)).to(packed_dtype)
        assert same_bits(packed, _placed(products, places))
        assert same_bits(grads, torch.zeros_like(values) if clears else values)
        operands.require_untouched_around()


def check_moves(ops, places, numel, dtype, device="cpu", shift=0):
    """Checks that shards are copied there, back and swapped: the very bits, not numbers alone."""
    shards = Shards.of(places, torch.device(device))
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    generator = torch.Generator().manual_seed(numel)
    count = len(places) * numel
    bits = [torch.randint(-(2**15), 2**15, (count,), generator=generator).to(device, integer) for _ in range(2)]
    operands = Surrounded(count, device)
    source, target = (operands.operand(one.view(dtype), dtype, shift + i) for i, one in enumerate(bits))
    back = operands.operand(torch.zeros_like(source), dtype, 3 * shift)
    ops.copy_shards(source, target, shards)
    assert torch.equal(target.view(integer), _placed(bits[0], places))
    ops.copy_shards(target, back, shards.inverse())
    assert torch.equal(back.view(integer), bits[0])
    other = operands.operand(_placed(bits[1], places).view(dtype), dtype, 2 * shift)
    ops.swap_shards(source, other, shards)
    assert torch.equal(source.view(integer), bits[1])
    assert torch.equal(other.view(integer), _placed(bits[0], places))
    ops.swap_shards(source, target)
    assert torch.equal(source.view(integer), _placed(bits[0], places))
    assert torch.equal(target.view(integer), bits[1])
    operands.require_untouched_around()


def check_messages(ops, places, numel, dtype, bits, device="cpu", shift=0):
    """Checks the messages of all shards and what they change: shard by shard the bits of the plain path."""
    shards = Shards.of(places, torch.device(device))
    size, stride = plain.message_bytes(numel, bits), plain.message_stride(numel, bits)
    operands = Surrounded(len(places) * numel, device)
    values = operands.operand(hurting_values(len(places) * numel, dtype), dtype, shift)
    live = operands.operand(_values(places, numel, dtype, device, seed=1), dtype, shift)
    lead = 2 * shift
    buffer = torch.full((lead + len(places) * stride + 8,), CANARY_BYTE, dtype=torch.uint8, device=device)
    records = buffer.narrow(0, lead, len(places) * stride)
    expected = torch.full_like(buffer, CANARY_BYTE)
    changed = live.clone()
    ops.quantize(values, records, bits, 1 / 3, shards)
    for shard, place in enumerate(places):
        at = slice(shard * numel, (shard + 1) * numel)
        message = expected.narrow(0, lead + place * stride, size)
        plain.quantize(values[at], message, bits, 1 / 3)
        plain.add_change(message, torch.tensor(True, device=device), changed[at], bits)
    assert torch.equal(buffer, expected), "a message, or what lies between messages"
    before = live.clone()
    ops.add_change(records, torch.tensor(False, device=device), live, bits, shards)
    assert same_bits(live, before)
    ops.add_change(records, torch.tensor(True, device=device), live, bits, shards)
    assert same_bits(live, changed)
    operands.require_untouched_around()


def opcheck_arguments(device="cpu"):
    """Yields (operator, arguments) for torch.library.opcheck."""
    overloads = torch.ops.deepspeed_acco
    table = Shards.of(PLACES[1], torch.device(device)).table
    one, other = (_values(PLACES[1], 300, torch.bfloat16, device, seed) for seed in range(2))
    records = torch.zeros(len(PLACES[1]) * plain.message_stride(300, 4), dtype=torch.uint8, device=device)
    yield overloads.pack.default, (one, other, 0.5, True, table)
    yield overloads.copy_shards.default, (one, other, table)
    yield overloads.swap_shards.default, (one, other, table)
    yield overloads.swap_shards.default, (one, other)
    yield overloads.quantize.default, (one, records, 4, 0.5, table)
    yield overloads.add_change.default, (records, torch.tensor(True, device=device), one, 4, table)
