"""Tensor parallelism on 2 x 2 ranks: trains as ZeRO-1 and as the whole model in one process, resumes, refuses."""

import os

import deepspeed
import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional

from deepspeed_acco.algorithm.reference import Reference, ReferenceHyper
from tests.support import training
from tests.support.checkpoints import (
    SHORT,
    exchanged,
    fingerprint,
    resumed_beside_uninterrupted,
    same_state,
    whole_state,
)
from tests.support.oracle import flatten
from tests.support.training import FEATURES, HYPER, TARGETS

pytestmark = pytest.mark.timeout(240)

HIDDEN, PARTS, WINDOWS, CLIP = 10, 2, 6, 0.4


class Whole(nn.Module):
    """Has tensors that are cut between ones that every part has; first and last lie at the ends of rank 0's shard."""

    def __init__(self, parts=1):
        super().__init__()
        own = HIDDEN // parts
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.up = nn.Parameter(torch.zeros(own, FEATURES))
        self.up_bias = nn.Parameter(torch.zeros(own))
        self.middle = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.zeros(TARGETS, own))
        self.bias = nn.Parameter(torch.zeros(TARGETS))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    CUT = {"up": 0, "up_bias": 0, "down": 1}  # along which dimension

    def forward(self, x, y):
        h = self.split(x * self.scale + functional.pad(x @ self.middle[:FEATURES, :3], (0, FEATURES - 3)))
        h = torch.tanh(functional.linear(h, self.up, self.up_bias))
        return (self.summed(functional.linear(h, self.down)) + self.bias * self.frozen - y).square().mean()

    def split(self, x):
        return x

    summed = split


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Part(Whole):
    """Holds one part of it, as Megatron's layers do."""

    def __init__(self, unit):
        super().__init__(PARTS)
        self.group = unit.get_model_parallel_group()
        for name in self.CUT:
            getattr(self, name).tensor_model_parallel = True

    def split(self, x):
        return _Split.apply(x, self.group)

    def summed(self, x):
        return _Summed.apply(x, self.group)


def _cut(name, value, part):
    return value.chunk(PARTS, Whole.CUT[name])[part] if name in Whole.CUT else value


def _whole_values(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.4 * torch.randn(param.shape, generator=generator)
        for name, param in Whole().named_parameters()
        if param.requires_grad
    }


class Unit:
    """Is a Megatron's mpu: ranks 0 and 1 hold one copy of the model, 2 and 3 the other."""

    def __init__(self, of_model=((0, 1), (2, 3)), of_data=((0, 2), (1, 3))):
        import torch.distributed as dist

        self.groups = {}
        for kind, of_kind in (("model", of_model), ("data", of_data)):
            for ranks in of_kind:
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    self.groups[kind] = group

    def _size(self, kind):
        return torch.distributed.get_world_size(self.groups[kind])

    def _rank(self, kind):
        return torch.distributed.get_rank(self.groups[kind])

    def get_data_parallel_group(self):
        return self.groups["data"]

    def get_data_parallel_world_size(self):
        return self._size("data")

    def get_data_parallel_rank(self):
        return self._rank("data")

    def get_model_parallel_group(self):
        return self.groups["model"]

    def get_model_parallel_world_size(self):
        return self._size("model")

    def get_model_parallel_rank(self):
        return self._rank("model")

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def _start(config, seed=5, unit=Unit):
    import deepspeed_acco  # noqa: F401

    training.allow_fp16()
    unit = unit()
    module = Part(unit)
    with torch.no_grad():
        for name, value in _whole_values(seed).items():
            getattr(module, name).copy_(_cut(name, value, unit.get_model_parallel_rank()))
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=config,
        mpu=unit,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )
    return engine


def _finish(engine, record):
    from deepspeed.utils import groups

    record["part"], record["replica"] = engine.mpu.get_model_parallel_rank(), engine.mpu.get_data_parallel_rank()
    record |= {"state": whole_state(engine), "live": training.live_weights(engine), "lr": engine.get_lr()}
    engine.destroy()
    groups.mpu = None
    return record


def _train(engine, windows=WINDOWS, first_window=0, spoils=None):
    """Trains in a plain loop; what evaluations and looks find in between changes nothing."""
    import deepspeed_acco

    record = {"losses": [], "norms": [], "skipped": [], "evaluated": []}
    dtype, replica, hook = next(engine.module.parameters()).dtype, engine.mpu.get_data_parallel_rank(), None
    for window in range(first_window, first_window + windows):
        if spoils == window and torch.distributed.get_rank() == 3:
            hook = engine.module.down.register_hook(lambda grad: grad.index_fill(1, torch.tensor([0]), float("inf")))
        for micro_batch in range(engine.gradient_accumulation_steps()):
            x, y = training.batch(replica, window, micro_batch, dtype)
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            record["losses"].append(loss.item())
        if hook is not None:
            hook = hook.remove()
        if window % 2:
            engine.eval()
            with torch.no_grad():
                record["evaluated"].append(engine(*training.batch(9, window, 0, dtype)).item())
            engine.train()
            if engine.optimizer_name() == "acco":
                with deepspeed_acco.true_weights(engine):
                    training.live_weights(engine)
        record["norms"].append(float(engine.get_global_grad_norm()))
        record["skipped"].append(engine.skipped_steps)
    return record


def _stock(config):
    return {**config, "optimizer": {"type": "AdamW", "params": {**HYPER, "torch_adam": True}}}


def _run(config, **options):
    engine = _start(config)
    return _finish(engine, _train(engine, **options))


# ---- as ZeRO-1's


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_sync_is_zero1(ranks, precision):
    config = training.ds_config(3, CLIP, precision, schedule="sync")
    mine, theirs = (ranks(4).run(_run, config=c) for c in (config, _stock(config)))
    for own, stock in zip(mine, theirs, strict=True):
        for key in ("losses", "norms", "evaluated"):
            assert own[key] == pytest.approx(stock[key], rel=3e-6 if precision == "fp32" else 2e-2), key
        assert min(own["norms"]) > CLIP, "everything is clipped"
        for name, (master, *_) in stock["state"]["states"].items():
            assert torch.allclose(own["state"]["states"][name][0], master, atol=1e-6 if precision == "fp32" else 3e-3)


@pytest.mark.parametrize("schedule", ["sync", pytest.param("acco", marks=pytest.mark.full)])
def test_fp16_skips_on_every_part(ranks, schedule):
    """The gradient that is not finite is of one rank, in a tensor that only it has."""
    config = training.ds_config(2, CLIP, "fp16", schedule=schedule)
    records = ranks(4).run(_run, config=config, spoils=3)
    skipped = records[0]["skipped"]
    assert skipped[-1] == skipped[2] + 1 and all(record["skipped"] == skipped for record in records)
    stock = ranks(4).run(_run, config=_stock(config), spoils=3)
    assert [record["skipped"] for record in records] == [record["skipped"] for record in stock]
    if schedule == "sync":
        for own, theirs in zip(records, stock, strict=True):
            assert own["losses"] == pytest.approx(theirs["losses"], rel=2e-2)


def test_a_gradient_that_is_not_finite_skips_the_step_on_every_part(ranks):
    records = ranks(4).run(_run, config=training.ds_config(2, CLIP, schedule="acco"), spoils=3)
    assert [record["skipped"][-1] for record in records] == [1] * 4
    assert all(torch.isfinite(flatten(record["live"])).all() for record in records)


# ---- as the whole model in one process


def _reference(schedule, n, a, clip):
    module = Whole()
    start = _whole_values()
    numels = [value.numel() for value in start.values()]
    losses = [[], []]

    def put(flat):
        with torch.no_grad():
            for name, part in zip(start, flat.split(numels), strict=True):
                param = getattr(module, name)
                param.copy_(part.view(param.shape))

    def gradient(weights, rank, window, micro_batch):
        put(weights[0])
        module.zero_grad()
        loss = module(*training.batch(rank, window, micro_batch, torch.float64))
        losses[rank].append(loss.item())
        (loss / n).backward()
        return [flatten([getattr(module, name).grad for name in start])]

    module.double()
    hyper = [ReferenceHyper(HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])]
    reference = Reference([flatten(start.values())], hyper, schedule, 2, clip)
    norms = [reference.run_window(gradient, n, a).grad_norm for _ in range(WINDOWS)]
    whole = zip(start, reference.theta[0].split(numels), strict=True)
    return losses, norms, {name: part.view(start[name].shape) for name, part in whole}


@pytest.mark.parametrize(
    ("schedule", "clip"),
    [
        ("acco", CLIP),
        *(pytest.param(s, c, marks=pytest.mark.full) for s, c in (("acco", 0.0), ("wp", CLIP), ("dpu", 1))),
    ],
)
def test_trains_as_the_whole_model_in_one_process(ranks, schedule, clip):
    n = 3
    records = ranks(4).run(_run, config=training.ds_config(n, clip, schedule=schedule))
    losses, norms, whole = _reference(schedule, n, 2, clip)
    is_late = schedule != "sync"
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["replica"]], rel=2e-5)
        assert record["norms"][is_late:] == pytest.approx(norms[: len(norms) - is_late], rel=2e-5)
        for name, (master, *_) in record["state"]["states"].items():
            expected = _cut(name, whole[name], record["part"])
            assert torch.allclose(master.view(expected.shape).double(), expected, atol=2e-5), name
    for record in records:
        twin = next(r for r in records if r["part"] == record["part"] and r["replica"] != record["replica"])
        assert all(a.equal(b) for a, b in zip(record["live"], twin["live"], strict=True))
    names = [name for name, param in Whole().named_parameters() if param.requires_grad]
    for first, second in (records[:2], records[2:]):
        for name, one, other in zip(names, first["live"], second["live"], strict=True):
            assert one.equal(other) or name in Whole.CUT, f"{name} is the same on both parts"


def test_auto_chooses_one_split_for_all_parts(ranks):
    """Each rank measures times of its own; all must choose by the same ones."""
    chosen = ranks(4).run(_chosen_split, config=training.ds_config(64, CLIP, schedule="acco", estimate_fraction="auto"))
    assert len(set(chosen)) == 1 and chosen[0] != 0.5, chosen


def _chosen_split(config):
    from unittest import mock

    def split(schedule, n, of):
        return 1 + int(of.micro_batch_s * 1e9) % 63

    engine = _start(config)
    with mock.patch("deepspeed_acco.engine.auto_fraction.best_split", split):
        _train(engine, 14)
    fraction = engine.optimizer.estimate_fraction
    _finish(engine, {})
    return fraction


# ---- checkpoints

BEFORE, _ = SHORT


def _resume(config, folder):
    return resumed_beside_uninterrupted(lambda seed: _start(config, seed), _train, _finish, folder)


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [("acco", "bf16"), *(pytest.param(*case, marks=pytest.mark.full) for case in (("wp", "fp32"), ("sync", "fp16")))],
)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, schedule, precision, tmp_path):
    config = training.ds_config(4, CLIP, precision, schedule=schedule)
    for plain, *others in ranks(4).run(_resume, config=config, folder=str(tmp_path)):
        for other in others:
            for key in ("losses", "norms", "evaluated", "lr"):
                assert other[key] == plain[key], key
            assert all(a.equal(b) for a, b in zip(other["live"], plain["live"], strict=True))
            assert same_state(other["state"], plain["state"])
    names = {path.name for path in (tmp_path / f"global_step{BEFORE}").iterdir()}
    assert {f"mp_rank_0{part}_model_states.pt" for part in range(PARTS)} <= names
    assert sum("optim_states" in name for name in names) == 4


def _exchange(config, stock, folder):
    return exchanged(_start, _train, _finish, (config, stock), folder)


@pytest.mark.full
def test_from_zero1_and_back(ranks, tmp_path):
    config = training.ds_config(2, CLIP, schedule="sync")
    for pairs in ranks(4).run(_exchange, config=config, stock=_stock(config), folder=str(tmp_path)):
        for saver, loader in pairs:
            assert loader == pytest.approx(saver, rel=3e-6)


def _load_damaged(folder):
    """Loads what one rank of four cannot, and what was saved with other parts; returns what each load told."""
    import shutil

    import torch.distributed as dist

    engine = _start(training.ds_config(2))
    _train(engine, 2)
    engine.save_checkpoint(folder, tag="saved")
    _train(engine, 1, 2)
    before, told = fingerprint(engine), []
    files = ("zero_pp_rank_1_mp_rank_01_optim_states.pt", "mp_rank_01_model_states.pt")
    for tag, name in enumerate(files):
        if dist.get_rank() == 0:
            shutil.copytree(os.path.join(folder, "saved"), os.path.join(folder, str(tag)))
            os.remove(os.path.join(folder, str(tag), name))
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag=str(tag))
            told.append("loaded")
        except ValueError as error:
            told.append(str(error))
    assert fingerprint(engine) == before
    _finish(engine, {})
    return told


def test_what_one_part_cannot_load_no_rank_loads(ranks, tmp_path):
    told = ranks(4).run(_load_damaged, folder=str(tmp_path))
    assert all(of_rank == told[0] for of_rank in told)
    shard, module = told[0]
    assert "rank 3: " in shard and "zero_pp_rank_1_mp_rank_01_optim_states.pt is missing" in shard, shard
    assert "it has 1 parts of a model and this run 2" in module, module


# ---- AutoTP


def _start_llama(config, seed=5):
    """Returns an engine that trains a Llama, cut by DeepSpeed where the JSON asks for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import deepspeed_acco  # noqa: F401

    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=29)
    module = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, max_position_embeddings=16, **sizes))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
    return engine


def _train_llama(config, looks=False):
    """Trains, and returns losses, norms, and the whole weights that a save of the model would hold."""
    import torch.distributed as dist

    engine = _start_llama(config)
    size = config.get("tensor_parallel", {}).get("autotp_size", 1)
    replica, record = dist.get_rank() // size, {"replica": dist.get_rank() // size, "losses": [], "norms": []}
    for window in range(WINDOWS):
        for micro_batch in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(micro_batch + 10 * window + 1000 * replica)
            ids = torch.randint(29, (4, 12), generator=generator)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            record["losses"].append(loss.item())
            if looks and micro_batch != 1:
                record["whole"] = getattr(engine, GATHERED)()
        record["norms"].append(float(engine.get_global_grad_norm()))
    if size == 1:
        record["whole"] = {name: value.clone() for name, value in engine.module.state_dict().items()}
    else:
        record["whole"] = getattr(engine, GATHERED)()
    engine.destroy()
    deepspeed.utils.groups.mpu = None
    return record


GATHERED = "_consolidated_16bit_state_dict"  # what Accelerate's get_state_dict() calls
needs_autotp = pytest.mark.skipif(
    Version(deepspeed.__version__) < Version("0.19"), reason="AutoTP of older DeepSpeeds was not seen to run on CPUs"
)
AUTOTP = {"tensor_parallel": {"autotp_size": PARTS}}


@needs_autotp
@pytest.mark.full
def test_autotp_is_zero1(ranks):
    pytest.importorskip("transformers")
    config = training.ds_config(3, CLIP / 2, schedule="sync") | AUTOTP
    mine, theirs = (ranks(4).run(_train_llama, config=c) for c in (config, _stock(config)))
    for own, stock in zip(mine, theirs, strict=True):
        assert own["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert own["norms"] == pytest.approx(stock["norms"], rel=1e-5) and min(own["norms"]) > CLIP / 2
    for name, value in theirs[0]["whole"].items():
        assert torch.allclose(mine[0]["whole"][name], value, atol=1e-5), name


@needs_autotp
@pytest.mark.full
@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_autotp_trains_as_the_whole_model_does(ranks, schedule):
    """Gathering the weights for a save, between forwards and backwards too, changes nothing and gives the true ones."""
    pytest.importorskip("transformers")
    config = training.ds_config(3, CLIP, schedule=schedule)
    whole = ranks(2).run(_train_llama, config=config)
    cut, looked = (ranks(4).run(_train_llama, config=config | AUTOTP, looks=looks) for looks in (False, True))
    for one, other in zip(cut, looked, strict=True):
        assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
        of_whole = whole[one["replica"]]
        assert one["losses"] == pytest.approx(of_whole["losses"], rel=2e-5)
        assert one["norms"] == pytest.approx(of_whole["norms"], rel=2e-5)
    for record in (cut[0], looked[0]):
        for name, value in record["whole"].items():
            assert torch.allclose(whole[0]["whole"][name], value, atol=2e-5), name


# ---- refused, or noticed


def _try(config, unit):
    from deepspeed.utils import groups

    try:
        engine = _start(config, unit=globals()[unit])
        _finish(engine, _train(engine, 3))
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        groups.mpu = None
    return "trained"


REFUSED = [
    ({"estimate_comm": "int4"}, "estimate_comm = 'int4' is not allowed; allowed: \"full\" with tensor parallelism"),
    ({"commit_comm": "int8"}, "commit_comm = 'int8' is not allowed; allowed: \"full\" with tensor parallelism"),
    ({"accumulation": "adaptive"}, "accumulation = 'adaptive' is not allowed; allowed: \"fixed\" with tensor"),
    ({"schedule": "local"}, "schedule = 'local' is not allowed; allowed: "),
]


@pytest.mark.parametrize(("params", "told"), REFUSED)
def test_what_needs_the_whole_model_is_refused(ranks, params, told):
    for message in ranks(4).run(_try, config=training.ds_config(4, **params), unit="Unit"):
        assert message.startswith("ACCO: optimizer.params.") and told in message, message


def test_one_micro_batch_is_told_what_to_choose(ranks):
    for message in ranks(4).run(_try, config=training.ds_config(1), unit="Unit"):
        assert "schedule = 'local' is not allowed" in message and '"wp"' in message, message


def _differ(key):
    """Gives one part of the model another setting."""
    rank = torch.distributed.get_rank()
    config = training.ds_config(4, CLIP)
    if key == "gradient_clipping" and rank % 2:
        config[key] = 7.0
    engine, message = None, "trained"
    try:
        engine = _start(config)
        if key == "lr" and rank % 2:
            engine.optimizer.param_groups[0]["lr"] = 0.5
        _train(engine, 3)
    except RuntimeError as error:
        message = str(error)
    if engine is not None:
        engine.destroy()
    deepspeed.utils.groups.mpu = None
    return message


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("gradient_clipping", "the ranks with the parts of one model differ"),
        ("lr", "the ranks are in different rounds"),
    ],
)
def test_parts_that_differ_are_noticed(ranks, key, told):
    for message in ranks(4).run(_differ, key=key):
        assert told in message, message


def _start_again():
    """Starts an engine behind one that was refused, which some ranks still hold and others have collected."""
    import gc

    rank, held = torch.distributed.get_rank(), None
    try:
        _start(training.ds_config(4, 7.0 if rank % 2 else CLIP, comm_timeout_s=20))
    except RuntimeError as error:
        held = error if rank < 2 else None
    gc.collect()
    engine = _start(training.ds_config(4, CLIP, comm_timeout_s=20))
    losses = _finish(engine, _train(engine, 2))["losses"]
    return losses, repr(held)


def test_an_engine_starts_behind_one_that_was_refused(ranks):
    first, second, *_ = ranks(4).run(_start_again)
    assert first == second and "ranks with the parts of one model differ" in first[1]
