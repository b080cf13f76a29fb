# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds the tests of tests/gpu that no test of the CPU's kernels has: collected only where the emulated kernels are in
the place of those."""

import pytest
import torch

from deepspeed_acco.optim import ops
from deepspeed_acco.optim import quantization as plain
from tests.support import kernel_checks, quantization_checks
from tests.support.kernel_checks import DTYPES, HYPER, SIZES, Case, same_bits

NUMBERS = (HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay)
GRIDS = (0, 1, 7, 132)  # max_blocks


def _state(case):
    return case.shard.master, case.shard.exp_avg, case.shard.exp_avg_sq, case.shard.step


def test_a_commit_has_the_same_bits_whatever_the_grid(native):
    results = []
    for max_blocks in GRIDS:
        case = Case(2**15 + 3, torch.bfloat16, torch.bfloat16)
        operands = (*_state(case), case.grad, case.scale, case.is_finite, *NUMBERS, case.out)
        torch.ops.deepspeed_acco.adamw_commit(*operands, max_blocks=max_blocks)
        results.append([*_state(case), case.out])
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_quantized_rounds_have_the_same_bits_whatever_the_grid(native):
    results = []
    for max_blocks in GRIDS:
        with ops.at_most_blocks(max_blocks):
            results.append(quantization_checks.all_results(native, 2**15 + 3, 4))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("bits", quantization_checks.BITS)
def test_more_messages_than_a_launch_takes(native, bits):
    quantization_checks.check_dequantize_sum(native, 513, bits, messages=131)


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_elements_behind_a_vectors_address(native, dtype):
    for numel in SIZES:
        kernel_checks.check_pack(native, numel, dtype, torch.float32, shift=4)
        kernel_checks.check_sum_of_squares(native, numel, dtype, shift=4)


@pytest.mark.parametrize("bits", quantization_checks.BITS)
def test_both_paths_have_the_same_bits(bits):
    numel = 100_003
    values = quantization_checks.hurting_values(numel, torch.float32)
    results = []
    for path in (ops, plain):
        records = quantization_checks.Bytes(numel, bits).view
        path.quantize(values, records, bits, 1 / 3)
        total = torch.empty(numel)
        path.dequantize_sum([records, records], total, bits)
        results.append((records, total))
    assert torch.equal(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])
