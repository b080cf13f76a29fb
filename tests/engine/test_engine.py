# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The rest of DeepSpeed's engine: each feature against plain ZeRO-1, the float64 reference or torch, against the same
run without the feature, bit for bit, where the feature must change nothing, or refused. The table is in
docs/reference/engine-features.md."""

import pytest
import torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

from tests.engine.test_patches import _try
from tests.support import oracle, training

pytestmark = pytest.mark.timeout(240)
EXACT = ("losses", "norms", "replicas", "skipped")
# torch_adam: torch.optim.AdamW under DeepSpeed's ZeRO-1, for its own CPU operator would be compiled for minutes
STOCK = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}


# ---- what must not change a bit: activation checkpointing, torch.compile, JSON options, calls between the steps


class Checkpointed(training.Network):
    """The network with its middle part, which holds the tied weight, computed again in the backward."""

    kind = "reentrant"

    def _middle(self, h):
        return torch.tanh(self.again(torch.tanh(self.middle(h))) + self.frozen.sum())

    def forward(self, x, y):
        h = torch.tanh(self.first(x))
        if self.kind == "deepspeed":
            import deepspeed

            h = deepspeed.checkpointing.checkpoint(self._middle, h)
        else:
            h = checkpoint(self._middle, h, use_reentrant=self.kind == "reentrant")
        return (self.last(h) - y).square().mean()


class DroppingLayers(training.Network):
    """Takes what progressive layer drop and the legacy curriculum give a forward, and uses it."""

    def forward(self, x, y, progressive_layer_drop=False, pld_theta=1.0, curriculum_seqlen=4):
        return super().forward(x[:curriculum_seqlen], y[:curriculum_seqlen]) * (0.5 + pld_theta)


def _with_memory_breakdown(engine, window, micro_batch):
    """For one micro-batch: it collects the garbage at each of its lines."""
    engine._config.memory_breakdown = (window, micro_batch) == (1, 0)


def _module(kind):
    torch.manual_seed(5)
    if kind == "plain":
        return training.Network()
    if kind == "dropping":
        return DroppingLayers()
    module = Checkpointed()
    module.kind = kind
    return module


def _start(config, kind="plain", **arguments):
    import deepspeed

    import deepspeed_acco  # noqa: F401

    training.allow_fp16()
    module = _module(kind)
    if kind == "deepspeed":
        deepspeed.checkpointing.configure(None, partition_activations=False, contiguous_checkpointing=False)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=training.param_groups(module, 1), config=config, **arguments
    )
    return engine


def _calls_that_change_nothing(engine, window, micro_batch):
    from deepspeed.utils import safe_get_full_grad

    engine.allreduce_gradients()
    engine.set_train_micro_batch_size(4)
    engine.eval()
    engine.train()
    engine.dump_state()
    if micro_batch == engine.gradient_accumulation_steps() - 1:
        for p in engine.module.parameters():
            if p.requires_grad:
                safe_get_full_grad(p)


def _run(config, windows, kind="plain", precision="fp32", style="engine", backend=None, look=None):
    engine = _start(config, kind)
    if backend is not None:
        torch._dynamo.reset()  # else the code of the run before is taken
        torch._dynamo.utils.counters.clear()
        engine.compile(backend=backend)
    try:
        look = globals()[look] if look else None
        record = training.run_windows(engine, windows, precision, style=style, look=look)
        record["weights"] = training.true_master_weights(engine)
        record["compiled_frames"] = torch._dynamo.utils.counters["frames"]["ok"]
    finally:
        engine.destroy()
    return record


def _assert_same_bits(records, expected):
    for mine, theirs in zip(records, expected):
        for key in EXACT:
            assert mine[key] == theirs[key], key
        assert all(a.equal(b) for a, b in zip(mine["weights"], theirs["weights"]))


def _config(schedule="acco", clip=0.3, precision="fp32", **json):
    config = training.ds_config(4, clip, precision, schedule=schedule)
    zero = json.pop("zero_optimization", {})
    return {**config, **json, "zero_optimization": {"stage": 1, **zero}}


@pytest.mark.parametrize("style", ["engine", "torch"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "deepspeed"])
def test_activation_checkpointing(ranks, kind, style):
    expected = ranks(2).run(_run, config=_config(), windows=5)
    assert any(norm > 0.3 for norm in expected[0]["norms"]), "clipping must be at work"
    _assert_same_bits(ranks(2).run(_run, config=_config(), windows=5, kind=kind, style=style), expected)


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["wp", "dpu", "sync"])
@pytest.mark.parametrize("precision", ["fp32", "bf16+fp32", "fp16static"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "deepspeed"])
def test_activation_checkpointing_everywhere(ranks, kind, precision, schedule):
    config = _config(schedule, clip=0.0, precision=precision)
    expected = ranks(2).run(_run, config=config, windows=5, precision=precision)
    _assert_same_bits(ranks(2).run(_run, config=config, windows=5, precision=precision, kind=kind), expected)


@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_compile_eager_backend(ranks, schedule):
    """Dynamo traces the module and its hooks; the code that runs is the same, so the bits are."""
    expected = ranks(2).run(_run, config=_config(schedule), windows=5)
    compiled = ranks(2).run(_run, config=_config(schedule), windows=5, backend="eager")
    assert all(record["compiled_frames"] for record in compiled)
    _assert_same_bits(compiled, expected)


@pytest.mark.full
def test_compile_inductor(ranks):
    """Generated code rounds in another order."""
    expected = ranks(2).run(_run, config=_config(), windows=5)[0]
    compiled = ranks(2).run(_run, config=_config(), windows=5, backend="inductor")[0]
    assert compiled["losses"] == pytest.approx(expected["losses"], rel=1e-5)


NO_EFFECT = {
    "flops_profiler": {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "/dev/null"}},
    "wall_clock_breakdown": {"wall_clock_breakdown": True, "dump_state": True},
    "comms_logger": {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}},
}


@pytest.mark.parametrize("option", list(NO_EFFECT))
def test_options_that_change_nothing(ranks, option):
    expected = ranks(2).run(_run, config=_config(), windows=4)
    _assert_same_bits(ranks(2).run(_run, config=_config(**NO_EFFECT[option]), windows=4), expected)


@pytest.mark.parametrize("look", ["_calls_that_change_nothing", "_with_memory_breakdown"])
@pytest.mark.parametrize("precision", ["fp32", "bf16+fp32"])
def test_calls_that_change_nothing(ranks, precision, look):
    """``allreduce_gradients()`` above all: it must not reduce a second time."""
    config = _config(precision=precision)
    expected = ranks(2).run(_run, config=config, windows=4, precision=precision)
    _assert_same_bits(ranks(2).run(_run, config=config, windows=4, precision=precision, look=look), expected)


# ---- gradients: safe_get_full_grad and safe_set_full_grad


def _full_gradients(config, precision, windows=2):
    """safe_get_full_grad at each moment of each window, and this rank's micro-gradients by plain autograd."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    engine = _start(config)
    dtype = training.DTYPES[precision.partition("+")[0]]
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    n, scale = engine.gradient_accumulation_steps(), 0.0
    full, own, errors = [], [], []
    for window in range(windows):
        total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for micro_batch in range(n):
            x, y = training.batch(dist.get_rank(), window, micro_batch, dtype)
            loss = engine(x, y)
            copy = training.Network()
            copy.load_state_dict({name: p.detach() for name, p in engine.module.named_parameters()}, strict=False)
            copy.double()(x.double(), y.double()).backward()
            for i, p in enumerate(p for p in copy.parameters() if p.requires_grad):
                total[i] += 0 if p.grad is None else p.grad / n
            scale = getattr(engine.optimizer, "cur_scale", 1.0)
            engine.backward(loss)
            if micro_batch == n - 1:
                full.append([safe_get_full_grad(p).double().clone() / scale for p in parameters])
            engine.step()
        own.append(total)
        try:
            safe_get_full_grad(parameters[0])
        except ValueError as error:
            errors.append(str(error))
    engine.destroy()
    return full, own, errors


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16+fp32", "fp16static"])
def test_safe_get_full_grad_is_the_mean_over_the_ranks(ranks, precision):
    results = ranks(2).run(_full_gradients, config=_config(precision=precision), precision=precision)
    for window in range(2):
        mean = [sum(of_ranks) / 2 for of_ranks in zip(*(own[window] for _, own, _ in results))]
        mean, local = oracle.flatten(mean), oracle.flatten(results[0][1][window])
        tolerance = {"fp32": 1e-5, "fp16static": 5e-3}.get(precision, 8e-3)  # the dtype's forward and backward
        assert float((local - mean).norm() / mean.norm()) > 4 * tolerance, "one rank's own gradient must not pass"
        for full, _, _ in results:
            assert float((oracle.flatten(full[window]) - mean).norm() / mean.norm()) < tolerance
    for full, _, errors in results:
        assert all(a.equal(b) for a, b in zip(full[0], results[0][0][0])), "every rank gets the same"
        assert len(errors) == 2 and all("before engine.step()" in error for error in errors)


def _set_gradients(config, precision, windows):
    """Every step's gradient is replaced by one that is known."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    engine = _start(config)
    dtype = training.DTYPES[precision.partition("+")[0]]
    scale = getattr(engine.optimizer, "cur_scale", 1.0)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for window in range(windows):
        for micro_batch in range(4):
            engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch, dtype)))
            if micro_batch == 3:
                for i, p in enumerate(parameters):
                    value = _known_gradient(i, window, p) * scale
                    safe_set_full_grad(p, value)
                    torch.testing.assert_close(safe_get_full_grad(p), value, rtol=1e-2, atol=0)
            engine.step()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


def _known_gradient(i, window, like):
    return torch.linspace(-1, 1, like.numel()).view(like.shape) * 2.0 ** (i - window)


@pytest.mark.parametrize(
    ("schedule", "precision", "clip"),
    [("acco", "fp32", 0.3), ("wp", "bf16+fp32", 0.0), ("sync", "fp16static", 0.0), ("dpu", "fp32", 0.0)],
)
def test_safe_set_full_grad_is_what_the_step_takes(ranks, schedule, precision, clip):
    """Whatever the schedule: AdamW with these gradients gives these master weights."""
    config = _config(schedule, clip, precision)
    results = ranks(2).run(_set_gradients, config=config, precision=precision, windows=4)
    parameters = [p for p in training.make_network().to(training.DTYPES[precision.partition("+")[0]]).parameters()]
    parameters = [torch.nn.Parameter(p.detach().double()) for p in parameters if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, **training.HYPER)
    for window in range(4):
        for i, p in enumerate(parameters):
            p.grad = _known_gradient(i, window, p).double()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        adamw.step()
    tolerance = 1e-5 if precision == "fp32" else 5e-3  # the given gradients are rounded to the dtype sent
    for weights in results:
        assert oracle.distance(weights, [p.detach() for p in parameters]) < tolerance


def _backwards_after_the_boundary(precision):
    """A second backward of the window's last forward comes when p.grad was taken away; so does a user's zero_grad()."""
    import torch.distributed as dist

    engine = _start(_config(clip=0.0, precision=precision))
    dtype = training.DTYPES[precision.partition("+")[0]]
    for window in range(5):
        for micro_batch in range(4):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch, dtype))
            engine.backward(loss * 0.25, retain_graph=True)
            if micro_batch == 3:
                assert all(p.grad is None for p in engine.module.parameters()), "as in ZeRO-1"
                engine.zero_grad()
            engine.backward(loss * 0.5, retain_graph=True)
            engine.backward(loss * 0.25)
            engine.step()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


def test_backwards_after_the_boundary_are_counted(ranks):
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=5, n=4, a=2)
    for weights in ranks(2).run(_backwards_after_the_boundary, precision="fp32"):
        assert oracle.distance(weights, reference["weights"]) < 1e-5


# ---- optimizer state, learning rate, batch sizes in mid-training


def _set_states(config, windows):
    """Master weights and both moments are changed in mid-training, twice; the losses of what follows."""
    import torch.distributed as dist
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    engine = training.start_engine(config)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    losses = []
    for window in range(windows):
        for micro_batch in range(4):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        if window in (2, 5):
            for p in parameters:
                safe_set_full_fp32_param(p, safe_get_full_fp32_param(p) * 0.5)
                safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, "exp_avg") * -1, "exp_avg")
                safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, "exp_avg_sq") * 4, "exp_avg_sq")
    weights = [safe_get_full_fp32_param(p).clone() for p in parameters]
    try:
        safe_get_local_fp32_param(parameters[0])
        local = "no error"
    except AssertionError as error:
        local = str(error)
    engine.destroy()
    return losses, weights, local


def test_safe_set_full_state_as_zero1(ranks):
    stock = _config("sync")
    stock["optimizer"] = STOCK
    theirs = ranks(2).run(_set_states, config=stock, windows=8)
    mine = ranks(2).run(_set_states, config=_config("sync"), windows=8)
    plain = ranks(2).run(training.train, config=_config("sync"), windows=8)
    for (losses, weights, local), (stock_losses, stock_weights, stock_local), unset in zip(mine, theirs, plain):
        assert losses == pytest.approx(stock_losses, rel=2e-6)
        assert oracle.distance(weights, [w.double() for w in stock_weights]) < 1e-5
        assert losses[16:] != pytest.approx(unset["losses"][16:], rel=1e-2), "what was set must be felt"
        assert local == stock_local and "only defined for ZeRO-3" in local


@pytest.mark.parametrize(("schedule", "stale_windows"), [("acco", 1), ("wp", 2), ("dpu", 2)])
def test_safe_set_full_state_in_the_reference(ranks, schedule, stale_windows):
    """The next COMMIT starts from what is set. As in ZeRO-1 the forwards see it once that COMMIT is installed, and
    stand on the true weights of before until then."""
    results = ranks(2).run(_set_states, config=_config(schedule, clip=0.0), windows=8)
    left = 0

    def keep(run, report):
        nonlocal left
        left -= 1
        if left == 0:
            run.see = lambda weights: weights
        if run.window - 1 in (2, 5):
            before, left = run.theta[0], stale_windows
            run.see = lambda _: before
            run.theta, run.exp_avg, run.exp_avg_sq = [before * 0.5], [run.exp_avg[0] * -1], [run.exp_avg_sq[0] * 4]

    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=8, n=4, a=2, keep=keep)
    for _, weights, _ in results:
        assert oracle.distance(weights, reference["weights"]) < 1e-5
    assert results[0][0] == pytest.approx(reference["losses"], rel=1e-5)


def _set_to_zero(how):
    """Sets one parameter to 0 in mid-training; returns its largest value in each of the following windows' forwards."""
    import deepspeed_acco

    engine = training.start_engine(training.ds_config(1, lr=1e-3))
    training.run_windows(engine, 4)
    parameter = engine.module.first.weight
    before = parameter.detach().abs().max().item()
    if how == "master":
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, torch.zeros_like(parameter))
    else:
        with deepspeed_acco.true_weights(engine), torch.no_grad():
            parameter.zero_()
        engine.optimizer.refresh_fp32_params()
    following = []
    for window in range(4, 9):
        training.run_windows(engine, 1, first_window=window)
        following.append(parameter.detach().abs().max().item())
    engine.destroy()
    return before, following


@pytest.mark.parametrize("how", ["master", "module"])
def test_local_does_not_repeat_what_the_user_set(ranks, how):
    for before, following in ranks(2).run(_set_to_zero, how=how):
        # One window at the weights of before, until the commit that brings them; then at 0, not beyond it.
        assert before > 0.2 and all(value < 0.02 for value in following[1:]), following


def _write_and_refresh():
    """Writes one layer between two steps, without a look, and makes what stands in the module the master weights."""
    engine = training.start_engine(training.ds_config(1))
    training.run_windows(engine, 4)
    with torch.no_grad():
        engine.module.last.bias.fill_(0.5)
    engine.optimizer.refresh_fp32_params()
    live = training.live_weights(engine)
    true = training.true_master_weights(engine)
    engine.destroy()
    return live, true


def test_local_agrees_after_the_module_was_made_the_master(ranks):
    (live, true), (others, _) = ranks(2).run(_write_and_refresh)
    assert all(mine.equal(theirs) for mine, theirs in zip(live, others))
    assert all(mine.equal(theirs) for mine, theirs in zip(live, true))
    assert any((weights == 0.5).all() for weights in live)


def _set_lr(config, windows):
    engine = training.start_engine(config)
    lr = training.HYPER["lr"]
    record = {"losses": []}
    for window in range(windows):
        record["losses"] += training.run_windows(engine, 1, first_window=window)["losses"]
        lr *= 0.7
        engine.optimizer.set_lr(lr)  # while the window's COMMIT runs, which must keep the one it was started with
        assert engine.get_lr() == [lr]
    record["weights"] = training.true_master_weights(engine)
    engine.destroy()
    return record


@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_set_lr(ranks, schedule):
    results = ranks(2).run(_set_lr, config=_config(schedule, clip=0.0), windows=6)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=6, n=4, a=2, lr_decay=0.7)
    for record in results:
        assert oracle.distance(record["weights"], reference["weights"]) < 1e-5
    assert results[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5)


def _change_batch_sizes(config):
    """8 micro-batches a step, then 4, then 6; windows of one size follow each other, as DeepSpeed counts them."""
    engine = training.start_engine(config)
    record = training.run_windows(engine, 1)
    for batch_size, windows, first in ((32, 4, 1), (48, 2, 5)):
        engine.set_train_batch_size(batch_size)
        assert engine.gradient_accumulation_steps() == batch_size // 8
        engine.set_train_micro_batch_size(4)
        for key, values in training.run_windows(engine, windows, first_window=first).items():
            record[key] += values
    record["steps"], record["samples"] = engine.global_steps, engine.global_samples
    record["weights"] = training.true_master_weights(engine) if "schedule" in config["optimizer"]["params"] else None
    engine.destroy()
    return record


SIZES = [8] + [4] * 4 + [6] * 2


def test_set_train_batch_size_as_zero1(ranks):
    config = training.ds_config(8, 0.3, schedule="sync")
    stock = {**config, "optimizer": STOCK}
    mine, theirs = (ranks(2).run(_change_batch_sizes, config=c)[0] for c in (config, stock))
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=2e-6) and len(mine["losses"]) == sum(SIZES)
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert (mine["steps"], mine["samples"]) == (theirs["steps"], theirs["samples"]) == (7, 64 + 4 * 32 + 2 * 48)


@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_set_train_batch_size_moves_the_phases(ranks, schedule):
    records = ranks(2).run(_change_batch_sizes, config=training.ds_config(8, schedule=schedule))
    reference = oracle.run_reference(
        schedule=schedule, world_size=2, windows=7, n=SIZES, a=[size // 2 for size in SIZES], counts=SIZES
    )
    for record in records:
        assert oracle.distance(record["weights"], reference["weights"]) < 1e-5
    assert records[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5)


def _to_one_micro_batch(schedule):
    engine = training.start_engine(training.ds_config(4, schedule=schedule))
    losses = training.run_windows(engine, 2)["losses"]
    messages = []
    for batch_size in (8, 9):
        before = (engine.train_batch_size(), engine.gradient_accumulation_steps())
        try:
            engine.set_train_batch_size(batch_size)
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
            assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == before
    losses += training.run_windows(engine, 3, first_window=2)["losses"]
    weights = training.true_master_weights(engine)
    engine.destroy()
    return messages, losses, weights


def test_one_micro_batch_in_mid_training_is_refused(ranks):
    messages, losses, weights = ranks(2).run(_to_one_micro_batch, schedule="acco")[0]
    assert 'gradient_accumulation_steps = 1 is not allowed with optimizer.params.schedule = "acco"' in messages[0]
    assert "divisible" in messages[1]
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=5, n=4, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5, "the refusal must leave training as it was"
    messages, losses, _ = ranks(2).run(_to_one_micro_batch, schedule="wp")[0]
    assert messages[0] == "no error" and len(losses) == 8 + 3


# ---- torch_autocast, compute_grad_norm, sequence parallelism, curricula


def test_torch_autocast_as_zero1(ranks):
    """In ZeRO-1 what autocast runs in bf16 is also reduced in bf16; ACCO reduces in communication_data_type."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "communication_data_type": "fp32"}
    stock = _config("sync", **autocast)
    stock["optimizer"] = STOCK
    theirs = ranks(2).run(training.train_stock, config=stock, windows=8)[0]
    mine = ranks(2).run(training.train, config=_config("sync", **autocast), windows=8)[0]
    plain = ranks(2).run(training.train, config=_config("sync"), windows=8)[0]
    assert mine["losses"][:4] == theirs["losses"][:4], "the same forward"
    assert mine["losses"][:4] != plain["losses"][:4], "autocast must be at work"
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=2e-2)
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=2e-2)


@pytest.mark.parametrize("schedule", ["acco", "dpu"])
def test_torch_autocast_overlaps_with_the_same_bits(ranks, schedule):
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    config = _config(schedule, **autocast)
    expected = ranks(2).run(_run, config=config, windows=4)
    inline = _config(schedule, **autocast)
    inline["optimizer"]["params"]["lane"] = "inline"
    _assert_same_bits(ranks(2).run(_run, config=inline, windows=4), expected)


def _without_norms(config, windows):
    engine = training.start_engine(config)
    engine.get_global_grad_norm, norms = lambda: 0.0, []
    record = training.run_windows(engine, windows, look=lambda *_: norms.append(engine._global_grad_norm))
    record["weights"] = training.true_master_weights(engine)
    record["last_norm"] = engine._global_grad_norm
    engine.destroy()
    return record


def _has_compute_grad_norm():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "compute_grad_norm" in DeepSpeedZeroConfig.model_fields


@pytest.mark.skipif(not _has_compute_grad_norm(), reason="this DeepSpeed has no compute_grad_norm")
def test_compute_grad_norm_off(ranks):
    expected = ranks(2).run(training.train, config=_config(clip=0.0), windows=4)
    config = _config(clip=0.0, zero_optimization={"compute_grad_norm": False})
    for mine, theirs in zip(ranks(2).run(_without_norms, config=config, windows=4), expected):
        assert mine["last_norm"] is None and theirs["norms"][-1] > 0
        assert mine["losses"] == theirs["losses"]
        assert all(a.equal(b) for a, b in zip(mine["weights"], theirs["weights"]))


class SequenceParallelUnit:
    """Two ranks that share one sequence: a data-parallel group of one rank, a sequence group of both."""

    def __init__(self):
        import torch.distributed as dist

        groups = [dist.new_group([rank]) for rank in range(2)]
        self.alone, self.both = groups[dist.get_rank()], dist.new_group([0, 1])
        self.rank = dist.get_rank()

    def initialize_sequence_parallel(self):
        raise AssertionError("only its existence counts")

    def get_data_parallel_group(self):
        return self.alone

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_rank(self):
        return 0

    def get_model_parallel_world_size(self):
        return 1

    def get_model_parallel_rank(self):
        return 0

    def get_model_parallel_group(self):
        return self.alone

    def get_sequence_parallel_group(self):
        return self.both

    def get_sequence_parallel_world_size(self):
        return 2

    def get_sequence_parallel_rank(self):
        return self.rank

    def get_sequence_data_parallel_group(self):
        return self.both

    def get_sequence_data_parallel_world_size(self):
        return 2

    def get_sequence_data_parallel_rank(self):
        return self.rank


def _sequence_parallel(config, windows):
    from deepspeed.utils import groups

    engine = training.start_engine(config, mpu=SequenceParallelUnit())
    try:
        record = training.run_windows(engine, windows)
        is_acco = "schedule" in config["optimizer"]["params"]
        record["weights"] = training.true_master_weights(engine) if is_acco else None
        engine.destroy()
        return record
    finally:
        groups.mpu = None


def test_sequence_parallelism_as_zero1(ranks):
    """The group is the one of sequence and data; the divisor is that of the data alone."""
    config = _config("sync")
    stock = {**config, "optimizer": STOCK}
    mine, theirs = (ranks(2).run(_sequence_parallel, config=c, windows=6)[0] for c in (config, stock))
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=2e-6)
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert mine["replicas"] == pytest.approx(theirs["replicas"], rel=1e-5)


def _refused_sequence_parallel(config):
    try:
        _sequence_parallel(config, windows=1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_sequence_parallelism_needs_the_same_weights(ranks):
    for n in (1, 4):
        message = ranks(2).run(_refused_sequence_parallel, config=training.ds_config(n, schedule="local"))[0]
        assert 'sequence parallelism = 2 is not allowed; allowed: 1 with optimizer.params.schedule = "local"' in message


def test_sequence_parallelism_in_the_reference(ranks):
    records = ranks(2).run(_sequence_parallel, config=training.ds_config(4, schedule="acco", eps=1e-2), windows=6)
    reference = oracle.run_reference(
        schedule="acco", world_size=2, windows=6, n=4, a=2, eps=1e-2, send=lambda total: total * 2
    )
    for record in records:
        assert oracle.distance(record["weights"], reference["weights"]) < 1e-5


CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 1,
    "max_difficulty": 4,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 1},
}


REMOVED_LATER = {
    "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.5},
    "curriculum_learning": CURRICULUM,
    "eigenvalue": {"enabled": True},
}


@pytest.mark.parametrize("option", list(REMOVED_LATER))
def test_options_that_newer_deepspeeds_removed(ranks, option):
    """Where DeepSpeed has them, the engine gives both to the forward, as in ZeRO-1 (an eigenvalue is used by quantized
    training alone). DeepSpeed 0.19.8 refuses these keys itself, whatever the optimizer."""
    from deepspeed.runtime import config as ds_config

    changed = _config("sync", **{option: REMOVED_LATER[option]})
    if hasattr(ds_config, "_reject_removed_config_keys"):
        name, message = ranks(2).run(_try, config=changed)[0]
        assert name == "DeepSpeedConfigError" and "has been removed" in message and option in message
        return
    if option == "eigenvalue":
        pytest.skip("compute_eigenvalue() is only reached with quantize_training, which needs CUDA kernels")
    # Stage 0: the stage 1 of these versions fails by itself with newer versions of torch.
    stock = {**changed, "optimizer": STOCK, "zero_optimization": {"stage": 0}}
    theirs, mine, plain = (
        ranks(2).run(_dropping, config=config, windows=8)[0] for config in (stock, changed, _config("sync"))
    )
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=2e-6)
    assert mine["losses"] != pytest.approx(plain["losses"], rel=1e-3), "the option must be felt"


def _dropping(config, windows):
    engine = _start(config, "dropping")
    record = training.run_windows(engine, windows)
    engine.destroy()
    return record


class CountedTokens(torch.utils.data.Dataset):
    """Every sample is known by its number."""

    def __len__(self):
        return 512

    def __getitem__(self, i):
        x, y = training.batch(0, 50 + i, 0)
        return x[0], y[0]


def _data_efficiency(config, windows):
    """The data loader of the engine, whose batches the curriculum cuts down; it must see the steps as in ZeRO-1."""
    import deepspeed

    import deepspeed_acco  # noqa: F401

    module = _module("plain")
    engine, _, loader, _ = deepspeed.initialize(
        model=module,
        model_parameters=training.param_groups(module, 1),
        config=config,
        training_data=CountedTokens(),
    )
    difficulties = []

    def cut(data, state):
        difficulties.append(state["current_difficulties"]["features"])
        return [data[0] * (torch.arange(training.FEATURES) < difficulties[-1]), data[1]]

    engine.set_data_post_process_func(cut)
    losses, batches = [], iter(loader)
    for _ in range(windows):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(*next(batches))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
    engine.destroy()
    return losses, difficulties


def test_data_efficiency_curriculum_as_zero1(ranks, tmp_path):
    metric = {
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        "min_difficulty": 1,
        "max_difficulty": training.FEATURES,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 1},
    }
    curriculum = {"enabled": True, "data_cluster_path": str(tmp_path), "curriculum_metrics": {"features": metric}}
    sampling = {"enabled": True, "num_workers": 0, "curriculum_learning": curriculum}
    config = _config("sync", data_efficiency={"enabled": True, "seed": 3, "data_sampling": sampling})
    mine, difficulties = ranks(2).run(_data_efficiency, config=config, windows=6)[0]
    theirs, _ = ranks(2).run(_data_efficiency, config={**config, "optimizer": STOCK}, windows=6)[0]
    assert mine == pytest.approx(theirs, rel=2e-6)
    assert len(set(difficulties)) > 3, "the curriculum must move"


def _random_ltd(config, windows):
    """The engine moves the schedule of kept tokens at each forward; the layer that drops them needs CUDA, so this one,
    which asks the same schedule, stands in for it."""
    import deepspeed
    from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop

    import deepspeed_acco  # noqa: F401

    class Dropping(RandomLayerTokenDrop):
        def forward(self, h):
            kept.append(self.random_ltd_scheduler.get_current_seq())
            h = self.random_ltd_layer(h)
            return h * (torch.arange(h.shape[-1]) < kept[-1])

    kept = []
    module = _module("plain")
    module.first = Dropping(module.first)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=training.param_groups(module, 1), config=config)
    engine.random_ltd_initialize()
    record = training.run_windows(engine, windows)
    engine.destroy()
    return record["losses"], kept


def test_random_ltd_schedule_as_zero1(ranks):
    schedule = {
        "min_value": 3,
        "max_value": training.HIDDEN,
        "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 5, "seq_per_step": 2},
    }
    random_ltd = {
        "enabled": True,
        "total_layer_num": 2,
        "random_ltd_layer_num": 1,
        "random_ltd_layer_id": ["first"],  # the engine looks for these in the modules' names
        "model_mask_name": None,
        "model_type": "decoder",
        "hidden_state_order": "batch_seq_dim",
        "random_ltd_schedule": schedule,
        "layer_token_lr_schedule": {"enabled": False, "total_layer_tokens": 10**6, "warmup_type": "linear"},
    }
    config = _config(
        "sync", data_efficiency={"enabled": True, "data_routing": {"enabled": True, "random_ltd": random_ltd}}
    )
    mine, kept = ranks(2).run(_random_ltd, config=config, windows=6)[0]
    theirs, kept_by_stock = ranks(2).run(_random_ltd, config={**config, "optimizer": STOCK}, windows=6)[0]
    assert mine == pytest.approx(theirs, rel=2e-6)
    assert kept == kept_by_stock and len(set(kept)) > 3


# ---- what is refused


def _refused_calls():
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    engine = training.start_engine(training.ds_config(4))
    training.run_windows(engine, 1)
    messages = {}

    def note(name, call):
        try:
            call()
            messages[name] = "no error"
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"

    def coalesce():
        with engine.coalesce_grad_reduction():
            raise AssertionError("entered")

    note("offload_states", lambda: engine.optimizer.offload_states(device=OffloadDeviceEnum.cpu))
    if hasattr(type(engine), "coalesce_grad_reduction"):
        note("coalesce_grad_reduction", coalesce)
    training.run_windows(engine, 2, first_window=1)
    weights = training.true_master_weights(engine)
    engine.destroy()
    return messages, weights


def test_refused_calls_leave_training_as_it_was(ranks):
    messages, weights = ranks(2).run(_refused_calls)[0]
    assert messages["offload_states"].startswith("RuntimeError: ACCO: offload_states() is not supported")
    if "coalesce_grad_reduction" in messages:  # DeepSpeed's own error
        assert messages["coalesce_grad_reduction"].startswith("NotImplementedError")
        assert "AccoZeroOptimizer" in messages["coalesce_grad_reduction"]
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=3, n=4, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


class OnlyTensorParallelUnit(SequenceParallelUnit):
    """A newer Megatron's: it knows sequence parallelism, and tensor parallelism by its long name alone."""

    get_model_parallel_world_size = property()

    def get_tensor_model_parallel_world_size(self):
        return 2


def _with_mpu(kind):
    from deepspeed.utils import groups

    try:
        engine = training.start_engine(training.ds_config(4), mpu=globals()[kind]())
        engine.destroy()
    except ValueError as error:
        return str(error)
    finally:
        groups.mpu = None
    return "no error"


def test_tensor_beside_sequence_parallelism_is_refused(ranks):
    for message in ranks(2).run(_with_mpu, kind="OnlyTensorParallelUnit"):
        assert message == (
            "ACCO: mpu.get_tensor_model_parallel_world_size() = 2 is not allowed; allowed: 1 where the mpu has "
            "sequence parallelism. Use one of the two"
        )


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "meta"])
def test_devices_other_than_cpu_and_cuda_are_refused(ranks, device):
    assert ranks(1).run(_with_device, device=device) == [
        f"ACCO: device = {device!r} is not allowed; allowed: cpu, cuda. Use the AdamW optimizer there"
    ]


def _with_device(device):
    """No such device is here: an engine that was made is asked again as if it stood on one."""
    from deepspeed_acco.engine import patches as plugin

    engine = training.start_engine(training.ds_config(4))
    kept, engine.device = engine.device, torch.device(device)
    try:
        plugin.check_engine(engine, engine.optimizer.optimizer)
    except ValueError as error:
        return str(error)
    finally:
        engine.device = kept
        engine.destroy()
    return "no error"
