# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank predicts of the next weights, in plain PyTorch and by the native CPU kernels."""

import pytest
import torch

from deepspeed_acco.optim import local_prediction as plain
from deepspeed_acco.optim.adamw import AdamWHyper
from tests.support import local_prediction_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, same_bits
from tests.support.local_prediction_checks import SHARDS, STEPS, Case


@pytest.fixture(params=["plain", pytest.param("native", marks=pytest.mark.native)])
def path(request):
    return plain if request.param == "plain" else request.getfixturevalue("native")


@pytest.mark.parametrize("step", STEPS)
def test_roots(path, step):
    for numel in SHARDS:
        checks.check_roots(path, numel, step)


def test_roots_without_eps_are_positive(path):
    checks.check_roots(path, 600, 3.0, hyper=AdamWHyper(eps=0.0))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_prediction(path, weight_dtype, grad_dtype, shift):
    for shard_numel, step in zip(SHARDS, STEPS * 2):
        checks.check_prediction(path, shard_numel, 3, weight_dtype, grad_dtype, step, shift=shift)


@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_a_gradient_that_is_not_finite_has_no_part(path, weight_dtype, grad_dtype):
    checks.check_not_finite(path, weight_dtype, grad_dtype)


@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_a_weight_that_is_not_finite_goes_no_further(path, weight_dtype, grad_dtype):
    checks.check_distance_that_is_not_finite(path, weight_dtype, grad_dtype)


@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_the_kernel_has_the_bits_of_the_plain_path(native, weight_dtype, grad_dtype):
    checks.check_plain_path(native, weight_dtype, grad_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
def test_distances_in_16_bits_go_away(path, ranks, dtype):
    """Without gradients a rank comes back to the true weights, also from one unit in the last place."""
    newest = torch.linspace(-0.9, 1.1, 512).to(dtype)
    live = torch.stack([newest * (1 + units * torch.finfo(dtype).eps) for units in (1, -1, 2, 30)])
    kept, step = plain.kept_part(ranks, dtype), torch.tensor(1e6)
    hyper, one, true = AdamWHyper(lr=1e-2, beta1=0.99), torch.tensor(1.0), torch.tensor(True)
    for stands_at in live:
        assert not same_bits(stands_at, newest)
        for _ in range(10):
            on = plain.Operands(newest, newest.clone(), stands_at, newest * 0, torch.ones(2), step, 512)
            path.predict_locally(on, hyper, kept, one, true)
        assert same_bits(stands_at, newest)


@pytest.mark.parametrize(
    ("ranks", "of_fp32", "of_bf16"), [(1, 1.0, 0.5), (2, 1.0, 0.5), (4, 0.5, 0.5), (16, 0.125, 0.125)]
)
def test_many_ranks_keep_less(ranks, of_fp32, of_bf16):
    kept = [plain.kept_part(ranks, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert kept == [of_fp32, of_bf16]


def test_on_one_rank_it_is_adamws_next_step(path):
    """Where all elements of a block are alike and nothing is clipped, root and gradient are AdamW's own."""
    parameter = torch.nn.Parameter(torch.full((256,), 0.5))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.8, 0.97), weight_decay=0.0)
    hyper = AdamWHyper(lr=1e-2, beta1=0.8, beta2=0.97, weight_decay=0.0)
    before, one, true = parameter.detach().clone(), torch.tensor(1.0), torch.tensor(True)
    for step in range(40):
        newest = parameter.detach().clone()
        moments = optimizer.state[parameter]
        roots, count = torch.zeros(1), torch.tensor(float(step))
        squares = moments["exp_avg_sq"].detach() if moments else torch.zeros(256)
        path.block_roots(squares, count, 0.97, 1e-8, roots)
        gradient = torch.full((256,), 0.3 + 0.001 * step)
        predicted = newest.clone()
        on = plain.Operands(newest, before, predicted, gradient, roots, count, 256)
        path.predict_locally(on, hyper, 1.0, one, true)
        parameter.grad = gradient
        optimizer.step()
        moved, missed = (parameter.detach() - newest).norm(), (predicted - parameter.detach()).norm()
        # The root lacks the newest gradient, and momentum is over the root of one step before.
        assert missed < 0.02 * moved, step


def test_bits_do_not_depend_on_threads(path):
    results = []
    for threads in (1, 2, 5):
        before, case = torch.get_num_threads(), Case(2**16 + 3, 3, torch.bfloat16, torch.float32)
        torch.set_num_threads(threads)
        try:
            case.run(path)
            roots = torch.zeros(plain.block_count(case.numel))
            path.block_roots(case.grad.abs(), case.step, 0.95, 1e-8, roots)
        finally:
            torch.set_num_threads(before)
        results.append((case.live, roots))
    for live, roots in results[1:]:
        assert same_bits(live, results[0][0]) and same_bits(roots, results[0][1])


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(("name", "written"), [("block_roots", ["roots"]), ("predict_locally", ["before", "live"])])
def test_schemas_say_what_is_written(native, name, written):
    schema = getattr(torch.ops.deepspeed_acco, name).default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == written


def test_refusals(native):
    case = Case(300, 2, torch.float32, torch.float32)
    for name, bad, message in (
        ("roots", case.roots[:3], "roots has 3 elements, expected 4"),
        ("roots", case.roots.double(), "dtype Double"),
        ("grad", case.grad[:-1], "grad has 599 elements, expected 600"),
        ("before", case.before.bfloat16(), "must have one dtype"),
        ("step", case.step.double(), "step must be 0-dim of dtype Float"),
        ("shard_numel", 7, "600 elements are not whole shards of 7"),
    ):
        other = Case(300, 2, torch.float32, torch.float32)
        setattr(other, name, bad)
        with pytest.raises(ValueError, match=message):
            other.run(native)
