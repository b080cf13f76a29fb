# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The examples of the HF Trainer and of Accelerate: the commands of the docs with a smaller model.

Every run is made once and serves all tests; the first of the HF Trainer goes through DeepSpeed's launcher as a user
starts it, the others do not, and must have the same bits. Both trainers see an epoch that ends with a window of fewer
micro-batches: 3 of 4 under the HF Trainer, 1 of 3 under Accelerate.
"""

import json
import re
import shlex
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.support.launcher import ROOT, launch, with_torch_adam
from tests.support.ranks import run_script

CONFIGS = ROOT / "ds_configs"
RANKS, MICRO_BATCH, SEQ_LEN = 2, 16, 64
MICRO_BATCHES_PER_EPOCH = 79
HELD_OUT_EVERY, VALIDATION_SEQUENCES = 20, 128  # of examples/text_data.py
SMALL = ("--preset", "tiny", "--seq_len", SEQ_LEN)

HF_N, HF_STEPS, HF_SAVED = 4, 60, 40  # three epochs of 19 whole windows and one of 3; saved within the second
HF_ARGUMENTS = (
    *("--per_device_train_batch_size", MICRO_BATCH, "--per_device_eval_batch_size", MICRO_BATCH),
    *("--max_steps", -1, "--num_train_epochs", 3, "--eval_steps", 20),
)
ACCELERATE_N, ACCELERATE_STEPS, ACCELERATE_SAVED = 3, 54, 30  # two epochs of 26 whole windows and one of 1
ACCELERATE_ARGUMENTS = ("--batch", MICRO_BATCH, "--accumulate", ACCELERATE_N, "--steps", ACCELERATE_STEPS)

# A test may make several runs, and each has a limit of its own.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1600)]


def documented_command(script: str) -> list:
    """Script and JSON of the docs' command, as absolute paths."""
    command = re.search(
        rf"^DS_ACCELERATOR=cpu deepspeed --num_accelerators {RANKS} (examples/{script} .*)$",
        (ROOT / "docs" / "how-to" / "trainers.md").read_text(),
        re.MULTILINE,
    )
    assert command, f"docs/how-to/trainers.md has no command for {script}"
    return [ROOT / word if (ROOT / word).is_file() else word for word in shlex.split(command.group(1))]


class Runs:
    """Runs of both examples, each made when a test first asks for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: dict[str, Path] = {}
        # A text that makes 79 micro-batches a rank, the last one not full, and the most validation that is taken.
        sequences = RANKS * MICRO_BATCH * MICRO_BATCHES_PER_EPOCH - 7
        held_out = -(-sequences * SEQ_LEN // (HELD_OUT_EVERY - 1))
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        source = b"".join(path.read_bytes() for path in sorted(stdlib.glob("[a-d]*.py")))
        self.text = folder / "text.txt"
        self.text.write_bytes(source[: sequences * SEQ_LEN + held_out])

    def hf(self, config: str, *arguments, name: str | None = None) -> Path:
        saves = () if config == "zero1_auto" else ("--save_strategy", "steps", "--save_steps", 20)
        return self._run("hf_trainer.py", config, name, "--output_dir", *HF_ARGUMENTS, *saves, *arguments)

    def accelerate(self, config: str, *arguments, name: str | None = None) -> Path:
        arguments = ("--save_step", ACCELERATE_SAVED, *arguments)
        return self._run("accelerate_loop.py", config, name, "--out", *ACCELERATE_ARGUMENTS, *arguments)

    def config(self, name: str) -> Path:
        """acco_auto.json, also with the schedule X of X_auto or without optimizer and scheduler; zero1_auto.json."""
        if name == "acco_auto":
            return CONFIGS / f"{name}.json"
        if name == "zero1_auto":
            return with_torch_adam(CONFIGS / f"{name}.json", self.folder)
        made = json.loads((CONFIGS / "acco_auto.json").read_text())
        if name == "client":
            del made["optimizer"], made["scheduler"]
        else:
            made["optimizer"]["params"]["schedule"] = name.removesuffix("_auto")
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(made))
        return path

    def _run(self, script, config, name, out_option, *arguments) -> Path:
        key = f"{script}-{name or config}"
        if key not in self.done:
            command = documented_command(script)
            assert command[-1] == CONFIGS / "acco_auto.json"
            command[-1] = self.config(config)
            folder = self.folder / key
            arguments = (*SMALL, "--data", self.text, *arguments, out_option, folder)
            start = launch if name == "launched" else run_script
            done = start(*command, *arguments, ranks=RANKS)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            self.done[key] = folder
        return self.done[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("trainers"))


def hf_log(folder: Path, key: str, after_step: int = 0) -> list[float]:
    """What Trainer logged under a key, in the order of steps; without the evaluation after the training."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    by_step = {line["step"]: line[key] for line in history if key in line and line["step"] > after_step}
    return [by_step[step] for step in sorted(by_step)]


def loop_log(folder: Path, key: str, after_step: int = 0) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line and line["step"] > after_step]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def saved_model(folder: Path):
    from transformers import GPTNeoXForCausalLM

    return GPTNeoXForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def loss_of_saved_model(folder: Path, text: Path) -> float:
    """The validation loss of a saved model, computed here in one process."""
    content = text.read_bytes()
    held_out = content[len(content) - len(content) // HELD_OUT_EVERY :]
    table = torch.tensor(list(held_out[: len(held_out) // SEQ_LEN * SEQ_LEN])).view(-1, SEQ_LEN)
    table = table[torch.linspace(0, len(table) - 1, VALIDATION_SEQUENCES).long()]
    logits = saved_model(folder)(input_ids=table).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), table[:, 1:].flatten()).item()


def assert_as_good(acco: list[float], adamw: list[float], at_first: float) -> None:
    """The last losses of two trainings, after something was learned and not by the same optimizer."""
    assert acco[-1] == pytest.approx(adamw[-1], rel=0.01)
    assert max(acco[-1], adamw[-1]) < at_first - 1
    assert acco[-1] != adamw[-1]


# ---- HF Trainer


def test_hf_trainer_learns_as_with_adamw(runs):
    acco, adamw = runs.hf("acco_auto"), runs.hf("zero1_auto")
    assert_as_good(hf_log(acco, "eval_loss"), hf_log(adamw, "eval_loss"), at_first=hf_log(adamw, "loss")[0])
    for key in ("loss", "learning_rate"):  # one line a step: the short windows are steps in both
        assert len(hf_log(acco, key)) == len(hf_log(adamw, key)) == HF_STEPS
    assert hf_log(acco, "learning_rate") == hf_log(adamw, "learning_rate")
    assert hf_log(acco, "loss")[0] == pytest.approx(hf_log(adamw, "loss")[0], rel=1e-5)


def test_hf_trainer_counts_as_with_adamw(runs):
    """What its rates are made of: samples a second times seconds, steps, operations."""
    told = []
    for name in ("acco_auto", "zero1_auto"):
        state = json.loads((runs.hf(name) / "trainer_state.json").read_text())
        (end,) = [line for line in state["log_history"] if "train_runtime" in line]
        samples, steps = (end[f"train_{what}_per_second"] * end["train_runtime"] for what in ("samples", "steps"))
        # The rates are logged with three digits behind the point.
        assert samples == pytest.approx(3 * (RANKS * MICRO_BATCH * MICRO_BATCHES_PER_EPOCH - 7), rel=1e-3)
        assert steps == pytest.approx(HF_STEPS, rel=0.02)
        told.append([end["epoch"], end["total_flos"], end["step"], state["num_input_tokens_seen"]])
    assert told[0] == told[1]


def test_hf_trainer_logs_the_norm_of_the_step_before(runs):
    acco, adamw = hf_log(runs.hf("acco_auto"), "grad_norm"), hf_log(runs.hf("zero1_auto"), "grad_norm")
    assert len(acco) == len(adamw) - 1 == HF_STEPS - 1, "the first step logs none"
    # DeepSpeed's warm-up has two steps of zero, so the first three windows stand on the same weights.
    assert acco[:3] == pytest.approx(adamw[:3], rel=1e-4)
    assert all(norm > 0 for norm in acco)


def test_hf_trainer_evaluates_and_saves_the_true_weights(runs):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = runs.hf("acco_auto")
    for step, eval_loss in zip((20, 40, HF_STEPS), hf_log(folder, "eval_loss"), strict=True):
        checkpoint = folder / f"checkpoint-{step}"
        masters = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
        assert_same_weights(dict(saved_model(checkpoint).named_parameters()), masters)
        assert eval_loss == pytest.approx(loss_of_saved_model(checkpoint, runs.text), rel=1e-6)
    assert_same_weights(weights(folder), weights(folder / f"checkpoint-{HF_STEPS}"))


OTHER_SCHEDULES = ("sync_auto", "dpu_auto", "wp_auto")
SCHEDULES = ["acco_auto", *(pytest.param(name, marks=pytest.mark.full) for name in OTHER_SCHEDULES)]


@pytest.mark.parametrize("config", SCHEDULES)
def test_hf_trainer_resumes_exactly(runs, config):
    whole = runs.hf(config)
    checkpoint = whole / f"checkpoint-{HF_SAVED}"
    resumed = runs.hf(config, "--resume_from_checkpoint", checkpoint, name=f"{config}-resumed")
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert hf_log(whole, key, HF_SAVED) == hf_log(resumed, key, HF_SAVED) != []
    assert_same_weights(weights(whole), weights(resumed))


@pytest.mark.full
def test_hf_trainer_with_sync_is_adamw(runs):
    sync, adamw = runs.hf("sync_auto"), runs.hf("zero1_auto")
    for key in ("loss", "grad_norm", "eval_loss"):
        assert hf_log(sync, key) == pytest.approx(hf_log(adamw, key), rel=1e-5)


# ---- Accelerate


@pytest.mark.full
def test_accelerate_learns_as_with_adamw(runs):
    acco, adamw = runs.accelerate("acco_auto"), runs.accelerate("zero1_auto")
    assert loop_log(acco, "step")[:-1] == loop_log(adamw, "step")[:-1] == list(range(1, ACCELERATE_STEPS + 1))
    assert loop_log(acco, "lr") == loop_log(adamw, "lr")
    assert loop_log(acco, "loss")[0] == pytest.approx(loop_log(adamw, "loss")[0], rel=1e-5)
    assert_as_good(loop_log(acco, "val_loss"), loop_log(adamw, "val_loss"), at_first=loop_log(adamw, "loss")[0])


@pytest.mark.full
def test_hf_trainer_through_the_launcher(runs):
    forked, launched = runs.hf("acco_auto"), runs.hf("acco_auto", name="launched")
    for key in ("loss", "grad_norm", "eval_loss"):
        assert hf_log(forked, key) == hf_log(launched, key)
    assert_same_weights(weights(forked), weights(launched))


@pytest.mark.full
def test_accelerate_through_the_launcher(runs):
    forked, launched = runs.accelerate("acco_auto"), runs.accelerate("acco_auto", name="launched")
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert loop_log(forked, key) == loop_log(launched, key)
    assert_same_weights(weights(forked), weights(launched))


@pytest.mark.full
def test_accelerate_evaluates_and_saves_the_true_weights(runs):
    folder = runs.accelerate("acco_auto")
    assert loop_log(folder, "val_loss") == [pytest.approx(loss_of_saved_model(folder, runs.text), rel=1e-6)]


@pytest.mark.full  # the same checkpoints as the HF Trainer's
@pytest.mark.parametrize("config", SCHEDULES)
def test_accelerate_resumes_exactly(runs, config):
    whole = runs.accelerate(config)
    resumed = runs.accelerate(config, "--resume", whole / f"step_{ACCELERATE_SAVED}", name=f"{config}-resumed")
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert loop_log(whole, key, ACCELERATE_SAVED) == loop_log(resumed, key) != []
    assert_same_weights(weights(whole), weights(resumed))


@pytest.mark.full
def test_accelerate_with_an_optimizer_and_a_scheduler_of_the_client(runs):
    named, built = runs.accelerate("acco_auto"), runs.accelerate("client")
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert loop_log(named, key) == loop_log(built, key)
    assert_same_weights(weights(named), weights(built))


@pytest.mark.full
def test_accelerate_with_sync_is_adamw(runs):
    sync, adamw = runs.accelerate("sync_auto"), runs.accelerate("zero1_auto")
    for key in ("loss", "grad_norm", "val_loss"):
        assert loop_log(sync, key) == pytest.approx(loop_log(adamw, key), rel=1e-5)
