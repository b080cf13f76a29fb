"""Fuzzes DeepSpeed JSONs with the optimizer ACCO: each trains, or ends in one error that names key, value and what is
allowed, and what is accepted has its effect or a line in the log. ``ds_acco check`` says of each what then happens."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import string
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hjson

from tests.support.ranks import RankError, RankPool

LIMIT_S = 60  # for one input; the first one imports, and loads what DeepSpeed builds
WINDOWS, LONGEST = 2, 8  # micro-batches trained of a window
PARAMS = "optimizer/params/"

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "steps_per_print": 10**9,
    "optimizer": {"type": "ACCO", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01}},
}
JUNK = ["x", "", None, True, False, [], [1], {}, {"a": 1}, -1, 0, 1, 1.5, -0.0, 1e-300, 1e300, 10**30, 10**400, "1"]
JUNK += [math.nan, math.inf, -math.inf, "auto", "\u0000", "ü" * 300, "1e-3", 2**31, 2**63]
WORDS = {  # what may stand there, or nearly
    PARAMS + "lr": [0, 1e-3, "0.001", [1e-3], 3e38, 4e38],
    PARAMS + "betas": [
        [0.9],
        [0.9, 0.99, 1],
        [1, 0.9],
        ["0.9", 0.99],
        [None, 0.9],
        [0.9, math.nan],
        [True, 0.9],
        [0, 0],
    ],
    PARAMS + "eps": [0, 1e-8, "1e-8"],
    PARAMS + "weight_decay": [0, 0.1, 5],
    PARAMS + "schedule": ["auto", "acco", "local", "wp", "dpu", "sync", "ACCO", "wp ", ["acco"]],
    PARAMS + "estimate_fraction": [0.3, 0.999999, "measured", "Auto", [0.5]],
    PARAMS + "overlap_warmup_steps": [0, 1, 3, 2.0, "3"],
    PARAMS + "accumulation": ["fixed", "adaptive", "Adaptive"],
    PARAMS + "max_window": [1, 2, 8, 8.0, "8"],
    PARAMS + "lr_follows": ["samples", "steps", "step"],
    PARAMS + "lane": ["auto", "inline", "thread"],
    PARAMS + "sm_share": [1, 1.0, 0.5, 0, 2, "0.5"],
    PARAMS + "comm_timeout_s": [5, 60, 1e9, 1e15],
    PARAMS + "estimate_comm": ["full", "int8", "int4", "int2", 4],
    PARAMS + "commit_comm": ["full", "int8", "int4", 8],
    PARAMS + "ranks_per_host": [1, 2, "auto", 1.0],
    "optimizer": [[], "ACCO", {"type": "ACCO"}],
    "optimizer/type": ["acco", "Acco", "ACCO ", ["ACCO"]],
    "optimizer/params": [{}, [], "lr", {"lr": 1e-2}],
    "train_batch_size": [4, 8, 7, 8.0, "8", -8],
    "train_micro_batch_size_per_gpu": [1, 2, 4.0, "4", -4],
    "gradient_accumulation_steps": [1, 2, 3, 5, 2.0, "2", -2],
    "gradient_clipping": [0.5, 1e-30, 3e38, 4e38, "1.0"],
    "gradient_predivide_factor": [2.0, 0.5, "2"],
    "prescale_gradients": [True, "true"],
    "communication_data_type": ["fp32", "bf16", "fp16", "float16", "int8", 16],
    "data_types": [{"grad_accum_dtype": "fp32"}],
    "data_types/grad_accum_dtype": ["fp32", "bf16", "fp16", "bfloat16", "float16", "int8", 32],
    "bf16": [{"enabled": True}, True],
    "bf16/enabled": [True, "true"],
    "bfloat16": [{"enabled": True}],
    "fp16": [{"enabled": True}, {"enabled": True, "loss_scale": 8}, True],
    "fp16/enabled": [True],
    "fp16/loss_scale": [0, 128, -1],
    "fp16/initial_scale_power": [4, 200, -5],
    "torch_autocast": [{"enabled": True, "dtype": "bfloat16"}, {"enabled": True, "dtype": "float16"}, True],
    "zero_optimization": [True, [], {}, {"stage": 1, "overlap_comm": True}],
    "zero_optimization/stage": [0, 1, 2, 3, 4, "1", 1.0],
    **{
        f"zero_optimization/{key}": [True, False, 2, 5e8, "x", {"device": "cpu"}]
        for key in (
            *("overlap_comm", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"),
            *("round_robin_gradients", "elastic_checkpoint", "zero_hpz_partition_size", "zero_quantized_weights"),
            *("zero_quantized_gradients", "offload_optimizer", "offload_param", "zenflow", "ignore_unused_parameters"),
        )
    },
    "scheduler": [{"type": "WarmupLR", "params": {"warmup_num_steps": 3}}, {"type": "WarmupLR"}, [], "WarmupLR"],
    "scheduler/type": ["WarmupLR", "OneCycle", "Warmup"],
    "scheduler/params": [{"warmup_steps": 3}, {"warmup_num_steps": 3}, {"warmup_num_steps": "3"}],
}
# Of these the error has to name the key; DeepSpeed's own errors for its other keys are DeepSpeed's.
CHECKED = ("optimizer/params", "train_", "gradient_", "prescale_gradients", "communication_data_type", "data_types")
NEEDS: dict[str, Callable[[dict], bool]] = {  # without it the key changes nothing, and the log says so
    "estimate_fraction": lambda params: params.get("schedule", "acco") == "acco",
    "overlap_warmup_steps": lambda params: params.get("schedule", "acco") != "sync",
    "lr_follows": lambda params: params.get("accumulation") == "adaptive",
}
DEFAULTS = {"estimate_fraction": 0.5, "overlap_warmup_steps": 0, "lr_follows": "samples"}


def run(seed: int, count: int) -> Iterator[str]:
    """Yields a line for each finding: the input's number of that seed, what was changed, and what happened."""
    pool = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(count):
                changed, text = make_input(random.Random(f"{seed} {number}"))
                path = Path(folder) / f"{number}.json"
                path.write_text(text)
                if pool is None or not pool.is_usable:
                    pool = RankPool(1)
                pool.start(judge, path=str(path), changed=changed)
                try:
                    (finding,) = pool.collect(limit_s=LIMIT_S)
                except RankError as error:  # it hangs or has died: the next input gets another rank
                    finding = str(error).strip().splitlines()[-1]
                if finding:
                    yield f"configs: seed {seed} input {number} ({', '.join(changed)}): {finding}"
        finally:
            if pool is not None:
                pool.close()


# ---- inputs


def make_input(choose: random.Random) -> tuple[list[str], str]:
    """Returns the keys that were changed, with slashes between the levels (``raw``: the text), and the JSON."""
    config = json.loads(json.dumps(BASE))
    kind = choose.choices(["value", "values", "settings", "key", "raw"], [5, 2, 4, 2, 2])[0]
    if kind == "settings":
        changed = choose.sample([key for key in WORDS if key.startswith(PARAMS)], 3)
        for key in changed:
            _set(config, key, choose.choice(WORDS[key][:4]))
        config["gradient_accumulation_steps"] = choose.choice([1, 2, 3, 5])
        precision = choose.choice([None, None, "bf16", "fp16"])
        if precision:
            config[precision] = {"enabled": True}
    elif kind == "key":
        changed = [_misplace(config, choose)]
    else:
        changed = choose.sample(list(WORDS), 2 if kind == "values" else 1)
        for key in changed:
            _set(config, key, choose.choice(WORDS[key] + JUNK))
    text = json.dumps(config, indent=choose.choice([None, 2]))  # a NaN takes the rest of its line
    return ([*changed, "raw"], _damage(text, choose)) if kind == "raw" else (changed, text)


def _set(config: dict, path: str, value: Any) -> None:
    *levels, last = path.split("/")
    for level in levels:
        if not isinstance(config.get(level), dict):
            config[level] = {}
        config = config[level]
    config[last] = value


def _misplace(config: dict, choose: random.Random) -> str:
    """Puts a known key on another level, or a misspelt one on its own."""
    key = choose.choice(list(WORDS))
    *levels, last = key.split("/")
    if choose.random() < 0.5:
        levels = choose.choice([[], ["optimizer"], ["optimizer", "params"], ["zero_optimization"]])
    else:
        place = choose.randrange(len(last))
        letter = choose.choice([*string.ascii_letters, "", " ", "\u00e9"])
        last = last[:place] + letter + last[place + choose.randrange(2) :]
    path = "/".join([*levels, last])
    _set(config, path, choose.choice(WORDS[key]))
    return path


def _damage(text: str, choose: random.Random) -> str:
    place = choose.randrange(len(text))
    return choose.choice(
        [
            text[:place],
            text[place:],
            text[:place] + choose.choice('{}[]",:0\u0000\ufeff\n') + text[place:],
            text[:place] + text[place + 1 :],
            "\ufeff" + text,
            "",
            f"[{text}]",
            json.dumps(text),
            text + text,
            "// a comment\n" + text,
            text[:-1] + ",}",
            text[:-1] + ', "optimizer": {"type": "AdamW"}}',
            text.replace('"lr":', '"lr": 5.0, "lr":', 1),
            text[:-1] + ', "deep": ' + "[" * 3000 + "]" * 3000 + "}",
            text[:-1] + ', "lr": ' + "9" * 5000 + "}",
        ]
    )


# ---- what is done with one, in a rank


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


def judge(path: str, changed: list[str]) -> str:
    """Trains by that JSON for two windows and returns what is wrong with what happened; empty where nothing is."""
    os.environ["DEEPSPEED_ACCO_KERNELS"] = "torch"  # what computes does not matter
    from deepspeed_acco.engine.log import logger
    from tests.support import training

    lines, log = _Lines(), logger()
    log.addHandler(lines)
    engine = None
    try:
        engine = training.start_engine(path)
        if not hasattr(engine.optimizer, "settings"):
            return ""  # the input names no optimizer, and DeepSpeed makes none
        _train(engine)
        listed = _listed(path)
        if listed:
            return f"it trains, and `ds_acco check` says: {listed[0]}"
        return _without_effect(engine, hjson.loads(Path(path).read_text()), lines.text)
    except Exception as error:
        return _bad_error(error, changed) or _not_listed(error, path)
    finally:
        log.removeHandler(lines)
        if engine is not None:
            engine.destroy()


def _listed(path: str) -> list[str] | None:
    """Returns the problems that ``ds_acco check`` lists; None where it cannot read the file."""
    from deepspeed_acco.tools.check.problems import checked
    from deepspeed_acco.tools.check.reading import read_config
    from deepspeed_acco.tools.check.trainers import FilledBy

    try:
        return checked(read_config(Path(path)), FilledBy.NOBODY, ranks=1).problems
    except ValueError as unreadable:
        # Of which hjson makes a text that ends with the line.
        return None if "is no number of JSON" in str(unreadable) else [str(unreadable)]


def _not_listed(error: Exception, path: str) -> str:
    listed, text = _listed(path), str(error)
    is_ours = text.startswith("ACCO: ") and listed is not None and "CONFIG " not in "".join(listed)
    return f"`ds_acco check` does not list: {text[:300]}" if is_ours and text not in listed else ""


def _train(engine) -> None:
    from tests.support import training

    dtype = next(engine.module.parameters()).dtype
    for window in range(WINDOWS):
        steps = engine.global_steps
        for micro_batch in range(LONGEST):
            if engine.global_steps == steps:
                engine.backward(engine(*training.batch(0, window, micro_batch, dtype)))
                engine.step()


def _without_effect(engine, raw: dict, log: str) -> str:
    """Returns the first key that was accepted and is not what the engine trains with, and about which the log is
    silent."""
    params = raw["optimizer"].get("params") or {}
    settings, group = engine.optimizer.settings, engine.optimizer.param_groups[0]
    for key, value in params.items():
        if hasattr(settings, key):
            is_idle = key in NEEDS and not NEEDS[key](params) and value != DEFAULTS[key]
            is_chosen = (key, value) == ("schedule", "auto")  # by the window, which the start-up line says
            if (getattr(settings, key) != value and not is_chosen) or (is_idle and f"{key} (" not in log):
                return f"optimizer.params.{key} = {value!r} is accepted without effect and without a word"
        else:
            has_it = group.get(key) == (tuple(value) if key == "betas" else value)
            if not has_it and not ("scheduler" in raw and key in ("lr", "betas")):
                return f"optimizer.params.{key} = {value!r} is accepted without effect"
    in_use = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "gradient_predivide_factor": engine.gradient_predivide_factor(),
        "prescale_gradients": not engine.postscale_gradients(),
    }
    for key, value in in_use.items():
        if raw.get(key) is not None and raw[key] != value:
            return f"{key} = {raw[key]!r} is accepted, and {value!r} is used"
    return ""


def _bad_error(error: Exception, changed: list[str]) -> str:
    """Returns what is wrong with how an input was refused; empty where nothing is."""
    text, told = str(error), f"{type(error).__name__}: {error}"[:300]
    is_clear = isinstance(error, ValueError) and text.startswith("ACCO: ") and "allowed" in text
    if is_clear or isinstance(error, hjson.HjsonDecodeError):  # the latter of DeepSpeed's parser
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "deepspeed" in frame.filename]
    if not frames:
        return told
    last = frames[-1]
    where = f"{told} ({Path(last.filename).name}:{last.lineno})"
    if "/deepspeed_acco/" in last.filename:
        return f"an error of ours without key, value and what is allowed: {where}"
    are_checked = all(key.startswith(CHECKED) for key in changed)
    if are_checked and not any(key.split("/")[-1] in text for key in changed):
        return f"a raw error that does not name the key: {where}"
    return ""
