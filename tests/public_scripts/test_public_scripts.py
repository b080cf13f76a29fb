# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the runner of public scripts reads, fills in and concludes. The scripts themselves are run by hand."""

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.support.launcher import ROOT

from .__main__ import Run, is_done, largest_difference, launch_file, summary, table, with_results
from .scripts import SCRIPTS, loss_of_results, loss_of_trainer

RESULTS = json.loads((ROOT / "tests" / "public_scripts" / "results.json").read_text())
STOCK_FILE = """
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_accumulation_steps: 1
  zero_stage: 1
distributed_type: DEEPSPEED
mixed_precision: 'bf16'
num_processes: 8
"""
STOCK_JSON = {
    "fp16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "train_batch_size": "auto",
    "gradient_accumulation_steps": 1,
}


# ---- losses


def write_history(folder: Path, *lines: dict) -> None:
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "trainer_state.json").write_text(json.dumps({"log_history": lines}))


def test_the_loss_of_the_trainer_is_that_of_its_last_evaluation(tmp_path):
    write_history(tmp_path, {"eval_loss": 3.0, "step": 4}, {"loss": 2.5, "step": 8}, {"eval_loss": 2.75, "step": 8})
    assert loss_of_trainer(tmp_path, 8) == 2.75


@pytest.mark.parametrize("last", [{"loss": 2.5, "step": 8}, {"eval_loss": 2.75, "step": 6}])
def test_an_evaluation_of_another_step_is_no_loss_of_this_one(tmp_path, last):
    write_history(tmp_path, {"eval_loss": 3.0, "step": 4}, last)
    with pytest.raises(ValueError, match="needed is an evaluation at step 8"):
        loss_of_trainer(tmp_path, 8)


def test_the_loss_of_an_example_of_accelerate(tmp_path):
    (tmp_path / "all_results.json").write_text(json.dumps({"perplexity": 20.1, "eval_loss": 3.0}))
    assert loss_of_results(tmp_path, 8) == 3.0


# ---- configurations


def launched(folder: Path, stock: Path, optimizer: str, n: int) -> tuple[dict, dict | None]:
    """Returns the file for the launcher, and the JSON that it names."""
    made = yaml.safe_load(launch_file(stock, optimizer, n, folder).read_text())
    named = made["deepspeed_config"].get("deepspeed_config_file")
    return made, json.loads(Path(named).read_text()) if named else None


def test_a_stock_file_trains_adamw_as_it_is(tmp_path):
    (stock := tmp_path / "zero1.yaml").write_text(STOCK_FILE)
    made, ds_config = launched(tmp_path, stock, "adamw", 2)
    given = yaml.safe_load(STOCK_FILE)
    assert ds_config is None
    assert made["deepspeed_config"] == given["deepspeed_config"] | {"gradient_accumulation_steps": 2}
    assert made["mixed_precision"] == "bf16" and made["num_processes"] == 2


def test_a_stock_file_with_acco_names_a_json_of_its_stage(tmp_path):
    (stock := tmp_path / "zero1.yaml").write_text(STOCK_FILE)
    made, ds_config = launched(tmp_path, stock, "acco", 2)
    assert ds_config["optimizer"]["type"] == "ACCO" and ds_config["zero_optimization"]["stage"] == 1
    assert ds_config["bf16"] == {"enabled": "auto"}
    # What Accelerate refuses beside a JSON.
    assert not {"zero_stage", "gradient_accumulation_steps"} & made["deepspeed_config"].keys()
    assert "mixed_precision" not in made


@pytest.mark.parametrize("optimizer, kind", [("adamw", "AdamW"), ("acco", "ACCO")])
def test_a_stock_json_changes_its_optimizer_and_what_a_cpu_needs(tmp_path, optimizer, kind):
    (stock := tmp_path / "zero_stage1.json").write_text(json.dumps(STOCK_JSON))
    _, ds_config = launched(tmp_path, stock, optimizer, 2)
    assert ds_config["optimizer"]["type"] == kind and ds_config["optimizer"]["params"]["lr"] == "auto"
    assert ds_config["gradient_accumulation_steps"] == 2 and not ds_config["fp16"]["enabled"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_word_of_a_script_is_filled(script):
    words = " ".join([*script.start, *script.arguments, *(script.resume or ())])
    named = {name for _, name, _, _ in string.Formatter().parse(words) if name}
    known = {"models", "texts", "file", "out", "seed", "n", "steps", "half", "saved"}
    assert named <= known and {"seed", "steps", "half", "out", "texts"} <= named
    assert bool(script.resume) == bool(script.resume_n)


# ---- results


def run(optimizer, seed, loss, **more) -> dict:
    return {"script": "s", "optimizer": optimizer, "n": 2, "steps": 8, "seed": seed, "loss": loss, **more}


def test_the_summary_compares_equal_seeds():
    runs = [run("acco", 1, 2.02, schedule="acco"), run("adamw", 1, 2.0), run("adamw", 2, 4.0)]
    runs += [run("acco", 2, 3.96, schedule="acco")]
    runs += [run("acco", 3, 9.0, schedule="acco"), run("adamw", 4, 9.0)]  # without the other
    runs += [run("acco", 1, 8.0, schedule="acco", resumed_at=4, largest_difference=0.0)]
    (row,) = summary({"runs": runs})
    assert row["percent"] == [1.0, -1.0] and row["mean_percent"] == 0.0
    assert (row["adamw"], row["acco"], row["schedule"]) == (3.0, 2.99, "acco")
    assert row["resumed_differs"] == 0.0
    line = table({"summary": [row]}).splitlines()[2]
    assert line == "| s | 2 | `acco` | 8 | 3.0000 | 2.9900 | +1.00, -1.00 | +0.00 | equal to the bit |"


def test_a_resumed_run_does_not_stand_for_a_whole_one():
    asked = Run("s", "acco", n=2, steps=8, seed=1)
    whole = {"runs": [run("acco", 1, 2.0)]}
    resumed = {"runs": [run("acco", 1, 2.0, resumed_at=4, largest_difference=0.0)]}
    assert is_done(whole, asked) and not is_done(whole, asked, resumed=True)
    assert is_done(resumed, asked, resumed=True) and not is_done(resumed, asked)
    for change in ({"n": 1}, {"steps": 16}, {"seed": 2}, {"optimizer": "adamw"}):
        assert not is_done(whole, replace(asked, **change))


def test_the_largest_difference_of_two_models(tmp_path):
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}
    changed = weights | {"a": torch.tensor([1.0, 2.25])}
    for name, content in (("first", weights), ("same", weights), ("other", changed), ("fewer", {"a": weights["a"]})):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    assert largest_difference(tmp_path / "first", tmp_path / "same") == 0.0
    assert largest_difference(tmp_path / "first", tmp_path / "other") == 0.25
    with pytest.raises(ValueError, match="not the same weights"):
        largest_difference(tmp_path / "first", tmp_path / "fewer")


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "reference" / "public-scripts.md").read_text()
    assert RESULTS["summary"] == summary(RESULTS)
    assert table(RESULTS) in page and with_results(page, RESULTS) == page
    for commit in RESULTS["checkouts"].values():
        assert commit[:8] in page
