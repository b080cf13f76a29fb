"""The 4 and 8 bit format in plain PyTorch, against the format written once more in numpy and float64."""

import math

import numpy as np
import pytest
import torch

from deepspeed_acco.optim import quantization as q
from deepspeed_acco.optim.adamw import AdamWHyper, AdamWShard, adamw_commit, adamw_estimate

# Every bf16 number from 0 up to the largest, in order.
BF16 = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
NAN_RECORD_SCALE = b"\xc0\x7f"
SIZES = (0, 1, 2, 255, 256, 257, 511, 513, 2**15 + 301)
HYPER = AdamWHyper(lr=3e-2, beta1=0.7, beta2=0.95, eps=1e-7, weight_decay=0.2)


def _true_block(values, bits, of_roots):
    """(scale, levels) of one block of fp32 values: the scale by search among all bf16 numbers."""
    largest_level = (127 if bits == 8 else 7) ** (1 + of_roots)
    if not np.isfinite(values).all():
        return math.nan, np.zeros(len(values), dtype=np.int64)
    scale = BF16[np.searchsorted(BF16, float(np.abs(values).max() / np.float32(largest_level)))]
    if scale == 0:
        return scale, np.zeros(len(values), dtype=np.int64)
    quotients = values / np.float32(scale)
    if of_roots:
        quotients = np.sign(quotients) * np.sqrt(np.abs(quotients))
    return scale, np.rint(quotients).astype(np.int64)


def _true_records(values, bits, of_roots=False):
    """The message as bytes, put together element by element."""
    out = bytearray()
    for start in range(0, len(values), 256):
        scale, levels = _true_block(values[start : start + 256], bits, of_roots)
        out += NAN_RECORD_SCALE if math.isnan(scale) else int(np.searchsorted(BF16, scale)).to_bytes(2, "little")
        coded = [int(level) % 2**bits for level in levels]
        if bits == 8:
            out += bytes(coded)
        else:
            coded += [0] * (len(coded) % 2)
            out += bytes(even + 16 * odd for even, odd in zip(coded[::2], coded[1::2]))
    return bytes(out)


def _true_values(message, numel, bits, of_roots=True):
    """What a message stands for, in float64."""
    values = []
    while len(values) < numel:
        count = min(256, numel - len(values))
        scale_bits, message = int.from_bytes(message[:2], "little"), message[2:]
        scale = math.nan if scale_bits > 0x7F80 else BF16[scale_bits]
        coded, message = message[: -(-count * bits // 8)], message[-(-count * bits // 8) :]
        if bits == 4:
            coded = [half for byte in coded for half in (byte % 16, byte // 16)][:count]
        levels = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in coded]
        values += [(level * abs(level) if of_roots else level) * scale for level in levels]
    return np.array(values)


def _message(numel, bits, odd=True):
    """A tensor for the records that begins at an odd address."""
    return torch.full((q.message_bytes(numel, bits) + odd,), 0xEE, dtype=torch.uint8)[odd:]


def _as_bytes(message):
    return message.numpy().tobytes()


def _quantized(values, bits, scale=1.0):
    message = _message(values.numel(), bits)
    q.quantize(values, message, bits, scale)
    return message


def _values(numel, seed=0):
    """Blocks of very different sizes: ordinary, zeros, one huge value, subnormal, with what is not finite."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    changes = (
        lambda block: None,
        lambda block: block.zero_(),
        lambda block: block[-1:].fill_(-3e38),
        lambda block: block.mul_(1e-39),
        lambda block: block.mul_(1e-44),
        lambda block: block[:1].fill_(math.nan),
        lambda block: block[-1:].fill_(-math.inf),
    )
    for number, block in enumerate(values.split(256)):
        changes[(number + numel) % len(changes)](block)
    return values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numel", SIZES)
def test_records(numel, bits):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = _values(numel).to(dtype)
        for scale in (1.0, 1 / 3):
            scaled = values.float().numpy() * np.float32(scale)
            assert _as_bytes(_quantized(values, bits, scale)) == _true_records(scaled, bits, of_roots=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes(bits):
    assert q.record_bytes(bits) == {4: 130, 8: 258}[bits]
    for numel in SIZES:
        assert q.message_bytes(numel, bits) == len(_true_records(np.zeros(numel, dtype=np.float32), bits))


def _encoded(changes, bits):
    message = _message(changes.numel(), bits)
    q.encode(changes, message, bits)
    return _as_bytes(message)


@pytest.mark.parametrize("of_roots", [True, False])
@pytest.mark.parametrize("bits, largest", [(4, 7), (8, 127)])
def test_ties_go_to_even(bits, largest, of_roots):
    levels = torch.arange(-2 * largest, 2 * largest + 1) / 2  # the largest is exact, and so is the scale: 2^-3
    for start in range(0, levels.numel(), 200):
        part = torch.cat([levels[start : start + 200], torch.tensor([float(largest)])])
        values = (part * part.abs() if of_roots else part) / 8
        message = _as_bytes(_quantized(values, bits)) if of_roots else _encoded(values, bits)
        expected = [round(level) for level in part.tolist()]  # Python rounds ties to even
        expected = [level * abs(level) if of_roots else level for level in expected]
        assert (_true_values(message, part.numel(), bits, of_roots) * 8).tolist() == expected


@pytest.mark.parametrize("bits, largest", [(4, 7), (8, 127)])
def test_error_of_a_change_is_at_most_half_a_step(bits, largest):
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(1)) * 1e-3
    decoded = _true_values(_encoded(values, bits), values.numel(), bits, of_roots=False)
    given = values.double().numpy()
    for start in range(0, len(given), 256):
        block = given[start : start + 256]
        step = np.abs(block).max() / largest * (1 + 2**-7)  # rounded up to bf16
        assert np.abs(block - decoded[start : start + 256]).max() <= step / 2 * (1 + 1e-6)


@pytest.mark.parametrize("bits, largest", [(4, 7), (8, 127)])
def test_error_of_a_gradient_falls_with_its_size(bits, largest):
    """The root is off by half a step at most: the value by the distance of two squares."""
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(1)) * 1e-3
    decoded = _true_values(_as_bytes(_quantized(values, bits)), values.numel(), bits)
    given = values.double().numpy()
    for start in range(0, len(given), 256):
        block = given[start : start + 256]
        step = np.sqrt(np.abs(block).max() * (1 + 2**-7)) / largest
        most = step / 2 * (2 * np.sqrt(np.abs(block)) + step / 2)
        assert (np.abs(block - decoded[start : start + 256]) <= most * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_what_is_not_finite(bits):
    assert not _quantized(torch.zeros(300), bits).any()
    assert not _quantized(torch.full((300,), -0.0), bits).any()
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 200, 255):
            values = torch.ones(256)
            values[place] = bad
            assert _as_bytes(_quantized(values, bits)) == NAN_RECORD_SCALE + bytes(256 * bits // 8)
    message = _quantized(torch.full((2,), 1e38), bits, scale=100.0)  # not finite after the product alone
    assert _as_bytes(message[:2]) == NAN_RECORD_SCALE


@pytest.mark.parametrize("bits", [4, 8])
def test_one_huge_value_is_kept_and_hides_its_block(bits):
    values = torch.randn(512, generator=torch.Generator().manual_seed(2))
    values[17] = 1e30
    decoded = _true_values(_as_bytes(_quantized(values, bits)), 512, bits)
    assert decoded[17] == pytest.approx(1e30, rel=2**-7)
    assert np.count_nonzero(decoded[:256]) == 1 and np.count_nonzero(decoded[256:]) > 200


@pytest.mark.parametrize("bits", [4, 8])
def test_sum_of_messages(bits):
    for numel in SIZES:
        for count in (1, 2, 4):
            messages = [_quantized(_values(numel, seed), bits) for seed in range(count)]
            expected = np.zeros(numel, dtype=np.float32)
            with np.errstate(over="ignore"):  # 3e38 four times is infinity
                for message in messages:
                    expected = expected + _true_values(_as_bytes(message), numel, bits).astype(np.float32)
            total = torch.full((numel,), 5.0)
            q.dequantize_sum(messages, total, bits)
            np.testing.assert_array_equal(total.numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_install(dtype, bits):
    for numel in SIZES:
        message = _message(numel, bits)
        q.encode(_values(numel, seed=3) * 1e-2, message, bits)
        live = torch.randn(numel, generator=torch.Generator().manual_seed(4)).to(dtype)
        before = live.clone()
        q.add_change(message, torch.tensor(False), live, bits)
        assert torch.equal(live, before)
        q.add_change(message, torch.tensor(True), live, bits)
        change = _true_values(_as_bytes(message), numel, bits, of_roots=False).astype(np.float32)
        expected = torch.from_numpy(before.float().numpy() + change).to(dtype)
        torch.testing.assert_close(live, expected, rtol=0, atol=0, equal_nan=True)


def _shard(numel):
    generator = torch.Generator().manual_seed(5)
    state = (torch.randn(numel, generator=generator) for _ in range(3))
    return AdamWShard(*(tensor.square() for tensor in state), torch.tensor(2.0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_change_of_the_estimate(dtype, bits):
    for numel in SIZES:
        shard = _shard(numel)
        before = [tensor.clone() for tensor in (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)]
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(6))
        live = shard.master.to(dtype)
        scale, message = torch.tensor(0.37), _message(numel, bits)
        weights = torch.empty(numel)
        adamw_estimate(shard, grad, HYPER, scale, torch.tensor(True), weights)
        q.adamw_estimate_change(shard, grad, HYPER, scale, torch.tensor(True), dtype, message, bits)
        assert _as_bytes(message) == _true_records(weights.numpy() - live.float().numpy(), bits)
        q.adamw_estimate_change(shard, grad, HYPER, torch.tensor(math.nan), torch.tensor(False), dtype, message, bits)
        assert not message.any()
        after = (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)
        assert all(torch.equal(old, now) for old, now in zip(before, after))


def _state(shard):
    return [shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step]


def _base_of(shard, dtype):
    """Weights near the master that no rounding of it gives."""
    noise = torch.randn(shard.master.numel(), generator=torch.Generator().manual_seed(7))
    return (shard.master + 0.05 * noise).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_change_of_the_estimate_from_given_weights(dtype, bits):
    for numel in SIZES:
        shard = _shard(numel)
        before = [tensor.clone() for tensor in _state(shard)]
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(6))
        base = _base_of(shard, dtype)
        kept = base.clone()
        weights, message = torch.empty(numel), _message(numel, bits)
        operands = (shard, grad, HYPER, torch.tensor(0.37), torch.tensor(True))
        adamw_estimate(*operands, weights)
        q.adamw_estimate_change(*operands, torch.float16, message, bits, base)
        assert _as_bytes(message) == _true_records(weights.numpy() - base.float().numpy(), bits)
        skipped = (shard, grad, HYPER, torch.tensor(math.nan), torch.tensor(False))
        q.adamw_estimate_change(*skipped, torch.float16, message, bits, base)
        assert not message.any() and torch.equal(base, kept)
        assert all(torch.equal(old, now) for old, now in zip(before, _state(shard)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_change_of_the_commit(dtype, bits):
    for numel in SIZES:
        shard, twin = _shard(numel), _shard(numel)
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(6))
        base = _base_of(shard, dtype)
        kept = base.clone()
        message = _message(numel, bits)
        for is_finite, scale in ((True, 0.37), (False, math.nan), (True, 1.0)):
            step = (grad, HYPER, torch.tensor(scale), torch.tensor(is_finite))
            adamw_commit(twin, *step, torch.empty(numel))
            q.adamw_commit_change(shard, *step, base, message, bits)
            assert all(torch.equal(mine, its) for mine, its in zip(_state(shard), _state(twin)))
            assert _as_bytes(message) == _true_records(twin.master.numpy() - base.float().numpy(), bits)
            assert torch.equal(base, kept)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_change_leaves_comes_with_the_next(dtype, bits):
    """The live weights stay within half a level of the master, however many changes they have added up."""
    numel = 1000
    shard = _shard(numel)
    live, message = shard.master.to(dtype), _message(numel, bits)
    generator = torch.Generator().manual_seed(8)
    for _ in range(40):
        before = live.clone()
        grad = torch.randn(numel, generator=generator)
        q.adamw_commit_change(shard, grad, HYPER, torch.tensor(0.37), torch.tensor(True), live, message, bits)
        q.add_change(message, torch.tensor(True), live, bits)
        changes = torch.nn.functional.pad(shard.master - before.float(), (0, -numel % q.BLOCK)).view(-1, q.BLOCK)
        step = (changes.abs().amax(1) / q.LARGEST_LEVEL[bits]).repeat_interleave(q.BLOCK)[:numel] * (1 + 2**-7)
        rounding = torch.finfo(dtype).eps / 2 * live.float().abs()
        assert ((live.float() - shard.master).abs() <= 0.5 * step + 1.01 * rounding + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_restart_at_every_shard(bits):
    """Messages of several shards lie in one buffer, and each block's scale is looked at."""
    shards, numel = 3, 600
    size, stride = q.message_bytes(numel, bits), q.message_stride(numel, bits)
    assert size <= stride < size + 16 and stride % 16 == 0
    whole = _message(0, bits).new_full((shards * stride,), 0x7F)
    for shard in range(shards):
        values = torch.full((numel,), 2.0 ** -(10 * shard))
        q.quantize(values, whole[shard * stride : shard * stride + size], bits)
        decoded = _true_values(_as_bytes(whole[shard * stride : shard * stride + size]), numel, bits)
        np.testing.assert_allclose(decoded, values.numpy(), rtol=2**-7)
    assert q.are_finite(whole, shards, numel, bits)
    for shard in range(shards):
        for block in range(3):
            bad = whole.clone()
            values = torch.ones(numel)
            values[min(256 * block + 255, numel - 1)] = math.inf
            q.quantize(values, bad[shard * stride : shard * stride + size], bits)
            assert not q.are_finite(bad, shards, numel, bits)
    levels = whole.clone()
    levels[2:size] |= 0x7F  # what looks like a NaN in the levels is none
    assert q.are_finite(levels, 1, 256, bits)
