# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""All shards of a flat tensor at once, by the native CPU kernels and by the plain path."""

import itertools

import pytest
import torch

from deepspeed_acco.optim import flat, quantization
from deepspeed_acco.optim.flat import Shards
from tests.support import shards_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES
from tests.support.shards_checks import PLACES, SIZES

CPU = torch.device("cpu")


class Plain:
    """Holds the plain paths."""

    pack, copy_shards, swap_shards = (staticmethod(run) for run in (flat.pack, flat.copy_shards, flat.swap_shards))
    quantize, add_change = staticmethod(quantization.quantize), staticmethod(quantization.add_change)


@pytest.fixture(params=["native", "plain"])
def path(request):
    return Plain if request.param == "plain" else request.getfixturevalue("native")


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    "name, written",
    [("pack", ["grads", "packed"]), ("copy_shards", ["target"]), ("swap_shards", ["one", "other"])],
)
def test_schemas_say_what_is_written(native, name, written):
    schema = getattr(torch.ops.deepspeed_acco, name).default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == written


@pytest.mark.parametrize("grad_dtype, packed_dtype", DTYPE_PAIRS)
def test_pack(native, grad_dtype, packed_dtype):
    for places, (number, numel) in itertools.product(PLACES, enumerate(SIZES)):
        checks.check_pack(native, places, numel, grad_dtype, packed_dtype, shift=number % 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moves(path, dtype):
    for places, (number, numel) in itertools.product(PLACES, enumerate(SIZES)):
        checks.check_moves(path, places, numel, dtype, shift=number % 3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages(path, dtype, bits):
    for places, (number, numel) in itertools.product((*PLACES[1:4], PLACES[5]), enumerate(SIZES)):
        checks.check_messages(path, places, numel, dtype, bits, shift=number % 3)


def test_past_the_cache(native):
    """Large outputs take another way to memory."""
    checks.check_pack(native, PLACES[1], 2**19 + 6, torch.float32, torch.bfloat16, shift=1)


def test_the_plain_path_packs(native):
    """Where the scale is no power of two, 16-bit formats have other bits by torch than by one rounding."""
    for places, numel in itertools.product(PLACES, SIZES):
        checks.check_pack(Plain, places, numel, torch.float32, torch.float32)


def test_refuses_what_it_cannot_do(native):
    one, other = torch.zeros(12), torch.zeros(12)
    shards = Shards.of([1, 0, 2], CPU)
    records = torch.zeros(3 * 16, dtype=torch.uint8)
    flag = torch.tensor(True)
    of_five = Shards.of(range(5), CPU)
    for call, message in (
        (lambda: native.pack(one, other, 1.0, clears=False, shards=of_five), "12 elements are not 5 equal shards"),
        (lambda: native.copy_shards(one, other.bfloat16(), shards), "one dtype, got Float and BFloat16"),
        (lambda: native.swap_shards(one, other[1:], shards), "other has 11 elements, expected 12"),
        (lambda: native.quantize(one, records[:-1], 4, 1.0, shards), "has 47 bytes, expected an even number for each"),
        (lambda: native.quantize(one, records[:9], 4, 1.0, shards), "each of 3 shards and at least 4"),
        (lambda: native.add_change(records[:6], flag, one, 4, shards), "at least 4: 4 elements in 4 bits"),
        (
            lambda: torch.ops.deepspeed_acco.copy_shards(one, other, shards.table.int()),
            "places must be 1-D, contiguous and int64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_every_shard_has_one_place():
    with pytest.raises(AssertionError):
        Shards.of([0, 0, 1], CPU)
    shards = Shards.of([2, 0, 1], CPU)
    assert shards.inverse().places == (1, 2, 0) and shards.inverse().table.tolist() == [1, 2, 0]
