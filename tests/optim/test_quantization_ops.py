# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels of the quantized rounds: schemas, bits, threads, refusals."""

import pytest
import torch

from deepspeed_acco.optim import quantization as plain
from tests.support import quantization_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES, Case, same_bits
from tests.support.quantization_checks import BITS, SIZES, SIZES_AND_SHIFTS, Bytes


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    "name, written",
    [
        ("adamw_estimate_change", ["records"]),
        ("adamw_commit_change", ["master", "exp_avg", "exp_avg_sq", "step", "records"]),
        ("quantize", ["records"]),
        ("dequantize_sum", ["total"]),
        ("add_change", ["live"]),
    ],
)
def test_schemas_say_what_is_written(native, name, written):
    schema = getattr(torch.ops.deepspeed_acco, name).default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == written


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(native, dtype, bits):
    for numel, shift in SIZES_AND_SHIFTS:
        checks.check_quantize(native, numel, dtype, bits, shift=shift)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_sum(native, bits):
    for numel, shift in SIZES_AND_SHIFTS:
        checks.check_dequantize_sum(native, numel, bits, messages=shift + 1, shift=shift)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_change(native, dtype, bits):
    for numel, shift in SIZES_AND_SHIFTS:
        checks.check_add_change(native, numel, dtype, bits, shift=shift)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grad_dtype, live_dtype", DTYPE_PAIRS)
def test_estimate_change(native, grad_dtype, live_dtype, bits):
    for number, numel in enumerate(SIZES):
        checks.check_estimate_change(native, numel, grad_dtype, live_dtype, bits, shift=number % 2)
    checks.check_change_of_plain_path(native, grad_dtype, live_dtype, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grad_dtype, base_dtype", DTYPE_PAIRS)
def test_commit_change(native, grad_dtype, base_dtype, bits):
    for number, numel in enumerate(SIZES):
        checks.check_commit_change(native, numel, grad_dtype, base_dtype, bits, shift=number % 2)


@pytest.mark.parametrize("bits", BITS)
def test_past_the_cache(native, bits):
    """A large sum takes another way to memory (streamed stores)."""
    for shift in (0, 1):
        checks.check_dequantize_sum(native, 2**20 + 77, bits, 2, shift=shift)


@pytest.mark.parametrize("bits", BITS)
def test_same_bits_whatever_the_threads(native, bits):
    threads = torch.get_num_threads()
    try:
        for numel in (2**16 + 1, 100_003):
            torch.set_num_threads(1)
            alone = checks.all_results(native, numel, bits)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                for one, several in zip(alone, checks.all_results(native, numel, bits)):
                    assert same_bits(one, several), count
    finally:
        torch.set_num_threads(threads)


def test_refuses_what_it_cannot_do(native):
    case = Case(300, torch.float32, torch.float32)
    records = Bytes(300, 4).view
    flag, total = case.is_finite, torch.zeros(300)
    change = lambda dtype, records, base=None: checks.run_change(native, case, dtype, records, 4, base)  # noqa: E731
    commit = lambda base, records: checks.run_commit_change(native, case, base, records, 4)  # noqa: E731
    for call, message in (
        (lambda: native.quantize(total, records, 5, 1.0), "bits is 5; allowed: 4, 8"),
        (lambda: native.quantize(total, records, 8, 1.0), "154 bytes, expected 304: 300 elements in 8 bits"),
        (lambda: native.quantize(total, records.view(torch.int8), 4, 1.0), "records must be uint8"),
        (lambda: native.quantize(total, torch.zeros(308, dtype=torch.uint8)[::2], 4, 1.0), "1-D and contiguous"),
        (lambda: native.quantize(total.double(), records, 4, 1.0), "allowed: float32, bfloat16, float16"),
        (lambda: native.dequantize_sum([], total, 4), "at least one message"),
        (lambda: native.dequantize_sum([records, records[1:]], total, 4), "a message has 153 bytes, expected 154"),
        (lambda: native.dequantize_sum([records], total.bfloat16(), 4), "total must be float32"),
        (lambda: native.add_change(records, flag.float(), total, 4), "is_added must be 0-dim"),
        (lambda: native.add_change(records, flag, total[2:], 4), "records has 154 bytes, expected 153"),
        (lambda: change(torch.float64, records), "live has dtype Double; allowed: float32, bfloat16, float16"),
        (lambda: change(torch.float32, records, total[1:]), "base has 299 elements, expected 300"),
        (lambda: change(torch.float32, records, total.double()), "base has dtype Double; allowed: float32, bfloat16"),
        (lambda: commit(total[1:], records), "base has 299 elements, expected 300"),
        (lambda: commit(total.double(), records), "base has dtype Double; allowed: float32, bfloat16, float16"),
        (lambda: commit(total, records[2:]), "records has 152 bytes, expected 154"),
        (lambda: change(torch.float32, records[1:]), "records has 153 bytes, expected 154"),
        (lambda: native.quantize(total, torch.zeros(155, dtype=torch.uint8)[1:], 4, 1.0), "begin at an even address"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert plain.message_bytes(300, 4) == 154
