# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the quantized rounds: the checks of tests/support, the bits of the CPU, and what only a device
has."""

import pytest
import torch

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from deepspeed_acco.optim import ops
from deepspeed_acco.optim import quantization as plain
from tests.support import quantization_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES, Case, same_bits
from tests.support.quantization_checks import BITS, SIZES, SIZES_AND_SHIFTS, Bytes, hurting_values

pytestmark = pytest.mark.gpu


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments("cuda"):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_and_add_change(native, dtype, bits):
    for numel, shift in SIZES_AND_SHIFTS:
        checks.check_quantize(native, numel, dtype, bits, device="cuda", shift=shift)
        checks.check_add_change(native, numel, dtype, bits, device="cuda", shift=shift)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_sum(native, bits):
    for numel, shift in SIZES_AND_SHIFTS:
        checks.check_dequantize_sum(native, numel, bits, messages=shift + 1, device="cuda", shift=shift)
    # More messages than a launch takes.
    checks.check_dequantize_sum(native, 513, bits, messages=131, device="cuda")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grad_dtype, live_dtype", DTYPE_PAIRS)
def test_estimate_change(native, grad_dtype, live_dtype, bits):
    for number, numel in enumerate(SIZES):
        checks.check_estimate_change(native, numel, grad_dtype, live_dtype, bits, device="cuda", shift=number % 2)
    checks.check_change_of_plain_path(native, grad_dtype, live_dtype, bits, device="cuda")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grad_dtype, base_dtype", DTYPE_PAIRS)
def test_commit_change(native, grad_dtype, base_dtype, bits):
    for number, numel in enumerate(SIZES):
        checks.check_commit_change(native, numel, grad_dtype, base_dtype, bits, device="cuda", shift=number % 2)


@pytest.mark.parametrize("bits", BITS)
def test_the_bits_of_the_cpu(native, bits):
    """Records and sums are the same whatever device and path made them."""
    numel = 100_003
    values = hurting_values(numel, torch.float32)
    records = {}
    for device in ("cpu", "cuda"):
        for path, module in (("native", ops), ("plain", plain)):
            made = Bytes(numel, bits, device=device).view
            module.quantize(values.to(device), made, bits, 1 / 3)
            total = torch.empty(numel, device=device)
            module.dequantize_sum([made, made], total, bits)
            records[device, path] = made.cpu(), total.cpu()
    expected, expected_total = records["cpu", "plain"]
    for made, total in records.values():
        assert torch.equal(made, expected) and same_bits(total, expected_total)


def test_same_bits_whatever_the_grid(native):
    results = []
    for max_blocks in (0, 1, 7, 132):
        with ops.at_most_blocks(max_blocks):
            results.append(checks.all_results(native, 2**17 + 3, 4, device="cuda"))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_runs_on_the_current_stream_and_waits_for_nothing(native):
    numel = 2**20
    case = Case(numel, torch.bfloat16, torch.bfloat16, device="cuda")
    records, expected = (Bytes(numel, 4, device="cuda").view for _ in range(2))
    checks.run_change(native, case, torch.bfloat16, expected, 4)
    live, expected_live = case.out.clone(), case.out.clone()
    native.add_change(expected, case.is_finite, expected_live, 4)
    committed, expected_committed = (Bytes(numel, 4, device="cuda").view for _ in range(2))
    twin = Case(numel, torch.bfloat16, torch.bfloat16, device="cuda")
    checks.run_commit_change(native, twin, expected_live, expected_committed, 4)
    total = torch.empty(numel, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            case.scale.mul_(1.0)  # behind the sleep: the kernels must not overtake it
            checks.run_change(native, case, torch.bfloat16, records, 4)
            native.add_change(records, case.is_finite, live, 4)
            checks.run_commit_change(native, case, live, committed, 4)
            native.dequantize_sum([records, records], total, 4)
            native.quantize(total, records, 4, 0.5)
            assert not side.query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert same_bits(live, expected_live) and torch.equal(committed, expected_committed)


def test_more_than_32_bits(native):
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 12 * numel:
        pytest.skip(f"needs {12 * numel / 1e9:.0f} GB of free device memory")
    places = [0, 2**31 - 1, 2**31, numel - 1]  # the last two lie in the last record
    values = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    values[places] = 7.0
    for bits, largest in plain.LARGEST_LEVEL.items():
        records = torch.empty(plain.message_bytes(numel, bits), dtype=torch.uint8, device="cuda")
        native.quantize(values, records, bits, largest**2 / 7)  # a scale of 1
        total = torch.empty(numel, device="cuda")
        native.dequantize_sum([records], total, bits)
        assert total.count_nonzero() == len(places) and (total[places] == largest**2).all()
        del total
        live = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
        native.add_change(records, torch.tensor(True, device="cuda"), live, bits)
        assert live.count_nonzero() == len(places) and (live[places] == largest).all()
        del records, live
