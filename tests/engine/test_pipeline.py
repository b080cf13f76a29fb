"""PipelineModule with one stage: trains as ZeRO-1's and as a plain loop, evaluates, resumes; several are refused."""

import itertools
import os

import deepspeed
import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional

from tests.support import training
from tests.support.checkpoints import (
    SHORT,
    exchanged,
    fingerprint,
    resumed_beside_uninterrupted,
    same_state,
    whole_state,
)
from tests.support.training import FEATURES, HIDDEN, TARGETS

pytestmark = pytest.mark.timeout(240)

WINDOWS, EVALUATED = 6, (1, 2, 4)  # after which windows
VERSION = Version(deepspeed.__version__)


def _loss(outputs, targets):
    return (outputs - targets).square().mean()


def _transposed(tied, h):
    return functional.linear(h, tied.weight.t())


class Plain(nn.Module):
    """The network of :func:`_pipeline_module`, its parameters in the same order."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.last = nn.Linear(HIDDEN, TARGETS)

    def forward(self, x, y):
        h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return _loss(self.last(torch.tanh(_transposed(self.middle, h))), y)


def _direct(tied, h):
    return functional.linear(h, tied.weight)


def _pipeline_module(stages=1, interval=0, first_use=None, is_megatrons=False, parts=1):
    """Returns the network as a PipelineModule.

    Args:
        first_use: the forward_fn of the tied layer's first use; None: its own forward.
        is_megatrons: the topology has an axis of tensor parallelism, as GPT-NeoX and Megatron-DeepSpeed make it.
        parts: so many ranks lie along it; each has all layers here, as it has norms and biases of a model in parts.
    """
    import torch.distributed as dist
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed("gloo")
    topology = PipeModelDataParallelTopology(stages, parts, dist.get_world_size() // stages // parts)
    layers = [
        *(LayerSpec(nn.Linear, FEATURES, HIDDEN), torch.tanh),
        *(TiedLayerSpec("middle", nn.Linear, HIDDEN, HIDDEN, bias=False, forward_fn=first_use), torch.tanh),
        *(TiedLayerSpec("middle", nn.Linear, HIDDEN, HIDDEN, bias=False, forward_fn=_transposed), torch.tanh),
        LayerSpec(nn.Linear, HIDDEN, TARGETS),
    ]
    return PipelineModule(
        layers,
        None if is_megatrons else stages,
        topology if is_megatrons else None,
        loss_fn=_loss,
        partition_method="uniform",
        activation_checkpoint_interval=interval,
    )


def _start(config, kind="pipeline", seed=5, **module_arguments):
    from deepspeed.utils import groups

    import deepspeed_acco  # noqa: F401

    groups.mpu = None  # of another test's engine
    training.allow_fp16()
    module = Plain() if kind == "plain" else _pipeline_module(**module_arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator))
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config=config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    return engine


def _finish(engine, record):
    from deepspeed.utils import groups

    record |= {"state": whole_state(engine), "live": training.live_weights(engine), "lr": engine.get_lr()}
    engine.destroy()
    groups.mpu = None
    return record


def _batches(engine, window, rank):
    dtype = next(engine.module.parameters()).dtype
    return [training.batch(rank, window, each, dtype) for each in range(engine.gradient_accumulation_steps())]


def _train(engine, windows, evaluated=(), first_window=0):
    """Trains by ``train_batch``, or in a plain loop; returns what both have."""
    import torch.distributed as dist

    rank, is_pipeline = dist.get_rank(), not isinstance(engine.module, Plain)
    record = {"losses": [], "means": [], "evaluated": [], "norms": []}
    for window in range(first_window, first_window + windows):
        batches = _batches(engine, window, rank)
        if is_pipeline:
            record["means"].append(engine.train_batch(iter(batches)).item())
            record["losses"] += [loss.item() for loss in engine.fwd_outputs]
        else:
            for x, y in batches:
                loss = engine(x, y)
                # Before 0.18.9 train_batch() does not divide the gradients by n.
                engine.backward(loss, scale_wrt_gas=VERSION >= Version("0.18.9"))
                engine.step()
                record["losses"].append(loss.item())
        record["norms"].append(float(engine.get_global_grad_norm()))
        if window in evaluated:
            record["evaluated"] += _evaluate(engine, window)
    return record


def _evaluate(engine, window):
    """Returns the losses of the micro-batches of a batch that training has not; beside a plain loop those of a copy
    with the master weights, so that nobody looks at its module."""
    import torch.distributed as dist

    batches = _batches(engine, 1000 + window, dist.get_rank())
    if isinstance(engine.module, Plain):
        copy = Plain()
        with torch.no_grad():
            for param, (master, *_) in zip(copy.parameters(), whole_state(engine)["states"].values(), strict=True):
                param.copy_(master)
            losses = [copy.to(batches[0][0].dtype)(x, y) for x, y in batches]
    else:
        losses = engine.eval_batch(iter(batches), reduce_output=None, bcast_loss=False)
    return [loss.item() for loss in losses]


# ---- as ZeRO-1's


def _stock(config):
    return {**config, "optimizer": {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}}


def _beside_zero1(config):
    mine = _start(config)
    mine = _finish(mine, _train(mine, WINDOWS, EVALUATED))
    theirs = _start(_stock(config))
    return mine, _finish(theirs, _train(theirs, WINDOWS, EVALUATED))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.full)])
def test_sync_is_zero1(ranks, precision):
    config = training.ds_config(3, 2.0, precision, schedule="sync")
    for mine, theirs in ranks(2).run(_beside_zero1, config=config):
        for key in ("losses", "means", "evaluated", "norms", "lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-6 if precision == "fp32" else 2e-2), key
        for name, (master, *_) in theirs["state"]["states"].items():
            assert torch.allclose(mine["state"]["states"][name][0], master, atol=1e-6 if precision == "fp32" else 1e-3)


# ---- as a plain loop


def _beside_plain_loop(config):
    engines = [_start(config, "pipeline"), _start(config, "plain")]
    return [_finish(engine, _train(engine, WINDOWS, EVALUATED)) for engine in engines]


@pytest.mark.parametrize(
    ("schedule", "n", "precision"),
    [
        ("auto", 4, "fp32"),
        ("auto", 1, "fp32"),
        *(
            pytest.param(schedule, n, precision, marks=pytest.mark.full)
            for schedule, n, precision in (
                *(("acco", 2, "bf16"), ("acco", 5, "fp16"), ("wp", 4, "fp32"), ("dpu", 3, "bf16+fp32")),
                *(("local", 3, "bf16"), ("sync", 1, "fp32")),
            )
        ),
    ],
)
def test_trains_as_a_plain_loop_bit_for_bit(ranks, schedule, n, precision):
    config = training.ds_config(n, 2.0, precision, schedule=schedule)
    pairs = ranks(2).run(_beside_plain_loop, config=config)
    assert pairs[0][0]["losses"] != pairs[1][0]["losses"], "the ranks have data of their own"
    for pipeline, plain in pairs:
        of_all_ranks = zip(*(record["losses"] for record, _ in pairs))
        means = [sum(map(sum, window)) / (2 * n) for window in zip(*[of_all_ranks] * n)]
        assert pipeline["means"] == pytest.approx(means, rel=1e-6 if precision == "fp32" else 1e-2)
        for key in ("losses", "evaluated", "norms", "lr"):
            assert pipeline[key] == plain[key], key
        assert len(pipeline["evaluated"]) == n * len(EVALUATED)
        assert all(a.equal(b) for a, b in zip(pipeline["live"], plain["live"], strict=True))
        mine, theirs = (list(record["state"]["states"].values()) for record in (pipeline, plain))
        assert all(a.equal(b) for one, other in zip(mine, theirs, strict=True) for a, b in zip(one, other))


def _with_activation_checkpointing(config):
    losses = []
    for interval, use_reentrant in ((0, True), (7, True), (7, False), (3, False), (3, True)):
        engine = _start({**config, "pipeline": {"use_reentrant": use_reentrant}}, interval=interval)
        losses.append(_finish(engine, _train(engine, 3))["losses"])
    return losses


@pytest.mark.skipif(VERSION < Version("0.19"), reason="before DeepSpeed 0.19 its own checkpointing fails on CPUs")
def test_activation_checkpointing_changes_nothing(ranks):
    for plain, *same, split in ranks(2).run(_with_activation_checkpointing, config=training.ds_config(4, 2.0)):
        assert same == [plain] * 3
        # The uses of the tied weight are in two reentrant parts, so its gradient is summed in another order.
        assert split == pytest.approx(plain, rel=1e-6)


def _in_parts(config, stock):
    """Trains both with two ranks for each copy of the model, which then have the same batches."""
    records = []
    for of in (config, stock):
        engine = _start(of, is_megatrons=True, parts=2)
        replica = engine.mpu.get_data_parallel_rank()
        record = {"losses": [], "norms": [], "replica": replica}
        for window in range(WINDOWS):
            batches = [training.batch(replica, window, each) for each in range(engine.gradient_accumulation_steps())]
            record["losses"].append(engine.train_batch(iter(batches)).item())
            record["norms"].append(float(engine.get_global_grad_norm()))
        records.append(_finish(engine, record))
    return records


@pytest.mark.full
def test_a_model_in_parts_is_zero1(ranks):
    """What no rank has a part of counts once in the norm: here everything."""
    config = training.ds_config(3, 0.3, schedule="sync")
    alone = ranks(2).run(_beside_zero1, config=config)
    for mine, theirs in ranks(4).run(_in_parts, config=config, stock=_stock(config)):
        for key in ("losses", "norms"):
            assert mine[key] == pytest.approx(theirs[key], rel=3e-6), key
        assert mine["norms"] == pytest.approx(alone[mine["replica"]][0]["norms"], rel=3e-6)


# ---- checkpoints

BEFORE, AFTER = SHORT


def _train_and_evaluate(engine, windows, first_window):
    return _train(engine, windows, EVALUATED, first_window)


def _resume(config, folder, is_megatrons):
    def start(seed):
        return _start(config, seed=seed, is_megatrons=is_megatrons)

    return resumed_beside_uninterrupted(start, _train_and_evaluate, _finish, folder)


@pytest.mark.parametrize(
    ("schedule", "precision", "is_megatrons"),
    [
        ("acco", "fp32", False),
        ("local", "bf16", True),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("acco", "fp16", True), ("wp", "bf16", False), ("sync", "fp32", False))
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, schedule, precision, is_megatrons, tmp_path):
    config = training.ds_config(4, 2.0, precision, schedule=schedule)
    run = dict(config=config, folder=str(tmp_path), is_megatrons=is_megatrons)
    for plain, *others in ranks(2).run(_resume, **run):
        for other in others:
            for key in ("losses", "means", "evaluated", "norms", "lr"):
                assert other[key] == plain[key], key
            assert all(a.equal(b) for a, b in zip(other["live"], plain["live"], strict=True))
            assert same_state(other["state"], plain["state"])
    files, axis = {path.name for path in (tmp_path / f"global_step{BEFORE}").iterdir()}, "model_00-" * is_megatrons
    assert {f"layer_{index:02d}-{axis}model_states.pt" for index in (0, 2, 6)} <= files


def _exchange(config, stock, folder):
    def start(config, seed):
        return _start(config, seed=seed)

    return exchanged(start, _train_and_evaluate, _finish, (config, stock), folder)


@pytest.mark.full
def test_from_zero1_and_back(ranks, tmp_path):
    config = training.ds_config(2, schedule="sync")
    for pairs in ranks(2).run(_exchange, config=config, stock=_stock(config), folder=str(tmp_path)):
        for saver, loader in pairs:
            assert loader == pytest.approx(saver, rel=2e-6)


def _resume_unsaved(config, folder):
    """Does the same without a training in between, with a tied layer of which DeepSpeed writes no file."""
    engine = _start(config, first_use=_direct)
    _train(engine, BEFORE, (BEFORE - 1,))
    engine.save_checkpoint(folder)
    evaluated = _evaluate(engine, BEFORE)
    plain = _finish(engine, _train(engine, AFTER, EVALUATED, BEFORE))
    engine = _start(config, seed=9, first_use=_direct)
    engine.load_checkpoint(folder)
    assert _evaluate(engine, BEFORE) == evaluated
    return plain, _finish(engine, _train(engine, AFTER, EVALUATED, BEFORE))


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["acco", "local"])
def test_a_resumed_run_of_commits_in_8_bits_is_the_uninterrupted_one(ranks, schedule, tmp_path):
    config = training.ds_config(4, 2.0, "bf16", schedule=schedule, commit_comm="int8")
    for plain, *others in ranks(2).run(_resume, config=config, folder=str(tmp_path), is_megatrons=False):
        for other in others:
            assert other["losses"] == plain["losses"] and other["evaluated"] == plain["evaluated"]
            assert same_state(other["state"], plain["state"])


def test_a_tied_layer_without_a_file_is_resumed(ranks, tmp_path):
    for schedule in ("acco", "sync"):
        folder = tmp_path / schedule
        config = training.ds_config(2, schedule=schedule)
        for plain, resumed in ranks(2).run(_resume_unsaved, config=config, folder=str(folder)):
            assert resumed["losses"] == plain["losses"] and resumed["evaluated"] == plain["evaluated"]
            assert same_state(resumed["state"], plain["state"])
        assert {path.name for path in folder.rglob("layer_*")} == {f"layer_{at:02d}-model_states.pt" for at in (0, 6)}


def _cut_renaming(folder):
    """Saves under a tag again, and loads what kills of the ranks between any of their renamings would have left.

    Returns:
        The files by rank in their order; the first of all; and what loading told, by how many each rank had renamed.
    """
    import shutil
    import time
    from unittest import mock

    import torch.distributed as dist

    def rename(source, target):
        if "mp_rank_00_model" in target and "zero" not in target:
            time.sleep(0.05)  # time for the other rank, if it did not wait
        os.rename(source, target)
        renamed.append((time.monotonic_ns(), os.path.basename(target)))

    config = {**training.ds_config(2), "checkpoint": {"parallel_write": {"pipeline_stage": True}}}
    engine, renamed, told = _start(config), [], {}
    old, new, cut = (os.path.join(folder, tag) for tag in ("old", "new", "cut"))
    _train(engine, 1)
    engine.save_checkpoint(folder, tag="new")
    if dist.get_rank() == 0:
        shutil.copytree(new, old)
    _train(engine, 1, first_window=1)
    with mock.patch("os.replace", rename):
        engine.save_checkpoint(folder, tag="new")
    orders = [None, None]
    dist.all_gather_object(orders, [entry for entry in renamed if entry[1] != "latest"])
    names = [[name for _, name in order] for order in orders]
    cuts = [(0, 0), *itertools.product(range(1, len(names[0]) + 1), range(len(names[1]) + 1))]
    for first, second in cuts:
        if dist.get_rank() == 0:
            shutil.rmtree(cut, ignore_errors=True)
            shutil.copytree(old, cut)
            for name in names[0][:first] + names[1][:second]:
                shutil.copy(os.path.join(new, name), cut)
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag="cut")
            told[first, second] = "loaded"
        except ValueError as error:
            told[first, second] = str(error)
    _finish(engine, {})
    return names, min(orders[0] + orders[1])[1], told


def test_a_save_that_was_cut_is_refused_wherever(ranks, tmp_path):
    """Files of layers do not tell their step, so the order of the renamings must."""
    for names, earliest, told in ranks(2).run(_cut_renaming, folder=str(tmp_path)):
        assert [sum("layer_" in name for name in order) for order in names] == [2, 1]
        assert earliest == "mp_rank_00_model_states.pt"
        assert told.pop((0, 0)) == told.pop((len(names[0]), len(names[1]))) == "loaded"
        assert told and all("was saved at step" in message for message in told.values()), told


LAYER = "layer_06-model_states.pt"


def _edit(path, change):
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)


DAMAGES = {
    "is missing": os.remove,
    "cannot be read": lambda path: os.truncate(path, 300),
    "values that are not finite": lambda path: _edit(path, lambda weights: weights["bias"].fill_(float("nan"))),
    "it lacks bias": lambda path: _edit(path, lambda weights: weights.pop("bias")),
    "has the shape (3,) there": lambda path: _edit(path, lambda weights: weights["weight"].resize_(3)),
    "it was saved with tensor parallelism": lambda path: torch.save({}, path.replace("06-", "06-model_01-")),
}


def _load_damaged(folder):
    import shutil

    import torch.distributed as dist

    engine = _start(training.ds_config(2))
    _train(engine, 2)
    engine.save_checkpoint(folder, tag="saved")
    _train(engine, 1, first_window=2)
    before, told = fingerprint(engine), []
    for tag, damage in enumerate(DAMAGES.values()):
        if dist.get_rank() == 0:
            shutil.copytree(os.path.join(folder, "saved"), os.path.join(folder, str(tag)))
            damage(os.path.join(folder, str(tag), LAYER))
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag=str(tag))
            told.append("loaded")
        except ValueError as error:
            told.append(str(error))
    assert fingerprint(engine) == before
    _finish(engine, {})
    return told


def test_a_damaged_layer_is_refused_and_the_run_unchanged(ranks, tmp_path):
    for told in ranks(2).run(_load_damaged, folder=str(tmp_path)):
        for expected, message in zip(DAMAGES, told, strict=True):
            assert message.startswith("ACCO: the checkpoint in ") and "layer_06-m" in message, message
            assert expected in message, message


# ---- refused


def _load_into_plain(config, folder):
    engine = _start(config)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = _start(config, "plain")
    with pytest.raises(ValueError, match="is of a PipelineModule, whose layers .* and this run has a Plain") as told:
        engine.load_checkpoint(folder)
    _finish(engine, {})
    return str(told.value)


def test_a_checkpoint_of_layers_is_refused_elsewhere(ranks, tmp_path):
    first, second = ranks(2).run(_load_into_plain, config=training.ds_config(2), folder=str(tmp_path))
    assert first == second


def _try(config, stages=1):
    try:
        _finish(_start(config, stages=stages), {})
    except ValueError as error:
        return str(error)
    return "started"


def test_two_stages_are_refused(ranks):
    for message in ranks(2).run(_try, config=training.ds_config(4), stages=2):
        assert message == (
            "ACCO: PipelineModule's num_stages = 2 is not allowed; allowed: 1. Use one stage, or the AdamW optimizer: "
            "with several the data-parallel traffic, which ACCO hides, is about 1 % of a step"
        )


def test_adaptive_windows_are_refused(ranks):
    for message in ranks(2).run(_try, config=training.ds_config(4, accumulation="adaptive")):
        assert message == (
            "ACCO: model = 'PipelineModule' is not allowed; allowed: any other module with accumulation = "
            '"adaptive". Set optimizer.params.accumulation to "fixed": train_batch() ends the windows itself'
        )
