# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lightning's DeepSpeedStrategy with ACCO in its JSON, on two CPU ranks, beside DeepSpeed's ZeRO-1."""

import json
from pathlib import Path

import pytest
import torch

from tests.support import training
from tests.support.ranks import run_script

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.timeout(1600)]
SCRIPT = Path(__file__).with_name("train_lightning.py")
EPOCHS, STEPS_PER_EPOCH, N, CLIP = 2, 5, 4, 2.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a run told, by name; each is made when a test first asks for it."""
    pytest.importorskip("lightning")
    folder, done = tmp_path_factory.mktemp("lightning"), {}

    def run(name, optimizer, epochs=EPOCHS, *arguments):
        out = folder / name
        if name not in done:
            out.mkdir()
            # Lightning takes the other numbers from its Trainer.
            config = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9}
            config |= {"optimizer": optimizer} if optimizer else {}
            (out / "config.json").write_text(json.dumps(config))
            words = ("--config", out / "config.json", "--epochs", epochs, "--out", out, *arguments)
            ended = run_script(SCRIPT, *words, ranks=2)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            done[name] = json.loads((out / "told.json").read_text())
        return done[name], out / "checkpoint"

    return run


def acco(schedule):
    return {"type": "ACCO", "params": {**training.HYPER, "schedule": schedule}}


ADAMW = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}


def test_it_trains_as_with_adamw(runs):
    """``sync`` with the same losses, ``acco`` with those of windows that stand on estimates, and as good ones."""
    (adamw, _), (sync, _), (overlapping, _) = (
        runs("adamw", ADAMW),
        runs("sync", acco("sync")),
        runs("acco", acco("acco")),
    )
    for told in (adamw, sync, overlapping):
        assert (told["n"], told["clip"], told["steps"]) == (N, CLIP, EPOCHS * STEPS_PER_EPOCH)
        assert len(told["losses"]) == EPOCHS * STEPS_PER_EPOCH * N and len(told["val_losses"]) == EPOCHS
    assert (sync["optimizer"], overlapping["optimizer"]) == ("AccoZeroOptimizer",) * 2 != (adamw["optimizer"],) * 2
    for key in ("losses", "val_losses"):
        assert sync[key] == pytest.approx(adamw[key], rel=2e-6)
    assert overlapping["losses"][:N] == pytest.approx(adamw["losses"][:N], rel=2e-6), "the first window has no estimate"
    assert overlapping["losses"][N:] != pytest.approx(adamw["losses"][N:], rel=1e-3)
    assert overlapping["val_losses"][-1] == pytest.approx(adamw["val_losses"][-1], rel=0.1)


def test_it_validates_and_saves_the_true_weights_and_resumes_exactly(runs):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole, _ = runs("acco", acco("acco"))
    first, checkpoint = runs("first", acco("acco"), 1)
    network = training.make_network()
    masters = get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag="checkpoint")
    prefix = "network."
    weights = {name[name.index(prefix) + len(prefix) :]: value for name, value in masters.items()}
    network.load_state_dict(weights, strict=False)  # frozen ones are not in the file, and are as they were
    with torch.no_grad():
        assert first["val_losses"] == [pytest.approx(network(*training.batch(7, 7, 7)).item(), rel=1e-6)]
    resumed, _ = runs("resumed", acco("acco"), EPOCHS, "--resume", checkpoint)
    assert first["losses"] + resumed["losses"] == whole["losses"]
    assert first["val_losses"] + resumed["val_losses"] == whole["val_losses"]


def test_the_optimizer_of_the_module_is_that_of_the_json(runs):
    (named, _), (built, _) = runs("acco", acco("acco")), runs("client", None)
    assert built == named
