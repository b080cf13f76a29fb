"""Checkpoints: a resumed run is the uninterrupted one; other world sizes, other optimizers; saves that fail."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tests.support import oracle, training
from tests.support.checkpoints import AFTER, BEFORE, check_resumed, resume, same_state, start, whole_state
from tests.support.launcher import ROOT, Launched, launch
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(400)


def shards_of(engine) -> dict:
    """The same of this rank alone, as flat shards: stock optimizers do not find the state of an unused parameter."""
    optimizer = engine.optimizer
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)  # bf16 with fp32 sums: BF16_Optimizer
    masters = optimizer.fp32_groups_flat_partition if masters is None else masters
    paddings = getattr(optimizer, "groups_padding", None) or optimizer.group_paddings
    states = {}
    for index, (master, padding) in enumerate(zip(masters, paddings)):
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[index]["params"][0]]
        end = master.numel() - padding
        states[index] = [t.detach()[:end].clone() for t in (master, state["exp_avg"], state["exp_avg_sq"])]
    return {"states": states, "step": {int(state["step"]) for state in optimizer.optimizer.state.values()}}


# ---- resume


PRECISIONS = ("fp32", "bf16", "bf16+fp32", "fp16", "fp16static")
SCHEDULES = ("acco", "local", "wp", "dpu", "sync")


RESUMED = [
    *(("acco", precision) for precision in ("fp32", "bf16+fp32", "fp16")),
    *(("local", "bf16"), ("local", "fp16"), ("local", "bf16+fp32")),
    *(("wp", "bf16"), ("wp", "fp16static"), ("sync", "fp32"), ("sync", "fp16")),
]


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [
        pytest.param(*case, marks=() if case in RESUMED else pytest.mark.full)
        for case in itertools.product(SCHEDULES, PRECISIONS)
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, precision, schedule, tmp_path):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule)
    check_resumed(ranks(2).run(resume, config=config, precision=precision, groups=2, folder=str(tmp_path)))


@pytest.mark.parametrize("schedule", ["acco", "local", pytest.param("wp", marks=pytest.mark.full)])
def test_a_resumed_run_over_two_levels_is_the_uninterrupted_one(ranks, schedule, tmp_path):
    config = training.ds_config(4, 2.0, schedule=schedule, ranks_per_host=2)
    check_resumed(ranks(4).run(resume, config=config, precision="fp32", groups=2, folder=str(tmp_path)))


def test_overlap_warmup_goes_on_counting(ranks, tmp_path):
    """The first windows that run as sync are those of the run, not of the process."""
    config = training.ds_config(4, schedule="acco", overlap_warmup_steps=BEFORE + 2)
    for plain, _, resumed in ranks(2).run(resume, config=config, precision="fp32", groups=1, folder=str(tmp_path)):
        assert resumed["losses"] == plain["losses"]


def _resume_in_mid_window(folder, micro_batches):
    """Saves after some micro-batches of a window; the run that saved goes on as if nothing was."""
    import torch.distributed as dist

    config = training.ds_config(4)
    engine = start(config)
    training.run_windows(engine, BEFORE)
    committed = whole_state(engine)
    expected = training.run_windows(engine, AFTER, first_window=BEFORE)["losses"]
    engine.destroy()

    engine = start(config)
    training.run_windows(engine, BEFORE)
    losses = []
    for micro_batch in range(4):
        loss = engine(*training.batch(dist.get_rank(), BEFORE, micro_batch))
        engine.backward(loss)
        losses.append(loss.item())
        engine.step()
        if micro_batch == micro_batches - 1:
            engine.save_checkpoint(folder)
    losses += training.run_windows(engine, AFTER - 1, first_window=BEFORE + 1)["losses"]
    assert losses == expected
    engine.destroy()

    engine = start(config, seed=9)
    engine.load_checkpoint(folder)
    assert same_state(whole_state(engine), committed)
    resumed = training.run_windows(engine, AFTER, first_window=BEFORE)["losses"]
    engine.destroy()
    return expected, resumed


def test_a_save_in_phase_a_drops_the_partial_window(ranks, tmp_path):
    for expected, resumed in ranks(2).run(_resume_in_mid_window, folder=str(tmp_path), micro_batches=1):
        assert resumed == expected


def test_a_save_in_phase_b_resumes_at_the_true_weights(ranks, tmp_path):
    for expected, resumed in ranks(2).run(_resume_in_mid_window, folder=str(tmp_path), micro_batches=3):
        assert resumed != expected  # the estimate of the window's beginning is gone, so it computes at the true weights
        assert resumed == pytest.approx(expected, rel=0.2)


# ---- tools, other world sizes


def save(config, folder, groups, windows, precision="fp32", read="whole_state"):
    engine = start(config, groups)
    training.run_windows(engine, windows, precision, same_data=True)
    state = globals()[read](engine)
    engine.save_checkpoint(folder, tag="saved")
    engine.destroy()
    return state


def load_and_go_on(
    config, folder, groups, windows, first_window, precision="fp32", save_to=None, read="whole_state", **options
):
    engine = start(config, groups, seed=9)
    path, _ = engine.load_checkpoint(folder, **options)
    assert path is not None
    state = globals()[read](engine)
    record = training.run_windows(engine, windows, precision, first_window=first_window, same_data=True)
    if save_to is not None:
        record["saved"] = globals()[read](engine)
        engine.save_checkpoint(save_to)
    engine.destroy()
    return state, record


def convert(folder):
    """ds_to_universal.py in this process: its own pool of processes would import torch again in each."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = types.SimpleNamespace(
        input_folder=os.path.join(folder, "saved"),
        output_folder=os.path.join(folder, "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)


def test_zero_to_fp32_gives_the_true_weights(ranks, tmp_path):
    config = training.ds_config(4, precision="bf16")
    state = ranks(2).run(save, config=config, folder=str(tmp_path), groups=2, windows=3, precision="bf16")[0]
    made = tmp_path / "fp32"
    script = [sys.executable, str(tmp_path / "zero_to_fp32.py"), str(tmp_path), str(made)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    weights = torch.load(made / "pytorch_model.bin")
    for name, (master, *_) in state["states"].items():
        assert weights[name].equal(master), name


WORLD_SIZES = [(1, 2, 1), (2, 4, 1), (4, 2, 2)]  # before, after, ranks_per_host
OTHER_SIZES = ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
WORLD_SIZES += [pytest.param(*sizes, 1, marks=pytest.mark.full) for sizes in OTHER_SIZES]


@pytest.mark.parametrize(("before", "after", "ranks_per_host"), WORLD_SIZES)
def test_another_number_of_ranks(ranks, before, after, ranks_per_host, tmp_path):
    """By way of ds_to_universal. All ranks see the same data, so that the number of ranks changes nothing else."""
    config = training.ds_config(4, schedule="sync", ranks_per_host=ranks_per_host)
    folder = str(tmp_path)
    saved = ranks(before).run(save, config=config, folder=folder, groups=1, windows=3)[0]
    convert(folder)
    for schedule in ("sync", "acco"):
        config = training.ds_config(4, schedule=schedule, ranks_per_host=ranks_per_host)
        config["checkpoint"] = {"load_universal": True}
        run = dict(config=config, folder=folder, groups=1, windows=3, first_window=3)
        results = ranks(after).run(load_and_go_on, **run)
        assert all(same_state(state, saved) for state, _ in results)
        reference = oracle.run_reference(
            schedule=schedule, world_size=1, windows=6, n=4, a=2, lr_decay=0.9, warmup=3 if schedule == "acco" else 0
        )
        for _, record in results:
            assert record["losses"] == pytest.approx(reference["losses"][12:], rel=1e-5), schedule


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [
        pytest.param(schedule, precision, marks=() if place == number else pytest.mark.full)
        for place, schedule in enumerate(("acco", "wp", "dpu"))
        for number, precision in enumerate(("bf16", "bf16+fp32", "fp16static"))
    ],
)
def test_universal_in_16_bit(ranks, schedule, precision, tmp_path):
    config = training.ds_config(4, precision=precision, schedule=schedule)
    folder = str(tmp_path)
    saved = ranks(2).run(save, config=config, folder=folder, groups=2, windows=3, precision=precision)[0]
    convert(folder)
    config["checkpoint"] = {"load_universal": True}
    run = dict(config=config, folder=folder, groups=2, windows=3, first_window=3, precision=precision)
    for state, record in ranks(1).run(load_and_go_on, **run):
        assert same_state(state, saved)
        assert all(loss == loss and loss < 10 for loss in record["losses"])


# ---- other optimizers


def _train_stock(config, groups, windows, precision):
    engine = start(config, groups)
    record = training.run_windows(engine, windows, precision, same_data=True)
    engine.destroy()
    return record


def with_adamw(config, **params):
    return {**config, "optimizer": {"type": "AdamW", "params": {**training.HYPER, **params}}}


@pytest.mark.parametrize(
    ("precision", "whose"),
    [  # DeepSpeed's own is compiled for more than a minute
        pytest.param(precision, whose, marks=() if whose == "torch" else pytest.mark.full)
        for precision, whose in itertools.product(("fp32", "bf16", "bf16+fp32", "fp16static"), ("torch", "deepspeed"))
    ],
)
def test_from_adamw_and_back(ranks, precision, whose, tmp_path):
    """AdamW, then ACCO, then AdamW again: with the schedule sync the same training throughout."""
    acco = training.ds_config(4, 2.0, precision=precision, schedule="sync")
    adamw = with_adamw(acco, **({"torch_adam": True} if whose == "torch" else {}))
    common = dict(groups=2, precision=precision)
    keeping = dict(common, read="shards_of")
    folders = [str(tmp_path / name) for name in ("adamw", "acco")]
    whole = ranks(2).run(_train_stock, config=adamw, windows=9, **common)[0]
    saved = ranks(2).run(save, config=adamw, folder=folders[0], windows=3, **keeping)[0]
    state, record = ranks(2).run(
        load_and_go_on, config=acco, folder=folders[0], windows=3, first_window=3, save_to=folders[1], **keeping
    )[0]
    assert same_state(state, saved)
    tolerance = 2e-6 if precision == "fp32" else 2e-2
    assert record["losses"] == pytest.approx(whole["losses"][12:24], rel=tolerance)
    assert record["losses"][:4] == pytest.approx(whole["losses"][12:16], rel=2e-6)
    back, after = ranks(2).run(load_and_go_on, config=adamw, folder=folders[1], windows=3, first_window=6, **keeping)[0]
    assert same_state(back, record["saved"])
    assert after["losses"] == pytest.approx(whole["losses"][24:], rel=tolerance)


def _live_after_load(config, folder, groups, precision, read="whole_state", **options):
    engine = start(config, groups, seed=9)
    engine.load_checkpoint(folder, **options)
    loaded = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    state = globals()[read](engine)
    losses = training.run_windows(engine, 3, precision, same_data=True)["losses"]
    engine.destroy()
    return loaded, state, losses


@pytest.mark.parametrize("schedule", ["acco", "local", "wp"])
def test_adamw_goes_on_at_the_true_weights(ranks, schedule, tmp_path):
    """What stock DeepSpeed loads from a run whose training stood elsewhere."""
    config = training.ds_config(4, precision="bf16", schedule=schedule)
    folder = str(tmp_path)
    run = dict(config=config, folder=folder, groups=2, precision="bf16")
    saved = ranks(2).run(save, windows=4, **run)[0]
    shards = ranks(2).run(load_and_go_on, windows=0, first_window=4, read="shards_of", **run)
    run["config"] = with_adamw(config, torch_adam=True)
    results = ranks(2).run(_live_after_load, read="shards_of", **run)
    for (loaded, state, losses), (expected, _) in zip(results, shards):
        assert same_state(state, expected)
        for name, (master, *_) in saved["states"].items():
            assert loaded[name].equal(master.bfloat16())
        assert all(loss == loss and loss < 10 for loss in losses)


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize(
    ("schedule", "commit_comm"),
    [
        ("acco", "full"),
        ("acco", "int8"),
        ("local", "full"),
        *(pytest.param(name, "full", marks=pytest.mark.full) for name in ("wp", "dpu", "sync")),
    ],
)
def test_without_optimizer_states(ranks, schedule, commit_comm, options, tmp_path):
    """Training then begins at the loaded weights, with the AdamW state that the engine had: none."""
    config = training.ds_config(4, precision="bf16", schedule=schedule, commit_comm=commit_comm)
    folder = str(tmp_path)
    saved = ranks(2).run(save, config=config, folder=folder, groups=2, windows=4, precision="bf16")[0]
    run = dict(config=config, folder=folder, groups=2, precision="bf16", **options)
    for loaded, state, losses in ranks(2).run(_live_after_load, **run):
        assert state["step"] == {0}
        for name, (master, *_) in saved["states"].items():
            if commit_comm == "full":
                assert loaded[name].equal(master.bfloat16())
            else:  # the module's file has what all ranks held, which is not the masters rounded
                torch.testing.assert_close(loaded[name].float(), master, rtol=2**-8, atol=2e-3)
            assert state["states"][name][0].equal(loaded[name].float())
            assert not state["states"][name][1].any()
        assert all(loss == loss and loss < 10 for loss in losses)


# ---- saved


def _files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _save_twice(folder, tag):
    engine = start(training.ds_config(4))
    training.run_windows(engine, 1)
    engine.save_checkpoint(folder, tag=tag, save_latest=False)
    training.run_windows(engine, 1, first_window=1)
    engine.save_checkpoint(folder, tag=tag)
    saved = whole_state(engine)
    engine.destroy()
    return saved


@pytest.mark.parametrize("tag", ["best", None])
def test_a_tag_that_is_saved_again(ranks, tag, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").write_text("of the user's")
    saved = ranks(2).run(_save_twice, folder=str(tmp_path), tag=tag)[0]
    assert (tmp_path / "latest").read_text() == ("best" if tag else "global_step2")
    assert not list(tmp_path.rglob("*.saving"))
    assert (tmp_path / "best" / "notes.txt").read_text() == "of the user's"
    run = dict(config=training.ds_config(4), folder=str(tmp_path), groups=2, windows=0, first_window=2)
    for state, _ in ranks(2).run(load_and_go_on, **run):
        assert same_state(state, saved)


def _fail_to_save(folder, failing):
    """Saves, trains, and fails to save under the same tag; then training goes on and saves elsewhere.

    Args:
        failing: the rank whose files may not grow. None: what is saved cannot be pickled.
    """
    import resource

    import torch.distributed as dist

    engine = start(training.ds_config(4))
    training.run_windows(engine, 2)
    engine.save_checkpoint(folder, tag="saved")
    dist.barrier()
    before = _files(Path(folder))
    training.run_windows(engine, 1, first_window=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    began = time.monotonic()
    try:
        engine.save_checkpoint(folder, tag="saved", client_state={"note": sys} if failing is None else {})
        message = "saved"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    unchanged = _files(Path(folder)) == before
    losses = training.run_windows(engine, 2, first_window=3)["losses"]
    engine.save_checkpoint(folder, tag="after")
    engine.destroy()
    return message, waited, unchanged, losses


@pytest.fixture(scope="module")
def five_windows():
    """The losses of the windows 3 and 4, by ranks."""
    pool = RankPool(2)
    results = pool.run(_train, windows=5)
    pool.close()
    return [losses[12:] for losses in results]


def _train(windows):
    engine = start(training.ds_config(4))
    losses = training.run_windows(engine, windows)["losses"]
    engine.destroy()
    return losses


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_is_told_by_all_ranks(ranks, five_windows, failing, tmp_path):
    """By a limit on the size of files, which torch's writer meets as it meets a full disk."""
    results = ranks(2).run(_fail_to_save, folder=str(tmp_path), failing=failing)
    for (message, waited, unchanged, losses), expected in zip(results, five_windows):
        assert message.startswith("CheckpointNotSaved: ACCO: the checkpoint in ")
        assert f"rank {failing}: {tmp_path}/saved/" in message and f"rank {1 - failing}: " not in message
        assert "could not be written: File too large (EFBIG)" in message and "B free there" in message
        assert unchanged and waited < 20
        assert losses == expected
    assert (tmp_path / "latest").read_text() == "after"


def test_a_client_state_that_cannot_be_pickled_is_told_by_all_ranks(ranks, five_windows, tmp_path):
    results = ranks(2).run(_fail_to_save, folder=str(tmp_path), failing=None)
    for (message, _, unchanged, losses), expected in zip(results, five_windows):
        assert "CheckpointNotSaved" in message and "rank 0: " in message and "cannot pickle 'module' object" in message
        assert unchanged and losses == expected


def _save_into(folder):
    engine = start(training.ds_config(4))
    try:
        engine.save_checkpoint(folder)
        message = "saved"
    except RuntimeError as error:
        message = str(error)
    engine.destroy()
    return message


def test_a_folder_that_cannot_be_made_is_told_by_all_ranks(ranks, tmp_path):
    (tmp_path / "file").touch()
    for message in ranks(2).run(_save_into, folder=str(tmp_path / "file" / "folder")):
        assert "rank 0: " in message and "rank 1: " in message and "Not a directory (ENOTDIR)" in message


# ---- killed


def _killed_while_saving(folder, victim, tag):
    """Saves, trains, and is killed in the middle of writing its shard of the next checkpoint."""
    import torch.distributed as dist

    engine = start(training.ds_config(4, comm_timeout_s=20))
    training.run_windows(engine, 2)
    engine.save_checkpoint(folder, tag="whole")
    training.run_windows(engine, 2, first_window=2)
    write = engine.checkpoint_engine.save

    def die(state_dict, path):
        write(state_dict, path)
        if dist.get_rank() == victim and "optim_states" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    engine.checkpoint_engine.save = die
    engine.save_checkpoint(folder, tag=tag)


@pytest.mark.parametrize("tag", ["half", "whole"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_while_saving_leaves_the_previous_one(ranks, victim, tag, tmp_path):
    """Also where the previous one has the same tag."""
    pool = RankPool(2)
    try:
        pool.start(_killed_while_saving, folder=str(tmp_path), victim=victim, tag=tag)
        with pytest.raises(AssertionError, match=f"rank {victim} died with exit code -9"):
            pool.collect(ranks=[victim])
    finally:
        pool.close()
    assert (tmp_path / tag).is_dir()
    assert (tmp_path / "latest").read_text() == "whole"
    run = dict(config=training.ds_config(4), folder=str(tmp_path), groups=2, windows=1, first_window=2)
    for state, _ in ranks(2).run(load_and_go_on, **run):
        assert state["step"] == {2}


STEPS, KILLS = 40, 2


def _logged(folder) -> list[dict]:
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _run_with_kills(folder, config, dice):
    """Starts the script again and again, and kills all of it with -9 at a random step (and somewhere inside it)."""
    script = ROOT / "tests" / "support" / "resuming.py"
    kill_at = sorted(dice.sample(range(2, STEPS - 2), KILLS))
    for step in kill_at:
        run = Launched(script, folder, json.dumps(config), STEPS, per_node=True, stdout=subprocess.DEVNULL)
        deadline, before = time.monotonic() + 200, len(_logged(folder))
        while not any(line["step"] >= step for line in _logged(folder)[before:]) and run.process.poll() is None:
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.01)
        time.sleep(dice.random() * 0.05)
        run.kill()
    return launch(script, folder, json.dumps(config), STEPS), kill_at


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_killed_again_and_again(schedule, tmp_path):
    """The launched run, killed twice and resumed from its last checkpoint: every step's losses, also of the steps
    that were trained twice, and the last weights are those of the run that nobody killed."""
    config = training.ds_config(4, 2.0, schedule=schedule)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir(), killed.mkdir()
    done = launch(ROOT / "tests" / "support" / "resuming.py", quiet, json.dumps(config), STEPS)
    assert done.returncode == 0, done.stderr
    done, kill_at = _run_with_kills(killed, config, random.Random(20_260))
    assert done.returncode == 0, done.stderr
    expected = {line["step"]: (line["losses"], line["norm"]) for line in _logged(quiet)}
    assert sorted(expected) == list(range(STEPS))
    lines = _logged(killed)
    assert len({line["pid"] for line in lines}) == KILLS + 1, f"killed at {kill_at}"
    assert {line["step"] for line in lines} == set(expected)
    for line in lines:
        assert (line["losses"], line["norm"]) == expected[line["step"]], line["step"]
    for mine, theirs in zip(torch.load(killed / "weights.pt"), torch.load(quiet / "weights.pt")):
        assert mine.equal(theirs)
