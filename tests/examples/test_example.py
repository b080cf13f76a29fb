# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The example on two ranks with every JSON of ds_configs, with ``full`` also as a user
starts it: through DeepSpeed's launcher."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.launcher import ROOT, launch, with_torch_adam
from tests.support.ranks import run_script

EXAMPLE = ROOT / "examples" / "train_gpt.py"
ALL_CONFIGS = {path.stem: path for path in sorted((ROOT / "ds_configs").glob("*.json"))}
AUTO_CONFIGS = ("acco_auto", "zero1_auto")  # for trainers that fill the "auto" values: test_trainers.py
CONFIGS = {name: path for name, path in ALL_CONFIGS.items() if name not in AUTO_CONFIGS}
ACCO_CONFIGS = (
    *("acco", "acco_adaptive", "acco_bf16", "acco_int4", "acco_int4_commit8", "acco_int8", "dpu", "local"),
    *("one_micro_batch", "sync", "wp"),
)
STOCK_CONFIGS = ("zero0", "zero1", "zero2", "zero3")
TINY = ("--preset", "tiny", "--seq_len", "32", "--seed", "3")
KEYS = ["step", "samples", "loss", "val_loss", "grad_norm", "lr", "seconds"]
SUMMARY = r"^val_loss (\d+\.\d+) \| (\d+\.\d+) samples/s \| communication hidden (n/a|\d+%)$"


def train(folder: Path, config: str | Path, *arguments, ranks: int = 2, start=run_script):
    """Runs the tiny preset with one of CONFIGS or another JSON; returns its output and the lines of metrics.jsonl."""
    arguments = ("--deepspeed_config", CONFIGS.get(config, config), *TINY, "--out", folder, *arguments)
    done = start(EXAMPLE, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rates(lr: float, steps: int) -> list[float]:
    """Of the steps 0 to ``steps``, by torch's own schedulers: linear over a tenth, then a cosine to a tenth."""
    optimizer, warm_up = torch.optim.SGD([torch.zeros(1)], lr), steps // 10
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warm_up + 1), total_iters=warm_up)
    values = []
    for _ in range(warm_up):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        linear.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up, eta_min=lr / 10)
    for _ in range(warm_up, steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    return values


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("start", [run_script, pytest.param(launch, marks=pytest.mark.full)])
def test_acco_end_to_end(tmp_path, start):
    (tmp_path / "metrics.jsonl").write_text("of an earlier run\n")
    out, lines = train(tmp_path, "acco", "--steps", 20, start=start)
    config = json.loads(CONFIGS["acco"].read_text())
    samples = 2 * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]

    assert [line["step"] for line in lines] == list(range(0, 21, 2))
    assert all(list(line) == KEYS for line in lines)
    assert [line["samples"] for line in lines] == [samples * line["step"] for line in lines]
    assert [line["lr"] for line in lines] == pytest.approx(rates(config["optimizer"]["params"]["lr"], 20)[::2])
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None and lines[0]["seconds"] == 0
    assert lines[0]["val_loss"] == pytest.approx(5.55, abs=0.3)  # log(256): nothing learned yet
    assert all(line["grad_norm"] > 0 and line["loss"] > 0 for line in lines[1:])
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(set(seconds))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1

    val_loss, _, hidden = re.search(SUMMARY, out, re.MULTILINE).groups()
    assert float(val_loss) == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    assert hidden != "n/a"
    text = re.search(r"--- generated text\n(.*)\n---\n", out, re.DOTALL).group(1)
    assert text.startswith("def ") and len(text) > 50


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "config",
    [
        # The schedules and stages are trained by other tests, too; DeepSpeed's own AdamW is compiled for more than a
        # minute; generating text with zero3 takes minutes where cores are shared, since each layer of each letter waits
        # for the other rank.
        name if name == "acco_int4_commit8" else pytest.param(name, marks=pytest.mark.full)
        for name in ACCO_CONFIGS + STOCK_CONFIGS
        if name != "acco"
    ],
)
def test_every_config_runs_the_same_script(tmp_path, config):
    _check_two_steps(tmp_path, config, is_stock=config in STOCK_CONFIGS)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_stage_of_deepspeed_runs_the_same_script(tmp_path):
    _check_two_steps(tmp_path, with_torch_adam(CONFIGS["zero2"], tmp_path), is_stock=True)


def _check_two_steps(folder, config, is_stock):
    out, lines = train(folder, config, "--steps", 2)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["val_loss"] > 0 for line in lines)
    hidden = re.search(SUMMARY, out, re.MULTILINE).group(3)
    assert (hidden == "n/a") == is_stock


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_slow_rank_computes_less_of_an_adaptive_batch(tmp_path):
    _, lines = train(tmp_path, "acco_adaptive", "--steps", 12, "--slow", 1, 3)
    nominal, steps = 2 * 4 * 32, lines[-1]["step"]
    assert steps * nominal < lines[-1]["samples"], "more than the nominal batch"
    assert 12 * nominal <= lines[-1]["samples"], "as many samples as other JSONs with these --steps"
    assert lines[-1]["samples"] <= (12 + 2 * 8) * nominal, "known one step later: two steps of max_window more at most"
    assert lines[-1]["lr"] == pytest.approx(0.003 / 10), "the rate followed the samples to its end and stayed there"
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.timeout(400)
def test_three_ranks_and_a_file_of_the_user(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_bytes(b"The quick brown fox jumps over the lazy dog.\n" * 500)
    _, lines = train(tmp_path / "out" / "new", "wp", "--steps", 1, "--data", text, ranks=3)
    assert [line["step"] for line in lines] == [0, 1]


def test_errors_of_the_user_are_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    example = importlib.import_module(EXAMPLE.stem)
    acco = ("--deepspeed_config", CONFIGS["acco"])
    for arguments, message in (
        ((), "--deepspeed_config is missing"),
        (("--deepspeed_config", tmp_path / "no.json"), "is not a file"),
        ((*acco, "--data", tmp_path / "nowhere"), "does not exist"),
        ((*acco, "--steps", 0), "--steps 0 is not allowed; allowed: 1 and more"),
        ((*acco, "--warmup_steps", 61), "--warmup_steps 61 is not allowed; allowed: 0 to --steps, 60"),
        ((*acco, "--slow", 0, 0.5), "--slow with the factor 0.5 is not allowed"),
    ):
        monkeypatch.setattr("sys.argv", [str(EXAMPLE), *TINY, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            example.parse_arguments()
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_learning_rates_of_the_json_come_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    example = importlib.import_module(EXAMPLE.stem)
    config = json.loads(CONFIGS["acco"].read_text())
    (tmp_path / "own.json").write_text(json.dumps(config | {"scheduler": {"type": "WarmupLR", "params": {}}}))
    for path, decay, last in (
        (CONFIGS["acco"], "cosine", 0.1),
        (CONFIGS["acco"], "none", 1.0),
        ("own.json", "none", None),
    ):
        given = [
            "--deepspeed_config",
            str(tmp_path / path),
            "--steps",
            "20",
            "--warmup_steps",
            "4",
            "--lr_decay",
            decay,
        ]
        monkeypatch.setattr("sys.argv", [str(EXAMPLE), *given])
        scheduler = example.make_scheduler(example.parse_arguments())
        if last is None:
            assert scheduler is None
            continue
        factor = scheduler(torch.optim.SGD([torch.zeros(1)], 1.0)).lr_lambdas[0]
        assert [factor(step) for step in (0, 3, 4)] == pytest.approx([0.2, 0.8, 1.0])
        assert [factor(step) for step in (20, 21, 100)] == pytest.approx([last] * 3), "past the end nothing moves"


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_too_little_text_is_explained(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    done = run_script(EXAMPLE, *TINY, "--deepspeed_config", CONFIGS["acco"], "--data", short, ranks=1)
    assert done.returncode != 0
    assert "too little text" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_all_configs_train_the_same_batch_with_the_same_adamw():
    assert set(CONFIGS) == {*ACCO_CONFIGS, *STOCK_CONFIGS}
    acco = json.loads(CONFIGS["acco"].read_text())
    adamw = {key: acco["optimizer"]["params"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    same = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print")
    for name, path in CONFIGS.items():
        config = json.loads(path.read_text())
        if name == "one_micro_batch":  # the same batch of one larger one, with the schedule that is the default
            micro, n = config.pop("train_micro_batch_size_per_gpu"), config.pop("gradient_accumulation_steps")
            assert (micro * n, n) == (acco["train_micro_batch_size_per_gpu"] * acco["gradient_accumulation_steps"], 1)
            config |= {key: acco[key] for key in same[:2]}
            assert "schedule" not in config["optimizer"]["params"]
            config["optimizer"]["params"]["schedule"] = "one"
        assert {key: config[key] for key in same} == {key: acco[key] for key in same}, name
        params = dict(config["optimizer"]["params"])
        stage = config["zero_optimization"]["stage"]
        if name in STOCK_CONFIGS:
            assert (config["optimizer"]["type"], stage) == ("AdamW", int(name[-1]))
        else:
            schedule, *variants = name.split("_")
            estimate = next((variant for variant in variants if variant.startswith("int")), "full")
            assert params.pop("estimate_comm", "full") == estimate
            assert params.pop("commit_comm", "full") == ("int8" if "commit8" in variants else "full")
            assert params.pop("accumulation", "fixed") == ("adaptive" if name == "acco_adaptive" else "fixed")
            assert (config["optimizer"]["type"], stage, params.pop("schedule")) == ("ACCO", 1, schedule)
        assert params == adamw, name
        assert config.get("bf16", {}).get("enabled", False) == (name == "acco_bf16")


def test_configs_of_the_trainers_differ_in_the_optimizer_alone():
    assert set(ALL_CONFIGS) - set(CONFIGS) == set(AUTO_CONFIGS)
    acco, adamw = (json.loads(ALL_CONFIGS[name].read_text()) for name in AUTO_CONFIGS)
    assert (acco["optimizer"].pop("type"), adamw["optimizer"].pop("type")) == ("ACCO", "AdamW")
    assert "schedule" not in acco["optimizer"]["params"], "trainers take its word auto for their own"
    assert acco == adamw
    assert all(value == "auto" for value in acco["optimizer"]["params"].values())
