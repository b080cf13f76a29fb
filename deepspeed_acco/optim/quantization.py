# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Quantizes block by block and symmetrically to 8 or 4 bits, in plain PyTorch: what an ESTIMATE sends with
``estimate_comm`` and a COMMIT with ``commit_comm`` (docs/how-to/slow-links.md).

The values of one shard are cut into blocks of 256, which restart at every shard; the last block may be shorter. A block
becomes one *record*: its scale (bf16, 2 bytes, little endian), then its levels. With 8 bits a level is a byte; with 4
bits it is half a byte, the even element's in the low half, both two's complement. Records follow each other without
gaps, so that any number of them is a message, and a shard's last record is as short as its block. The kernels take
messages that begin at an even address, as all do in training; records then do, too.

Of a change of weights ``scale = max|x| / L`` rounded up to bf16, L = 127 or 7; ``level = x / scale`` rounded to
nearest, ties to even. A gradient's levels are of roots: ``scale = max|x| / L^2``, ``level = root(|x| / scale)`` with
the sign of x, and the value is ``level * |level| * scale``. AdamW divides each element by its own root mean square, so
what is small beside its block's largest matters as much: its error falls with its size. A change that is small matters
little, and what it loses comes with the next.

Because the scale is rounded up, levels stay within -L..L. A block of zeros has scale 0; one with a value that is not
finite has scale NaN (0x7FC0) and levels 0. Values are exact in fp32, so that every device and path gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import adamw
from .adamw import AdamWHyper, AdamWShard
from .flat import Shards, piece_numel, pieces

BLOCK = 256
LARGEST_LEVEL = {8: 127, 4: 7}
SCALE_BYTES = 2
_ALIGNMENT_BYTES = 16  # NCCL copies what begins elsewhere byte by byte
RECORDS_OF_A_PIECE = 8  # so many records are a multiple of it, with 4 and with 8 bits
_NAN_SCALE = 0x7FC0  # converting NaN to bf16 gives other bits on other CPUs and devices


def record_bytes(bits: int, block_numel: int = BLOCK) -> int:
    """Returns the bytes of the record of a block of so many elements."""
    return SCALE_BYTES + -(-block_numel * bits // 8)


def message_bytes(numel: int, bits: int) -> int:
    """Returns the bytes of the records of a shard of ``numel`` elements."""
    blocks, rest = divmod(numel, BLOCK)
    return blocks * record_bytes(bits) + (record_bytes(bits, rest) if rest else 0)


def message_stride(numel: int, bits: int) -> int:
    """Returns the bytes from one shard's message to the next, where those of several ranks lie in one buffer."""
    return -(-message_bytes(numel, bits) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@torch.no_grad()
def quantize(values: Tensor, records: Tensor, bits: int, scale: float = 1.0, shards: Shards | None = None) -> None:
    """Writes to ``records`` those of gradients, ``values * scale``, the product in fp32.

    Args:
        values: 1-D, any floating dtype; it begins at a block.
        records: uint8, 1-D, :func:`message_bytes` of ``values.numel()``. With ``shards`` as many messages, each at its
            place, :func:`message_stride` apart.
    """
    for part, message in _messages_of_shards(values, records, bits, shards):
        for at, at_records in _pieces(part, bits):
            encode(part[at].float() * scale, message[at_records], bits, of_roots=True)


@torch.no_grad()
def dequantize_sum(messages: list[Tensor], total: Tensor, bits: int) -> None:
    """Writes to ``total`` the sum of what the messages hold of gradients, each a term of ``total.numel()`` elements, in
    their order.

    Args:
        messages: uint8, 1-D, of equal size. total: fp32, 1-D; it begins at a block.
    """
    for at, at_records in _pieces(total, bits):
        part = total[at]
        part.copy_(decode(messages[0][at_records], part.numel(), bits, of_roots=True))
        for message in messages[1:]:
            part.add_(decode(message[at_records], part.numel(), bits, of_roots=True))


@torch.no_grad()
def adamw_estimate_change(
    shard: AdamWShard,
    grad: Tensor,
    hyper: AdamWHyper,
    grad_scale: Tensor,
    is_finite: Tensor,
    live_dtype: torch.dtype,
    records: Tensor,
    bits: int,
    base: Tensor | None = None,
) -> None:
    """Writes to ``records`` how far the weights of :func:`adamw.adamw_estimate`, in fp32, are from the live ones: from
    ``base``, or without it from the master weights rounded to ``live_dtype``. What the live ones lack of the master is
    part of the change. Where ``is_finite`` is False the change is 0: the step is skipped, and the weights stay as they
    are.

    Args:
        live_dtype: any floating one; with ``base`` it says nothing.
        base: 1-D, as many elements as the shard, any floating dtype.
    """
    for at, at_records in _pieces(shard.master, bits):
        part = AdamWShard(shard.master[at], shard.exp_avg[at], shard.exp_avg_sq[at], shard.step)
        weights = torch.empty_like(part.master)
        adamw.adamw_estimate(part, grad[at], hyper, grad_scale, is_finite, weights)
        live = part.master.to(live_dtype) if base is None else base[at]
        change = torch.where(is_finite, weights.sub_(live.float()), 0.0)
        encode(change, records[at_records], bits)


@torch.no_grad()
def adamw_commit_change(
    shard: AdamWShard,
    grad: Tensor,
    hyper: AdamWHyper,
    grad_scale: Tensor,
    is_finite: Tensor,
    base: Tensor,
    records: Tensor,
    bits: int,
) -> None:
    """Takes the step of :func:`adamw.adamw_commit` in place, then writes to ``records`` how far the master weights, in
    fp32, are from ``base``. What rounding leaves of a change is in the next one, since the master has it. Where
    ``is_finite`` is False the step is skipped, and the change is that of the master as it was.

    Args:
        base: the weights of this shard that every rank has, 1-D, as many elements as the shard, any floating dtype.
    """
    adamw.adamw_commit(shard, grad, hyper, grad_scale, is_finite, out=shard.master)
    for at, at_records in _pieces(shard.master, bits):
        encode(shard.master[at] - base[at].float(), records[at_records], bits)


@torch.no_grad()
def add_change(records: Tensor, is_added: Tensor, live: Tensor, bits: int, shards: Shards | None = None) -> None:
    """Adds ``level * scale`` to ``live`` in fp32, rounded once to its dtype; nothing where not ``is_added``.

    Args:
        records: as in :func:`quantize`. is_added: bool, 0-dim. live: the weights, 1-D.
    """
    for weights, message in _messages_of_shards(live, records, bits, shards):
        for at, at_records in _pieces(weights, bits):
            part = weights[at]
            changed = (part.float() + decode(message[at_records], part.numel(), bits)).to(part.dtype)
            part.copy_(torch.where(is_added, changed, part))


@torch.no_grad()
def are_finite(messages: Tensor, shards: int, numel: int, bits: int) -> Tensor:
    """Tells whether every block of ``shards`` messages was finite, by their scales: bool, 0-dim.

    Args:
        messages: uint8, 1-D, of ``shards`` shards of ``numel`` elements each, :func:`message_stride` apart.
    """
    blocks = -(-numel // BLOCK)
    strides = (message_stride(numel, bits), record_bytes(bits), 1)
    scales = messages.as_strided((shards, blocks, SCALE_BYTES), strides, messages.storage_offset())
    return _as_scales(scales).isfinite().all()


def _messages_of_shards(
    values: Tensor, records: Tensor, bits: int, shards: Shards | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each shard of ``values`` with its message; all of both where there are no shards."""
    if shards is None:
        yield values, records
        return
    count = len(shards.places)
    numel, stride = values.numel() // count, records.numel() // count
    for shard, place in enumerate(shards.places):
        message = records.narrow(0, place * stride, message_bytes(numel, bits))
        yield values.narrow(0, shard * numel, numel), message


def _pieces(values: Tensor, bits: int):
    """Yields slices of ``values`` and of its records that belong together: whole blocks of an operator call's size."""
    numel = piece_numel(values.device)
    assert numel % BLOCK == 0
    for start, length in pieces(values.numel(), numel):
        first = start // BLOCK * record_bytes(bits)
        yield slice(start, start + length), slice(first, first + message_bytes(length, bits))


def encode(values: Tensor, records: Tensor, bits: int, *, of_roots: bool = False) -> None:
    """Writes the records of ``values``, fp32, 1-D; of changes, or ``of_roots`` for gradients."""
    if not values.numel():
        return
    blocks = -(-values.numel() // BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * BLOCK - values.numel())).view(blocks, BLOCK)
    largest = padded.abs().amax(dim=1, keepdim=True)
    is_finite = largest.isfinite()
    # By a tensor: CUDA divides by a number of the host as a product with its reciprocal, which has other bits.
    power = 2 if of_roots else 1
    scale = _rounded_up(largest / largest.new_full((), LARGEST_LEVEL[bits] ** power))
    quotients = padded / torch.where(scale == 0, 1.0, scale)
    levels = (quotients.abs().sqrt_().copysign_(quotients) if of_roots else quotients).round_()
    levels = torch.where(is_finite, levels, 0.0).to(torch.int8)
    if bits == 4:
        levels = (levels[:, 0::2] & 15) | (levels[:, 1::2] << 4)
    scale_bits = torch.where(is_finite, scale.view(torch.int32) >> 16, _NAN_SCALE).to(torch.int16)
    encoded = torch.cat([scale_bits.view(torch.uint8), levels.view(torch.uint8)], dim=1).flatten()
    records.copy_(encoded[: records.numel()])


def _as_scales(scale_bytes: Tensor) -> Tensor:
    """Returns the scales as a bf16 copy: two bytes of each record."""
    return scale_bytes.clone(memory_format=torch.contiguous_format).view(-1, SCALE_BYTES).view(torch.bfloat16)


def _rounded_up(positive: Tensor) -> Tensor:
    """Returns, in fp32, the smallest bf16 numbers that are not below these fp32 ones."""
    return ((positive.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def decode(records: Tensor, numel: int, bits: int, *, of_roots: bool = False) -> Tensor:
    """Returns what the records of ``numel`` elements hold, fp32, 1-D: of changes, or ``of_roots`` of gradients."""
    blocks = -(-numel // BLOCK)
    padded = torch.nn.functional.pad(records, (0, blocks * record_bytes(bits) - records.numel()))
    table = padded.view(blocks, record_bytes(bits))
    scale = _as_scales(table[:, :SCALE_BYTES]).float()
    levels = table[:, SCALE_BYTES:].contiguous().view(torch.int8)
    if bits == 4:
        low, high = (levels << 4) >> 4, levels >> 4  # shifts of int8 carry the sign along
        levels = torch.stack([low, high], dim=2).flatten(1)
    values = levels.float()
    return ((values * values.abs() if of_roots else values) * scale).flatten()[:numel]
