# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what the kernels of the quantized rounds must do on every device: the bits of optim/quantization.py."""

from __future__ import annotations

import functools
import math

import torch

from deepspeed_acco.optim import quantization as plain
from tests.support.kernel_checks import CANARY, HYPER, Case, same_bits

BITS = (4, 8)
# Around the records and the halves of a byte; several threads' shares and pieces of the plain path.
SIZES = (0, 1, 2, 255, 256, 257, 511, 513, 100_003)
SIZES_AND_SHIFTS = [(numel, shift) for numel in SIZES for shift in (0, 1, 3) if numel < 1000 or shift == 1]
CANARY_BYTE = 0xA5


class Bytes:
    """Holds records that begin at any even address, 2 * ``shift`` bytes behind an aligned one, and what lies around
    them."""

    def __init__(self, numel, bits, *, shift=0, device="cpu"):
        count = plain.message_bytes(numel, bits)
        self._begin, self._end = 2 * shift, 2 * shift + count
        self._buffer = torch.full((self._end + 5,), CANARY_BYTE, dtype=torch.uint8, device=device)
        self.view = self._buffer[self._begin : self._end]

    def require_untouched_around(self):
        """Requires that nothing was written outside of the records."""
        assert (self._buffer[: self._begin] == CANARY_BYTE).all() and (self._buffer[self._end :] == CANARY_BYTE).all()


@functools.cache
def hurting_values(numel, dtype, seed=0):
    """Makes blocks of every kind: ordinary, zeros of both signs, one huge value, subnormal, not finite, ties, tiny."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator) * 0.02
    kinds = (
        lambda block: None,
        lambda block: block.zero_(),
        lambda block: block.zero_().neg_(),
        lambda block: block[-1:].fill_(3e38),
        lambda block: block[block.numel() // 2 :][:1].fill_(-6e4),
        lambda block: block.mul_(1e-38),  # subnormal values, normal scale or subnormal scale
        lambda block: block.mul_(1e-43),  # a scale of 0, or far above the values
        lambda block: block[:1].fill_(math.nan),
        lambda block: block[-1:].fill_(math.inf),
        lambda block: block[block.numel() // 3 :][:1].fill_(-math.inf),
        lambda block: block.copy_(torch.randint(-14, 15, block.shape, generator=generator) / 2),  # ties of 4 bits
        lambda block: block.copy_(torch.randint(-254, 255, block.shape, generator=generator) / 2),  # and of 8
    )
    for number, block in enumerate(values.split(plain.BLOCK)):
        kinds[(number + numel) % len(kinds)](block)
    return values.to(dtype)


def check_quantize(ops, numel, dtype, bits, device="cpu", shift=0):
    """Checks the records of values that hurt, with two scales, to the bit."""
    buffer = torch.full((numel + 4,), CANARY, dtype=dtype, device=device)
    values = buffer.narrow(0, min(shift, 4), numel)
    values.copy_(hurting_values(numel, dtype))
    for scale in (1.0, 1 / 3):
        records, expected = (Bytes(numel, bits, shift=shift, device=device) for _ in range(2))
        ops.quantize(values, records.view, bits, scale)
        plain.quantize(values, expected.view, bits, scale)
        assert torch.equal(records.view, expected.view)
        records.require_untouched_around()


def random_messages(count, numel, bits, *, device="cpu", shift=0):
    """Makes messages of any levels, with scales as they come: ordinary, 0, subnormal, NaN; each at its own address."""
    generator = torch.Generator().manual_seed(numel + bits)
    scales = torch.tensor([0.01, -0.0, 1e-40, 3e38, math.nan, 0.5, 1e-3], dtype=torch.bfloat16).view(torch.uint8)
    messages = []
    blocks = -(-numel // plain.BLOCK)
    for number in range(count):
        table = torch.randint(0, 256, (blocks, plain.record_bytes(bits)), dtype=torch.uint8, generator=generator)
        table[:, : plain.SCALE_BYTES] = scales.view(-1, plain.SCALE_BYTES)[(torch.arange(blocks) + number) % 7]
        message = Bytes(numel, bits, shift=shift + number, device=device).view
        messages.append(message.copy_(table.flatten()[: message.numel()]))
    return messages


def check_dequantize_sum(ops, numel, bits, messages=3, device="cpu", shift=0):
    """Checks the sum of several messages to the bit, with the signs of its zeros."""
    sent = random_messages(messages, numel, bits, device=device, shift=shift)
    buffers = [torch.full((numel + 9,), CANARY, device=device) for _ in range(2)]
    total, expected = (buffer.narrow(0, shift, numel) for buffer in buffers)
    ops.dequantize_sum(sent, total, bits)
    plain.dequantize_sum(sent, expected, bits)
    assert same_bits(total, expected)
    assert torch.equal(total.signbit() | total.isnan(), expected.signbit() | expected.isnan()), "-0 is not 0"
    assert (buffers[0][:shift] == CANARY).all() and (buffers[0][shift + numel :] == CANARY).all()


def check_add_change(ops, numel, dtype, bits, device="cpu", shift=0):
    """Checks the changed weights to the bit, and that they stay with the flag down."""
    (records,) = random_messages(1, numel, bits, device=device, shift=shift)
    for is_added in (True, False):
        buffers = [torch.full((numel + 9,), CANARY, dtype=dtype, device=device) for _ in range(2)]
        live, expected = (buffer.narrow(0, shift, numel) for buffer in buffers)
        for weights in (live, expected):
            weights.copy_(hurting_values(numel, dtype, seed=1))
        flag = torch.tensor(is_added, device=device)
        ops.add_change(records, flag, live, bits)
        plain.add_change(records, flag, expected, bits)
        assert same_bits(live, expected)
        assert (buffers[0][:shift] == CANARY).all() and (buffers[0][shift + numel :] == CANARY).all()


def run_change(ops, case, live_dtype, records, bits, base=None):
    """Calls ``adamw_estimate_change`` with the operands of ``case``."""
    operands = (case.shard, case.grad, HYPER, case.scale, case.is_finite, live_dtype, records, bits)
    ops.adamw_estimate_change(*operands, base)


def run_commit_change(ops, case, base, records, bits):
    """Calls ``adamw_commit_change`` with the operands of ``case``."""
    ops.adamw_commit_change(case.shard, case.grad, HYPER, case.scale, case.is_finite, base, records, bits)


def case_that_hurts(numel, grad_dtype, device="cpu", shift=0):
    """Makes the operands of an update with gradients and state of which some are not finite."""
    case = Case(numel, grad_dtype, torch.float32, device=device, shift=shift)
    for place, bad in ((0, math.inf), (300, math.nan), (700, 1e30)):
        case.grad[place : place + 1] = bad
    case.shard.exp_avg_sq[1000:1001] = math.inf
    return case


def base_of(case, dtype, shift=0):
    """Makes weights near the master that no rounding of it gives, some of them not finite, 5 * ``shift`` elements
    behind an aligned address."""
    noise = torch.randn(case.numel, generator=torch.Generator().manual_seed(9)) * 0.01
    base = case.operand(case.shard.master.cpu() + noise, dtype, 5 * shift)
    for place, bad in ((1300, math.inf), (1600, math.nan), (1900, -6e4)):
        base[place : place + 1] = bad
    return base


def check_estimate_change(ops, numel, grad_dtype, live_dtype, bits, device="cpu", shift=0):
    """Checks that the records are those of the weights that the estimate writes, minus the rounded ones before it, or
    minus given ones; no state is written."""
    for has_base in (False, True):
        case = case_that_hurts(numel, grad_dtype, device, shift)
        base = base_of(case, live_dtype, shift) if has_base else None
        live = case.shard.master.to(live_dtype) if base is None else base.clone()
        rounded_to = torch.float16 if has_base else live_dtype  # which then says nothing
        before = case.snapshot()
        records, expected = (Bytes(numel, bits, shift=shift, device=device) for _ in range(2))
        run_change(ops, case, rounded_to, records.view, bits, base)
        for name, tensor in case.state().items():
            assert same_bits(tensor, before[name]), name
        assert base is None or same_bits(base, live)
        records.require_untouched_around()
        case.require_untouched_around()
        case.run(ops.adamw_estimate)
        plain.encode(case.out - live.float(), expected.view, bits)
        assert torch.equal(records.view, expected.view)

        case.is_finite.fill_(False)
        case.scale.fill_(math.nan)
        run_change(ops, case, rounded_to, records.view, bits, base)
        assert not records.view.any()
        records.require_untouched_around()


def check_commit_change(ops, numel, grad_dtype, base_dtype, bits, device="cpu", shift=0):
    """Checks that the state is that of a commit, and that the records are those of its master minus the given weights;
    of the master as it is where the step is skipped."""
    case, twin = (case_that_hurts(numel, grad_dtype, device, shift) for _ in range(2))
    base = base_of(case, base_dtype, shift)
    kept = base.clone()
    for is_finite, scale in ((True, 0.37), (False, math.nan), (True, 1e-3)):
        for one in (case, twin):
            one.is_finite.fill_(is_finite)
            one.scale.fill_(scale)
        records, expected = (Bytes(numel, bits, shift=shift, device=device) for _ in range(2))
        run_commit_change(ops, case, base, records.view, bits)
        twin.run(ops.adamw_commit)
        for name, tensor in case.state().items():
            assert same_bits(tensor, twin.state()[name]), name
        plain.encode(case.shard.master - kept.float(), expected.view, bits)
        assert torch.equal(records.view, expected.view)
        assert same_bits(base, kept)
        records.require_untouched_around()
        case.require_untouched_around()


def check_change_of_plain_path(ops, grad_dtype, live_dtype, bits, device="cpu"):
    """Checks that both paths' changes differ by at most a step of their levels: their weights by the last place."""
    numel = 5003
    case = Case(numel, grad_dtype, torch.float32, device=device)
    case.shard.exp_avg_sq.clamp_(min=1e-5)  # no element moves so far that the levels of its block's others are 0
    changes = []
    for module in (ops, plain):
        records = torch.empty(plain.message_bytes(numel, bits), dtype=torch.uint8, device=device)
        run_change(module, case, live_dtype, records, bits)
        changes.append(plain.decode(records, numel, bits))
    native, expected = changes
    largest = torch.nn.functional.pad(expected.abs(), (0, -numel % plain.BLOCK)).view(-1, plain.BLOCK).amax(1)
    step = (largest / plain.LARGEST_LEVEL[bits]).repeat_interleave(plain.BLOCK)[:numel]
    error = (native - expected).abs()
    # A scale may be rounded up to the next bf16 number in one path alone: every level's value moves by up to 2^-7.
    assert (error <= 1.01 * step + 2.0**-7 * expected.abs()).all()
    assert (error > 2.0**-7 * expected.abs()).sum() <= numel // 100
    assert native.count_nonzero() > numel // 2


def opcheck_arguments(device="cpu"):
    """Yields (operator, arguments) for torch.library.opcheck."""
    overloads = torch.ops.deepspeed_acco
    numbers = (HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay)
    for bits, dtype in ((4, torch.bfloat16), (8, torch.float32)):
        case = Case(300, dtype, dtype, device=device)
        shard = case.shard
        records = Bytes(300, bits, device=device).view
        change = (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step, case.grad, case.scale, case.is_finite)
        yield overloads.adamw_estimate_change.default, (*change, *numbers, dtype, records, bits)
        yield overloads.adamw_estimate_change.default, (*change, *numbers, dtype, records, bits, case.out)
        yield overloads.adamw_commit_change.default, (*change, *numbers, case.out, records, bits)
        yield overloads.quantize.default, (case.grad, records, bits, 0.5)
        yield overloads.dequantize_sum.default, ([records, records.clone()], torch.zeros(300, device=device), bits)
        yield overloads.add_change.default, (records, case.is_finite, case.out, bits)


def all_results(ops, numel, bits, device="cpu"):
    """Returns what each kernel writes, of everything that hurts."""
    case = Case(numel, torch.bfloat16, torch.float32, device=device, shift=1)
    records = Bytes(numel, bits, shift=1, device=device).view
    run_change(ops, case, torch.bfloat16, records, bits)
    committed = Bytes(numel, bits, shift=2, device=device).view
    run_commit_change(ops, case, case.shard.master.to(torch.bfloat16), committed, bits)
    quantized = Bytes(numel, bits, device=device).view
    ops.quantize(hurting_values(numel, torch.float32).to(device), quantized, bits, 1 / 3)
    total = torch.empty(numel, device=device)
    ops.dequantize_sum([records, quantized, records], total, bits)
    live = case.shard.master.to(torch.bfloat16)
    ops.add_change(records, case.is_finite, live, bits)
    return [records, committed, *case.state().values(), quantized, total, live]
