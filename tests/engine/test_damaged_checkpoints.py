"""Checkpoints that are damaged, edited, of another run or made to harm: refused by a sentence, nothing is loaded."""

import collections
import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from deepspeed_acco.engine.checkpoint_files import read
from tests.support import training
from tests.support.checkpoints import fingerprint, same_state, start, whole_state
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(400)


def _save(config, folder, groups, windows):
    engine = start(config, groups)
    training.run_windows(engine, windows, same_data=True)
    engine.save_checkpoint(folder, tag="saved")
    engine.destroy()


def _try_to_load(config, groups, folder, tag, options, spoil):
    engine = start(config, groups)
    training.run_windows(engine, 3)
    message = ""
    if folder is not None:
        try:
            engine.load_checkpoint(folder, tag=tag, **options)
        except ValueError as refused:
            message = str(refused)
    losses = training.run_windows(engine, 3, first_window=3)["losses"]
    state = whole_state(engine)
    engine.destroy()
    return message, losses, state


def _edit(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


MODEL = "mp_rank_00_model_states.pt"
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def _truncate(path):
    os.truncate(path, os.path.getsize(path) * 2 // 3)


def _flip(path, part):
    """Flips one bit in the middle of the largest tensor of the file, where no reader of the structure sees it."""
    with zipfile.ZipFile(path) as file:
        largest = max((entry for entry in file.infolist() if "/data/" in entry.filename), key=lambda e: e.file_size)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x03\x04", largest.header_offset)
    name, extra = (int.from_bytes(content[at + place : at + place + 2], "little") for place in (26, 28))
    content[at + 30 + name + extra + int(largest.file_size * part)] ^= 1
    path.write_bytes(bytes(content))


def _acco_of(content):
    return content["optimizer_state_dict"]["acco"]


def _groups_of(content):
    return content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]


def _stop_renaming(at):
    shutil.copy(at / SHARD, at / f"{SHARD}.saving")
    _edit(at / SHARD, lambda content: _acco_of(content).update(global_steps=1))


SPOILED = {
    "model truncated": (lambda at: _truncate(at / MODEL), f"{MODEL} cannot be read"),
    "shard truncated": (lambda at: _truncate(at / SHARD), f"{SHARD} cannot be read"),
    "shard empty": (lambda at: os.truncate(at / SHARD, 0), f"{SHARD} cannot be read"),
    "a bit of the model": (lambda at: _flip(at / MODEL, 0.5), f"{MODEL} is damaged: the checksum of"),
    "a bit of the shard": (lambda at: _flip(at / SHARD, 0.0), f"{SHARD} is damaged: the checksum of"),
    "another rank's shard": (
        lambda at: shutil.copy(at / SHARD.replace("rank_1", "rank_0"), at / SHARD),
        "is the shard of data-parallel rank 0, and rank 1 would load it",
    ),
    "another step's shard": (
        lambda at: _edit(at / SHARD, lambda c: _acco_of(c).update(global_steps=7)),
        "was saved at step 7, and the file with the module beside it at step 2",
    ),
    "another run's shard": (
        lambda at: _edit(at / SHARD, lambda c: _acco_of(c).update(run="another")),
        "the ranks see different checkpoints",
    ),
    "shard missing": (lambda at: os.remove(at / SHARD), f"{SHARD} is missing"),
    "model missing": (lambda at: os.remove(at / MODEL), f"{MODEL} is missing"),
    "bf16 shards": (lambda at: os.rename(at / SHARD, at / f"bf16_{SHARD}"), "was saved with bf16"),
    "latest empty": (lambda at: os.truncate(at.parent / "latest", 0), "latest is empty"),
    "not a checkpoint": (lambda at: torch.save([1, 2], at / MODEL), "holds a list"),
    "another model, a parameter more": (
        lambda at: _edit(at / MODEL, lambda c: c["module"].update(more=torch.ones(3))),
        "has in addition more",
    ),
    "another model, a parameter less": (
        lambda at: _edit(at / MODEL, lambda c: c["module"].pop("last.bias")),
        "it lacks last.bias",
    ),
    "another model, another shape": (
        lambda at: _edit(at / MODEL, lambda c: c["module"].update({"last.bias": torch.ones(4)})),
        "last.bias has the shape (4,) there and (3,) here",
    ),
    "another number of ranks": (
        lambda at: _edit(at / MODEL, lambda c: c.update(dp_world_size=3)),
        "saved by 3 data-parallel ranks and this run has 2",
    ),
    "no scheduler": (
        lambda at: _edit(at / MODEL, lambda c: c.update(lr_scheduler=None)),
        "no state of a learning-rate",
    ),
    "stage 3": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"].pop("single_partition_of_fp32_groups")),
        "was not saved by ZeRO stage 1",
    ),
    "elastic": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"].update(base_optimizer_state=[])),
        "elastic_checkpoint = true",
    ),
    "a group less": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop()),
        "has 1 parameter groups and this run has 2",
    ),
    "other places": (
        lambda at: _edit(
            at / SHARD, lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].popitem(last=False)
        ),
        "at other places of the shard",
    ),
    "a shorter shard": (
        lambda at: _edit(
            at / SHARD,
            lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(0, torch.ones(5)),
        ),
        "its shard of parameter group 0 has 5 elements",
    ),
    "no AdamW state": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"].clear()),
        "has no AdamW state",
    ),
    "amsgrad": (lambda at: _edit(at / SHARD, lambda c: _groups_of(c)[1].update(amsgrad=True)), "amsgrad = True"),
    "Adam with L2": (
        lambda at: _edit(at / SHARD, lambda c: _groups_of(c)[0].update(decoupled_weight_decay=False)),
        "decoupled_weight_decay = False",
    ),
    "killed while renaming": (
        _stop_renaming,
        f"complete and still named {SHARD}.saving; rename them",
    ),
    "tensor parallelism": (
        lambda at: shutil.copy(at / MODEL, at / MODEL.replace("00", "01")),
        "saved with tensor parallelism, or is mixed up",
    ),
    "latest is no text": (lambda at: (at.parent / "latest").write_bytes(b"\xff\xfe"), "latest does not hold a tag"),
    "latest is too long": (lambda at: (at.parent / "latest").write_text("x" * 10**6), "latest does not hold a tag"),
    "latest of another kind": (lambda at: (at.parent / "latest").write_text("a\0b"), "latest does not hold a tag"),
    "newer format": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"]["acco"].update(version=2)),
        "has format 2 of deepspeed_acco",
    ),
    "broken key": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"].update(acco={"version": 1})),
        'the key "acco" has no schedule',
    ),
    "ranks differ": (
        lambda at: _edit(at / SHARD, lambda c: c["optimizer_state_dict"].pop("acco")),
        "the ranks see different checkpoints",
    ),
}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """A checkpoint to spoil, and the run that never tries to load."""
    folder = tmp_path_factory.mktemp("saved")
    pool = RankPool(2)
    config = training.ds_config(4)
    pool.run(_save, config=config, folder=str(folder), groups=2, windows=2)
    common = dict(config=config, groups=2, folder=None, tag=None, options={}, spoil=None)
    undisturbed = pool.run(_try_to_load, **common)
    pool.close()
    return folder, config, undisturbed


@pytest.mark.parametrize("spoil", SPOILED)
def test_refused_and_the_run_is_untouched(ranks, saved_once, spoil, tmp_path):
    folder, config, undisturbed = saved_once
    at = tmp_path / "copy"
    shutil.copytree(folder, at)
    damage, expected = SPOILED[spoil]
    damage(at / "saved")
    run = dict(config=config, groups=2, folder=str(at), tag=None, options={}, spoil=spoil)
    for (message, losses, state), (_, before, state_before) in zip(ranks(2).run(_try_to_load, **run), undisturbed):
        assert expected in message
        assert "was not loaded and the run is unchanged" in message
        assert losses == before
        assert same_state(state, state_before)


def test_a_tag_that_is_not_there_names_those_that_are(ranks, saved_once):
    folder, config, _ = saved_once
    run = dict(config=config, groups=2, folder=str(folder), tag="nowhere", options={}, spoil=None)
    for message, *_ in ranks(2).run(_try_to_load, **run):
        assert "is missing" in message and "(there are: saved)" in message


def _load_without_latest(folder):
    engine = start(training.ds_config(4))
    answer = engine.load_checkpoint(folder)
    engine.destroy()
    return answer


def test_a_folder_without_latest_is_answered_as_deepspeed_does(ranks, tmp_path):
    assert ranks(2).run(_load_without_latest, folder=str(tmp_path)) == [(None, None)] * 2


# ---- edited


def _zero_of(content):
    return content["optimizer_state_dict"]


def _moments_of(content):
    return _zero_of(content)["base_optimizer_state"]["state"][0]


def _shards_of(content, name):
    return _acco_of(content)[name]


GONE = object()


def _put(of, key, value):
    """Changes one value of the dictionary that ``of`` finds, or takes it out."""

    def change(content):
        found = of(content)
        if value is GONE:
            del found[key]
        else:
            found[key] = value(found[key]) if callable(value) else value

    return change


def _itself(content):
    return content


def _fill(value):
    return lambda tensor: torch.full_like(tensor, value)


def _module_of(content):
    return content["module"]


def _scheduler_of(content):
    return content["lr_scheduler"]


def _first_group_of(content):
    return _groups_of(content)[0]


WHOLE = "allowed: a whole number >= 0"
# What is edited: which file, the dictionary in it, its key, the new value, and what the refusal says.
EDITS = [
    (SHARD, _acco_of, "window", "x", f"has window = 'x'; {WHOLE}"),
    (SHARD, _acco_of, "window", -5, f"has window = -5; {WHOLE}"),
    (SHARD, _acco_of, "window", 10**30, WHOLE),
    (SHARD, _acco_of, "window", GONE, "has no window"),
    (SHARD, _acco_of, "grad_norm", "x", "has grad_norm = 'x'; allowed: a number >= 0"),
    (SHARD, _acco_of, "grad_norm", None, "has grad_norm = None"),
    (SHARD, _acco_of, "weights", "abc", "allowed: a list, each a tensor"),
    (SHARD, _acco_of, "weights", None, "has weights = None"),
    (SHARD, _acco_of, "weights", lambda w: [_fill(float("nan"))(t) for t in w], "has values that are not finite"),
    (SHARD, _acco_of, "weights", lambda w: [t.double() for t in w], "is in float64 where this run has float32"),
    (SHARD, _acco_of, "weights", lambda w: [t.view(1, -1) for t in w], "has 2 dimensions"),
    (SHARD, _acco_of, "weights", lambda w: w[:1], "has 1 weights"),
    (SHARD, _acco_of, "weights", lambda w: [t.to_sparse() for t in w], "needed: a plain tensor"),
    (SHARD, _acco_of, "predictions", lambda _: [torch.ones(3)] * 2, "has 2 predictions"),
    (SHARD, _acco_of, "before", [torch.ones(3)], "has 1 before"),
    (SHARD, _acco_of, "version", 0, "has version = 0"),
    (SHARD, _acco_of, "version", True, "has version = True"),
    (SHARD, _acco_of, "schedule", 5, "has schedule = 5"),
    (SHARD, _acco_of, "estimate_fraction", float("nan"), "has estimate_fraction = nan"),
    (SHARD, _acco_of, "scheduler_ahead", "x", "has scheduler_ahead = 'x'"),
    (SHARD, _zero_of, "acco", [1], "is not what deepspeed_acco writes"),
    (SHARD, _moments_of, "exp_avg", lambda t: t[:-3], "where this run has"),
    (SHARD, _moments_of, "exp_avg", _fill(float("nan")), "exp_avg of parameter group 0 has values that are not finite"),
    (SHARD, _moments_of, "exp_avg_sq", _fill(-1.0), "has the value -1; allowed: >= 0"),
    (SHARD, _moments_of, "exp_avg", "a", "exp_avg of parameter group 0 is 'a'"),
    (SHARD, _moments_of, "exp_avg", lambda t: t.half(), "is in float16 where this run has float32"),
    (SHARD, _moments_of, "step", "x", "has step = 'x'"),
    (SHARD, _moments_of, "step", -3, "has step = -3"),
    (SHARD, _moments_of, "step", torch.tensor(float("nan")), "has step = "),
    (SHARD, _moments_of, "step", 1.5, "has step = 1.5"),
    (SHARD, _zero_of, "single_partition_of_fp32_groups", lambda s: [_fill(float("inf"))(t) for t in s], "not finite"),
    (SHARD, _zero_of, "single_partition_of_fp32_groups", lambda s: [t.half() for t in s], "is in float16"),
    (SHARD, _zero_of, "single_partition_of_fp32_groups", "abc", "allowed: a list, each a tensor"),
    (SHARD, _zero_of, "loss_scaler", 5, "has loss_scaler = 5"),
    (SHARD, lambda c: vars(_zero_of(c)["loss_scaler"]), "cur_scale", 0.0, "has cur_scale = 0.0"),
    (SHARD, lambda c: vars(_zero_of(c)["loss_scaler"]), "cur_scale", GONE, "has no cur_scale"),
    (SHARD, _zero_of, "partition_count", [9, 9], "has partition_count = [9, 9] and this run has [2, 2]"),
    (SHARD, _zero_of, "partition_count", GONE, "has no partition_count"),
    (SHARD, _zero_of, "param_slice_mappings", 5, "has param_slice_mappings = 5"),
    (SHARD, _zero_of, "ds_version", None, "has ds_version = None"),
    (SHARD, _zero_of, "ds_version", "0.3.1", "allowed: a version of DeepSpeed >= 0.3.17"),
    (SHARD, _zero_of, "clip_grad", "x", "has clip_grad = 'x'"),
    (SHARD, _zero_of, "overflow", "x", "has overflow = 'x'"),
    (SHARD, _zero_of, "zero_stage", 3, "has zero_stage = 3"),
    (SHARD, lambda c: _zero_of(c)["base_optimizer_state"], "param_groups", lambda g: g[:1], "has 1 parameter groups"),
    (SHARD, lambda c: _zero_of(c)["base_optimizer_state"], "state", GONE, "has no state"),
    (SHARD, _first_group_of, "lr", "x", "has lr = 'x'; allowed: a finite number >= 0"),
    (SHARD, _first_group_of, "lr", float("nan"), "has lr = nan"),
    (SHARD, _first_group_of, "betas", GONE, "has no betas"),
    (SHARD, _first_group_of, "betas", (0.9, 1.0), "has betas = (0.9, 1.0)"),
    (SHARD, _first_group_of, "eps", -1e-8, "has eps = -1e-08"),
    (SHARD, _first_group_of, "params", [0, 1], "has params = [0, 1]"),
    (MODEL, _itself, "global_steps", "x", f"has global_steps = 'x'; {WHOLE}"),
    (MODEL, _itself, "global_steps", GONE, "has no global_steps"),
    (MODEL, _itself, "skipped_steps", None, "has skipped_steps = None"),
    (MODEL, _itself, "global_samples", "x", "has global_samples = 'x'"),
    (MODEL, _itself, "mp_world_size", GONE, "has no mp_world_size"),
    (MODEL, _itself, "dp_world_size", "2", "has dp_world_size = '2'"),
    (MODEL, _itself, "param_shapes", GONE, "has other param_shapes"),
    (MODEL, _itself, "param_shapes", lambda s: s[::-1], "has other param_shapes"),
    (MODEL, _itself, "module", 5, 'has no key "module"'),
    (MODEL, _module_of, "first.weight", _fill(float("nan")), "first.weight has values that are not finite"),
    (MODEL, _module_of, "first.weight", lambda t: t.double(), "first.weight is in float64"),
    (MODEL, _module_of, "first.weight", "x", "has a str as first.weight"),
    (MODEL, _itself, "lr_scheduler", 5, "has lr_scheduler = 5"),
    (MODEL, _scheduler_of, "last_epoch", "x", "last_epoch = 'x'"),
    (MODEL, _scheduler_of, "base_lrs", lambda rates: [None for _ in rates], "base_lrs = "),
]


def _refuse_all(folder, at):
    """Tries every edit with one engine. Returns for each the error, and whether this rank's state stayed as it was;
    then the losses that follow."""
    import torch.distributed as dist

    engine = start(training.ds_config(4))
    training.run_windows(engine, 3)
    before, answers = fingerprint(engine), []
    for number, (name, of, key, value, _) in enumerate(EDITS):
        copy = Path(at) / str(number)
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
            _edit(copy / "saved" / name, _put(of, key, value))
        dist.barrier()
        try:
            engine.load_checkpoint(copy)
            answer = "loaded"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        answers.append((answer, fingerprint(engine) == before))
    losses = training.run_windows(engine, 3, first_window=3)["losses"]
    engine.destroy()
    return answers, losses


@pytest.fixture(scope="module")
def edited(saved_once, tmp_path_factory):
    """What became of every edit, by ranks, and the run that never tried to load."""
    folder, _, undisturbed = saved_once
    pool = RankPool(2)
    results = pool.run(_refuse_all, folder=str(folder), at=str(tmp_path_factory.mktemp("edited")))
    pool.close()
    return results, undisturbed


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(EDITS)), ids=lambda number: f"{EDITS[number][2]}-{number}")
def test_an_edited_value_is_named_and_nothing_is_loaded(edited, number):
    name, *_, expected = EDITS[number]
    for answers, _ in edited[0]:
        answer, is_unchanged = answers[number]
        assert answer.startswith("CheckpointRefused: ") and name in answer and expected in answer
        assert is_unchanged


@pytest.mark.distributed
def test_training_goes_on_after_all_the_refusals(edited):
    results, undisturbed = edited
    assert [losses for _, losses in results] == [losses for _, losses, _ in undisturbed]


def _load_fp16(folder):
    engine = start(training.ds_config(4, precision="fp16"))
    training.run_windows(engine, 1, "fp16")
    engine.save_checkpoint(folder)
    for path in Path(folder).glob("*/*_optim_states.pt"):
        _edit(path, _put(_zero_of, "loss_scaler", GONE))
    try:
        engine.load_checkpoint(folder)
        message = "loaded"
    except ValueError as refused:
        message = str(refused)
    engine.destroy()
    return message


def test_fp16_needs_its_loss_scaler(ranks, tmp_path):
    assert "has no loss_scaler" in ranks(1).run(_load_fp16, folder=str(tmp_path))[0]


# ---- what is no plain data


class Note:
    """Stands for an object of the user's in a client_state."""

    def __init__(self, text):
        self.text = text


class Evil:
    """Runs a command while it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _save_with(folder, client_state):
    engine = start(training.ds_config(4))
    training.run_windows(engine, 1)
    engine.save_checkpoint(folder, tag="saved", client_state=client_state)
    engine.destroy()


def _load_client_state(folder, allowed):
    from torch.serialization import get_safe_globals, safe_globals

    engine = start(training.ds_config(4))
    with safe_globals(allowed):
        before = set(map(repr, get_safe_globals()))
        try:
            answer = engine.load_checkpoint(folder)[1]
        except ValueError as refused:
            answer = str(refused)
        assert set(map(repr, get_safe_globals())) == before  # of the whole process, and not ours to change
    engine.destroy()
    return answer


@pytest.mark.parametrize("name", [MODEL, SHARD.replace("rank_1", "rank_0")])
def test_code_in_a_checkpoint_does_not_run(ranks, name, tmp_path):
    ran = tmp_path / "ran"
    ranks(1).run(_save_with, folder=str(tmp_path), client_state={})
    _edit(tmp_path / "saved" / name, lambda content: content.update(note=Evil(ran)))
    message = ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[])[0]
    assert f"{name} names posix.system, which is no plain data" in message and "add_safe_globals" not in message
    assert not ran.exists()


class Attribute:
    """Is pickled as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_gives_a_member_of_deepspeeds_enumeration_and_nothing_else(ranks, tmp_path):
    """It would give any method of any class that is allowed."""
    ranks(1).run(_save_with, folder=str(tmp_path), client_state={})
    _edit(tmp_path / "saved" / MODEL, lambda content: content.update(note=Attribute(ZeroStageEnum, "gradients")))
    assert ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[])[0]["note"] is ZeroStageEnum.gradients
    _edit(tmp_path / "saved" / MODEL, lambda content: content.update(note=Attribute(collections.Counter, "update")))
    message = ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[])[0]
    assert f"{MODEL} names getattr, which is no plain data" in message


def test_a_class_of_the_user_is_named_and_can_be_allowed(ranks, tmp_path):
    ranks(1).run(_save_with, folder=str(tmp_path), client_state={"note": Note("seven")})
    message = ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[])[0]
    assert f"names {Note.__module__}.Note, which is no plain data" in message
    assert "torch.serialization.add_safe_globals" in message
    assert ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[Note])[0]["note"].text == "seven"


def test_plain_data_in_a_client_state(ranks, tmp_path):
    """Among it random states as Python, NumPy and torch give them."""
    given = {
        "best": numpy.float64(0.25),
        "python": random.Random(3).getstate(),
        "numpy": numpy.random.RandomState(3).get_state(),
        "torch": torch.get_rng_state(),
        "names": {"a", "b"},
        "counts": collections.Counter("aab"),
        "epoch": (1, None, 2.5, b"bytes", 1j),
    }
    ranks(1).run(_save_with, folder=str(tmp_path), client_state=given)
    found = ranks(1).run(_load_client_state, folder=str(tmp_path), allowed=[])[0]
    for key in ("best", "python", "names", "counts", "epoch"):
        assert found[key] == given[key] and type(found[key]) is type(given[key])
    assert found["torch"].equal(given["torch"])
    assert all(numpy.array_equal(mine, theirs) for mine, theirs in zip(found["numpy"], given["numpy"], strict=True))


def _save_and_load_adamw(folder, precision, **params):
    """Saves AdamW's and reads its files without running anything."""
    config = training.ds_config(2, precision=precision)
    config["optimizer"] = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}
    engine = start(config)
    training.run_windows(engine, 1, precision)
    engine.save_checkpoint(folder)
    engine.destroy()
    return [sorted(read(str(path))) for path in sorted(Path(folder).glob("*/*.pt"))]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16+fp32", "fp16", "fp16static"])
def test_what_deepspeed_itself_saves_is_plain(ranks, precision, tmp_path):
    shard, model = sorted(ranks(1).run(_save_and_load_adamw, folder=str(tmp_path), precision=precision)[0], key=len)
    assert "optimizer_state_dict" in shard and "module" in model
