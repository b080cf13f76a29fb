"""``ds_acco check`` and ``ds_acco init``. That initialize itself says the same: tests/engine/test_patches.py and
tests/fuzz/configs.py."""

import ast
import copy
import inspect
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import config as ds_config

from deepspeed_acco import ACCO
from deepspeed_acco.engine import json_checks
from deepspeed_acco.engine.checks import require_own_batches
from deepspeed_acco.engine.json_checks import problems_of_tensor_parallel
from deepspeed_acco.settings import Settings
from deepspeed_acco.tools import cli
from deepspeed_acco.tools.check.problems import checked, n_of, problems_of_batch
from deepspeed_acco.tools.check.reading import read_config, reading_of
from deepspeed_acco.tools.check.trainers import ARGUMENTS, COMPUTED, FilledBy, autos_of, without_filled

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SOURCE = Path(json_checks.__file__)


def acco(n=4, **params):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": n,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "ACCO", "params": {"lr": 1e-3, **params}},
    }


def error_of(act) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


def problems(config, filled_by=FilledBy.NOBODY, ranks=None):
    return checked(config, filled_by, ranks).problems


def written(tmp_path, config, name="config.json"):
    path = tmp_path / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


# ---- problems

CHANGES = {
    "optimizer.type": {"optimizer": {"type": "acco"}},
    "optimizer.params": {"optimizer": {"type": "ACCO", "params": [1]}},
    "amp.enabled": {"amp": {"enabled": True}},
    "sparse_gradients": {"sparse_gradients": True},
    "fp16.enabled": {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "bf16.enabled": {"bf16": {"enabled": "perhaps"}},
    "scheduler.type": {"scheduler": {"type": 1, "params": {}}},
    "scheduler.params": {"scheduler": {"type": "WarmupLR"}},
    "scheduler.params.warmup_min_lr": {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}}},
    "fp16.initial_scale_power": {"fp16": {"enabled": True, "initial_scale_power": 200}},
    "data_types.grad_accum_dtype": {"data_types": {"grad_accum_dtype": "int8"}},
    "zero_optimization.stage": {"zero_optimization": {"stage": 2}},
    "zero_optimization.zenflow": {"zero_optimization": {"stage": 1, "zenflow": {"topk_ratio": 0.1}}},
    "zero_optimization.offload_optimizer.device": {"zero_optimization": {"stage": 1, "cpu_offload": True}},
    "zero_optimization.elastic_checkpoint": {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
    "bf16.bf16_optimizer_states": {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    "hybrid_engine.enabled": {"hybrid_engine": {"enabled": True}},
    "compile.deepcompile": {"compile": {"deepcompile": True}},
    "torch_autocast.dtype": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False, **acco(accumulation="adaptive")},
    "gradient_clipping": {"gradient_clipping": "auto"},
    "lr": {"lr": 1},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_problem_is_listed_alone(key):
    (problem,) = problems({**acco(), **CHANGES[key]})
    assert problem.startswith(f"ACCO: {key} = ") and "allowed: " in problem


def test_the_table_above_has_every_key_that_is_refused():
    """Of the calls that name their key; the others go through keys of a table."""
    calls = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.Call)]
    keys = {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func) == "refusal" and isinstance(call.args[0], ast.Constant)
    }
    of_the_run = {"ACCELERATE_USE_DEEPSPEED", "sequence parallelism"}
    assert len(keys) > 15 and keys - of_the_run <= set(CHANGES)


@pytest.mark.parametrize(
    "params",
    [
        {"lr": "auto"},
        {"betas": [0.9]},
        {"schedule": "dpo"},
        {"schedule": "wp", "estimate_comm": "int4"},
        {"schedule": "sync", "accumulation": "adaptive"},
        {"max_window": 8},
        {"learning_rate": 1},
    ],
)
def test_what_the_optimizer_refuses(params):
    refused = error_of(lambda: ACCO([torch.nn.Parameter(torch.zeros(1))], **params))
    assert problems(acco(**params)) == [refused]


@pytest.mark.parametrize(
    ("n", "params"),
    [
        (1, {"schedule": "acco"}),
        (1, {"estimate_comm": "int8"}),
        (4, {"accumulation": "adaptive", "max_window": 3}),
    ],
)
def test_what_a_window_refuses(n, params):
    assert problems(acco(n, **params)) == [error_of(lambda: json_checks.check_window(n, Settings(**params)))]


@pytest.mark.parametrize("params", [{"schedule": "local"}, {"schedule": "acco", "accumulation": "adaptive"}])
def test_what_several_ranks_of_one_micro_batch_refuse(params):
    config = acco(**params) | {"sequence_parallel_size": 2, "data_parallel_size": 2}
    assert problems(config) == [error_of(lambda: require_own_batches(Settings(**params), 2))]
    assert not problems(config | {"sequence_parallel_size": 1})


@pytest.mark.parametrize(
    "params",
    [
        {"schedule": "local"},
        {"schedule": "acco", "accumulation": "adaptive"},
        {"schedule": "acco", "estimate_comm": "int8"},
        {"schedule": "sync", "commit_comm": "int8"},
    ],
)
def test_what_the_parts_of_one_model_refuse(params):
    config = acco(**params) | {"tensor_parallel": {"autotp_size": 2}}
    assert problems(config) == list(problems_of_tensor_parallel(Settings(**params), 2)) != []
    assert not problems(config | {"tensor_parallel": {"autotp_size": 1}})
    assert not problems(acco(schedule="acco") | {"tensor_parallel": {"autotp_size": 2}})


def test_all_problems_are_listed_each_once():
    config = acco(1, lr=-1, betas=[1, 2], schedule="acco", shedule="wp", sm_share=2)
    config |= {"gradient_clipping": "x", "fp16": {"enabled": True, "initial_scale_power": 200}, "bf16": 1}
    config |= {"zero_optimization": {"stage": "3", "offload_optimizer": {"device": "nvme"}}, "amp": {"enabled": True}}
    found = problems(config)
    for key in ("lr", "betas", "shedule", "sm_share"):
        assert sum(f"optimizer.params.{key}" in problem for problem in found) == 1, key
    for words in ("stage = 3", "device = 'nvme'", "gradient_clipping", "amp.enabled", "bf16 = 1", "_scale_power = 200"):
        assert sum(words in problem for problem in found) == 1, words
    assert sum("gradient_accumulation_steps = 1" in problem for problem in found) == 1
    assert len(found) == 11


def test_what_depends_on_the_ranks():
    config = acco(schedule="acco", ranks_per_host=4)
    assert not problems(config) and not problems(config, ranks=8)
    (problem,) = problems(config, ranks=6)
    assert "ranks_per_host = 4 is not allowed with 6 data-parallel ranks" in problem


# ---- as DeepSpeed reads

ZERO = [True, False, {}, {"stage": "1"}, {"stage": 1.0}, {"stage": True}, {"stage": 2}, {"stage": 3}, {"stage": "auto"}]
ZERO += [{"stage": 1, "cpu_offload": "true"}, {"stage": 1, "cpu_offload": False}, {"stage": 1, "zenflow": "auto"}]
ZERO += [{"stage": 1, "offload_optimizer": {"device": "cpu"}}, {"stage": 1, "offload_optimizer": {"device": "auto"}}]
ZERO += [{"stage": 1, "offload_optimizer": {}}, {"stage": 1, "offload_optimizer": None}, {"stage": 1, "zenflow": {}}]
ZERO += [{"stage": 1, "elastic_checkpoint": "yes"}, {"stage": 1, "elastic_checkpoint": "auto"}]


@pytest.mark.parametrize("zero", ZERO, ids=str)
def test_sharding_is_read_as_deepspeed_reads_it(zero):
    theirs = ds_config.DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": zero}).zero_config
    offload = theirs.offload_optimizer
    mine = reading_of({"zero_optimization": zero})
    assert (mine.stage, mine.has_elastic_checkpoint) == (int(theirs.stage), theirs.elastic_checkpoint)
    assert mine.offload_device == ("none" if offload is None else getattr(offload.device, "value", offload.device))
    assert mine.has_zenflow == (theirs.zenflow is not None)


@pytest.mark.parametrize("enabled", [True, False, 1, 0, 1.0, "yes", "off", "True", "auto", 2, "perhaps", None, []])
def test_a_switch_is_read_as_deepspeed_reads_it(enabled):
    config = {"train_batch_size": 1, "fp16": {"enabled": enabled}}
    try:
        theirs = ds_config.DeepSpeedConfig(config).float16_config.enabled
    except ValueError:
        theirs = None
    if theirs is None:
        assert any("fp16.enabled" in problem for problem in problems(config))
    else:
        assert not problems(config) and reading_of(config).has_fp16 == theirs


@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_are_counted_as_deepspeed_counts_them(ranks, monkeypatch):
    monkeypatch.setattr(
        ds_config, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *_: ranks), raising=True
    )
    whole_numbers = ([None, 1, 2, 6, 9, 12, 24], [None, 1, 2, 3], [None, 1, 2, 4])
    refused = 0
    for values in itertools.product(*whole_numbers):
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {key: value for key, value in zip(keys, values) if value is not None}
        try:
            theirs = ds_config.DeepSpeedConfig(dict(config)).gradient_accumulation_steps
        except AssertionError:
            theirs = None
        found = list(problems_of_batch(config, ranks))
        by_ranks = [list(problems_of_batch(config, count)) for count in range(1, 25)]
        assert bool(list(problems_of_batch(config, None))) == all(by_ranks), f"{config} runs on no number of ranks"
        assert bool(found) == (theirs is None), config
        if theirs is None:
            refused += 1
            continue
        assert n_of(config, ranks) == theirs, config
        assert n_of(config, None) in (theirs, None), config
    assert refused > 20


def test_hjson_is_read_as_deepspeed_reads_it(tmp_path, capsys):
    text = '{\n# of mine\n"train_batch_size": 8.0, // whole\n"zero_optimization": {"stage": 1},\n}'
    path = written(tmp_path, text)
    import hjson

    assert read_config(path) == hjson.loads(text) and read_config(path)["train_batch_size"].bit_length() == 4
    assert cli.main(["check", str(path), "--hf"]) == 2, "HF Trainer reads JSON"
    assert "is not JSON" in capsys.readouterr().err


# ---- HF Trainer


def _all_auto():
    config: dict = {}
    for place in (*ARGUMENTS, *COMPUTED):
        *sections, last = place.split(".")
        inside = config
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = "auto"
    return config


def test_auto_is_filled_where_the_trainer_fills_it():
    """By its own code, with arguments of distinct values; what Accelerate adds for stage 3 is not asked here."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = SimpleNamespace(
        world_size=3, per_device_train_batch_size=4, gradient_accumulation_steps=5, max_grad_norm=0.5,
        learning_rate=0.25, adam_beta1=0.75, adam_beta2=0.875, adam_epsilon=1e-7, weight_decay=0.125,
        save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=True, bf16_full_eval=False,
        warmup_steps=11, get_warmup_steps=lambda steps: 11,
    )  # fmt: skip
    theirs = HfTrainerDeepSpeedConfig(_all_auto())
    theirs.trainer_config_process(arguments)
    theirs.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=8)), 100)
    of_stage_3 = {place for place in COMPUTED if ".stage3_" in place}
    assert set(autos_of(theirs.config)) == of_stage_3
    assert not list(autos_of(without_filled(_all_auto())))
    for place, names in ARGUMENTS.items():
        value = theirs.get_value(place)
        given = [getattr(arguments, name.removeprefix("--")) for name in names]
        assert value == (given if len(given) > 1 else given[0]), place


def test_what_the_trainer_does_not_fill(tmp_path, capsys):
    config = json.loads((CONFIGS / "acco_auto.json").read_text())
    assert not problems(config, FilledBy.HF)
    config["optimizer"]["params"] |= {"schedule": "auto", "estimate_fraction": "auto"}
    config["zero_optimization"]["allgather_bucket_size"] = "auto"
    found = problems(config, FilledBy.HF)
    assert len(found) == 3 and all("HF Trainer takes every auto for its own" in problem for problem in found)
    assert ['Write "measured"' in problem for problem in found].count(True) == 1
    assert not [problem for problem in problems(config) if "params.schedule" in problem], "elsewhere they are ours"


def test_adaptive_windows_under_the_trainer():
    (problem,) = problems(acco(accumulation="adaptive"), FilledBy.HF)
    assert problem.startswith("ACCO: ACCELERATE_USE_DEEPSPEED = 'true' is not allowed")


def test_the_trainers_names_stand_beside_the_keys(tmp_path, capsys):
    config = acco(2, lr=-1, betas=[0.9, 1.0]) | {"gradient_clipping": -1}
    assert cli.main(["check", str(written(tmp_path, config)), "--hf"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for key, names in (("lr", "--learning_rate"), ("betas", "--adam_beta1 --adam_beta2")):
        (place,) = [number for number, line in enumerate(lines) if f"optimizer.params.{key} = " in line]
        assert lines[place + 1].split("HF Trainer: ") == [" " * 11, names]
    assert "HF Trainer: --max_grad_norm" in lines[1 + lines.index(next(x for x in lines if "gradient_clipping" in x))]


def test_values_that_the_trainer_must_be_given_again(tmp_path, capsys):
    assert cli.main(["check", str(written(tmp_path, acco(2, betas=[0.9, 0.95]))), "--hf"]) == 0
    printed = capsys.readouterr().out
    given = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 0.001"
    assert f"so give {given} --adam_beta1 0.9 --adam_beta2 0.95\n" in printed


# ---- the command


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_of_this_repository(path, capsys):
    is_for_trainers = path.stem.endswith("_auto")
    assert cli.main(["check", str(path)]) == int(is_for_trainers)
    if is_for_trainers:
        assert "problems of 1 JSON" in capsys.readouterr().err
        assert cli.main(["check", str(path), "--hf"]) == 0
    printed = capsys.readouterr().out
    assert ("does not train with ACCO" in printed) == path.stem.startswith("zero")


def said(tmp_path, capsys, config, *options):
    assert cli.main(["check", str(written(tmp_path, config)), *options]) == 0
    return capsys.readouterr().out


def test_the_schedule_that_auto_comes_to(tmp_path, capsys):
    def schedule(config, *options):
        return said(tmp_path, capsys, config, *options).split("the schedule is ")[1].split("\n")[0]

    assert schedule(acco(1)) == "local, as gradient_accumulation_steps is 1"
    assert (
        schedule(acco(5)) == "acco, as gradient_accumulation_steps is 5: of 5 micro-batches 2 in phase A, 3 in phase B"
    )
    assert schedule(acco(4, schedule="wp")) == "wp"
    either = "local where gradient_accumulation_steps is 1, acco from 2 on"
    assert schedule(acco("auto"), "--hf") == either
    open_batch = acco(None) | {"train_batch_size": 48}
    assert schedule(open_batch) == either
    assert schedule(open_batch, "--ranks", "12").startswith("local, as")
    assert schedule(open_batch, "--ranks", "6").startswith("acco, as gradient_accumulation_steps is 2")
    assert "is 12 / data-parallel ranks, which must divide it: acco up to 6 ranks" in said(tmp_path, capsys, open_batch)


def test_what_depends_on_the_run_is_told(tmp_path, capsys):
    whole = acco(4) | {"train_batch_size": 48}
    assert "by the run: it runs on 3 data-parallel ranks and no other number" in said(tmp_path, capsys, whole)
    assert "data-parallel ranks and" not in said(tmp_path, capsys, whole, "--ranks", "3")
    hosts = said(tmp_path, capsys, acco(4, ranks_per_host=4))
    assert "ranks_per_host = 4 must divide the data-parallel ranks" in hosts and "MoE layers" in hosts
    filled = said(tmp_path, capsys, acco("auto", estimate_comm="int4"), "--hf")
    assert "with gradient_accumulation_steps = 1 refused: ACCO: optimizer.params.estimate_comm = 'int4'" in filled
    assert "refused under HF Trainer and Accelerate" in said(tmp_path, capsys, acco(4, accumulation="adaptive"))


def test_keys_without_effect_are_told(tmp_path, capsys):
    config = acco(4, lr_follows="steps") | {"bf16": {"enabled": "auto"}}
    config["zero_optimization"]["overlap_comm"] = True
    printed = said(tmp_path, capsys, config)
    assert "note: accepted without effect in zero_optimization: overlap_comm (ACCO overlaps by its rounds)" in printed
    assert "accepted without effect in optimizer.params: lr_follows" in printed
    assert 'bf16.enabled = "auto": nobody fills it' in printed


def test_a_json_without_an_optimizer(tmp_path, capsys):
    config = acco()
    del config["optimizer"]
    assert "it names no optimizer" in said(tmp_path, capsys, config)
    assert "HF Trainer makes its own" in said(tmp_path, capsys, config, "--hf")


def test_deepspeed_is_asked_for_its_other_keys(tmp_path, capsys):
    config = acco()
    config["zero_optimization"]["stages"] = 1
    assert "--deepspeed asks it" in said(tmp_path, capsys, config)
    assert cli.main(["check", str(written(tmp_path, config)), "--deepspeed"]) == 1
    assert "problem: DeepSpeed refuses it: ValidationError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "is not JSON: Expecting value"),
        ("[1]", "allowed: an object"),
        ('{"a": NaN}', "NaN is no number of JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, capsys, content, message):
    good, path = CONFIGS / "acco.json", written(tmp_path, content)
    assert cli.main(["check", str(good), str(path)]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json is not a file" in capsys.readouterr().err


def test_too_deep_is_one_problem():
    assert problems(acco() | {"x": json.loads("[" * 60 + "]" * 60)}) == ["it is nested too deeply; allowed: 50 levels"]


# ---- init


def zero(stage=2, kind="AdamW", sharding=None, params=None, **other):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": stage, **(sharding or {})},
        "optimizer": {"type": kind, "params": {"lr": 1e-3, "weight_decay": 0.1, **(params or {})}},
        **other,
    }


def init(tmp_path, capsys, config, *options):
    """Returns the new JSON and what was said."""
    assert cli.main(["init", "--from", str(written(tmp_path, config)), *options]) == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    filled_by = FilledBy.HF if "--hf" in options or list(autos_of(config)) else FilledBy.NOBODY
    assert not problems(made, filled_by) and made["optimizer"]["type"] == "ACCO"
    return made, printed.err


@pytest.mark.parametrize(
    ("config", "expected", "said"),
    [
        (zero(0), {"stage": 1}, ["stage: 0 became 1"]),
        (zero(1), {"stage": 1}, ["'AdamW' became 'ACCO'"]),
        (zero(2, sharding={"overlap_comm": True}), {"stage": 1}, ["2 became 1", "2 bytes more", "overlap_comm: "]),
        (
            zero(3, sharding={"stage3_max_live_parameters": 1, "sub_group_size": 2, "offload_param": {}}),
            {"stage": 1},
            ["3 became 1", "each rank holds all weights", "sub_group_size and offload_param: of stage 3"],
        ),
        (zero(1, sharding={"offload_optimizer": {"device": "cpu"}}), {"stage": 1}, ["12 bytes", "do not depend on it"]),
        (zero(3, sharding={"zero_quantized_weights": True}), {"stage": 1}, ["losses differ a little"]),
        (zero(1, sharding={"ignore_unused_parameters": False}), {"stage": 1, "ignore_unused_parameters": False}, []),
        (zero(1, sharding={"elastic_checkpoint": True}), {"stage": 1}, ["only how checkpoints are written"]),
    ],
)
def test_sharding_becomes_that_of_zero_1(tmp_path, capsys, config, expected, said):
    made, told = init(tmp_path, capsys, config)
    assert made["zero_optimization"] == expected
    assert all(words in told for words in said), told
    assert {key: value for key, value in made.items() if key not in ("optimizer", "zero_optimization")} == {
        key: value for key, value in config.items() if key not in ("optimizer", "zero_optimization")
    }


def test_the_optimizers_keys(tmp_path, capsys):
    params = {"betas": [0.9, 0.95], "eps": 1e-6, "torch_adam": True, "adam_w_mode": True, "bias_correction": True}
    made, told = init(tmp_path, capsys, zero(1, "Adam", params=params))
    kept = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-6}
    assert made["optimizer"]["params"] == kept
    assert "left out torch_adam, adam_w_mode and bias_correction" in told


@pytest.mark.parametrize("torch_adam", [False, True])
@pytest.mark.parametrize("w_mode", [False, True])
def test_the_decay_that_was_not_written_is_that_of_the_old_optimizer(tmp_path, capsys, torch_adam, w_mode):
    from deepspeed.ops.adam import FusedAdam

    of_torch = torch.optim.AdamW if w_mode else torch.optim.Adam
    theirs = inspect.signature(of_torch if torch_adam else FusedAdam).parameters["weight_decay"].default
    config = zero(1, "Adam", params={"torch_adam": torch_adam, "adam_w_mode": w_mode})
    del config["optimizer"]["params"]["weight_decay"]
    assert init(tmp_path, capsys, config)[0]["optimizer"]["params"]["weight_decay"] == theirs


# The forms in which trainers' repositories ship them: the trainer makes the optimizer, and "auto" is everywhere.
TRAINERS = {
    "of the trainer": {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "initial_scale_power": 32},
        **dict.fromkeys(
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
            "auto",
        ),
    },
    "of stage 3": {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "max_live_parameters": 0,
            "gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    },
}


@pytest.mark.parametrize("what", TRAINERS)
def test_what_a_trainer_fills(tmp_path, capsys, what):
    made, told = init(tmp_path, capsys, TRAINERS[what])
    assert made["optimizer"]["params"] == dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    assert made["zero_optimization"] == {"stage": 1}
    assert "decays no biases and norms" in told and "predicts its next weights alone (local)" in told


def test_without_values_of_an_optimizer(tmp_path, capsys):
    config = zero(1)
    del config["optimizer"]
    assert cli.main(["init", "--from", str(written(tmp_path, config))]) == 1
    assert "it names no optimizer" in capsys.readouterr().err
    assert init(tmp_path, capsys, config, "--hf")[0]["optimizer"]["params"]["lr"] == "auto"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (acco(), "it names ACCO already"),
        (zero(kind="Lamb"), "optimizer.type = 'Lamb': ACCO has AdamW's arithmetic"),
        (zero(kind="Adam", params={"adam_w_mode": False}), "adds weight_decay to the gradient"),
        (zero(params={"amsgrad": True}), "optimizer.params.amsgrad = True"),
        (zero(params={"bias_correction": False}), "optimizer.params.bias_correction = False"),
        (zero(params={"max_grad_norm": 1.0}), "Write gradient_clipping"),
        (zero(params={"freeze_step": 3}), "optimizer.params.freeze_step = 3"),
        (zero(4), "zero_optimization.stage = 4"),
        (zero(sharding={"zenflow": {"topk_ratio": 0.1}}), "other ones than AdamW's"),
        (zero(amp={"enabled": True}), "amp: ACCO does not train with it"),
        (zero(sparse_gradients=True), "sparse_gradients: ACCO does not train with it"),
        (zero(bf16={"enabled": True, "bf16_master_weights_and_grads": True}), "bf16.bf16_master_weights_and_grads"),
        (zero(1, gradient_accumulation_steps=1, tensor_parallel={"autotp_size": 2}), "schedule = 'local'"),
        (zero(gradient_clipping=-1), "gradient_clipping = -1"),
    ],
)
def test_what_would_train_something_else_is_not_converted(tmp_path, capsys, config, reason):
    out = tmp_path / "new.json"
    assert cli.main(["init", "--from", str(written(tmp_path, copy.deepcopy(config))), "--out", str(out)]) == 1
    assert reason in capsys.readouterr().err and not out.exists()


def test_what_is_off_is_left_out(tmp_path, capsys):
    config = zero(
        1, amp={"enabled": False}, sparse_gradients=False, compile={"deepcompile": True, "offload_opt_states": 0}
    )
    made, told = init(tmp_path, capsys, config)
    assert "amp" not in made and "sparse_gradients" not in made and made["compile"] == {"offload_opt_states": 0}
    assert told.count("newer DeepSpeeds refuse the key") == 2 and "compile.deepcompile: left out" in told


def test_nothing_is_overwritten_without_consent(tmp_path, capsys):
    out = tmp_path / "mine.json"
    out.write_text("mine")
    command = ["init", "--from", str(CONFIGS / "zero1.json"), "--out", str(out)]
    assert cli.main(command) == 2
    assert "mine.json exists; give another name, or --force" in capsys.readouterr().err and out.read_text() == "mine"
    assert cli.main([*command, "--force"]) == 0
    expected = json.loads((CONFIGS / "acco.json").read_text())
    del expected["optimizer"]["params"]["schedule"]
    assert json.loads(out.read_text()) == expected
    assert cli.main([*command[:-1], str(tmp_path / "no" / "mine.json")]) == 2
    assert "allowed: a file in a folder that exists" in capsys.readouterr().err
