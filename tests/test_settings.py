import inspect
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

from deepspeed_acco import ACCO
from deepspeed_acco.algorithm import schedules
from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.algorithm.window import phase_a_micro_batches, require_room
from deepspeed_acco.algorithm.wire import Bits
from deepspeed_acco.optim.flat import pieces
from deepspeed_acco.runtime.layout import GroupLayout
from deepspeed_acco.runtime.levels import Levels
from deepspeed_acco.settings import ACCO_KEYS, ADAMW_KEYS, Settings, json_schema, max_window_micro_batches

ROOT = Path(__file__).parents[1]


def _make(**params):
    return ACCO([torch.nn.Parameter(torch.zeros(3))], **params)


def test_defaults_are_those_of_adamw():
    mine = _make().defaults
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).defaults
    assert mine.pop("bias_correction") is True  # FusedAdam's, for those who load our checkpoints
    assert mine == {key: theirs[key] for key in mine}
    settings = _make().settings
    assert (settings.schedule, settings.estimate_fraction, settings.overlap_warmup_steps) == ("auto", 0.5, 0)
    assert (settings.accumulation, settings.lane, settings.comm_timeout_s) == ("fixed", "auto", None)
    assert (settings.max_window, settings.lr_follows) == (None, "samples")


REFUSED = [
    ("lr", "auto"),
    ("lr", -1e-3),
    ("lr", True),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", 1e39),  # more than fp32 holds
    ("lr", 10**400),
    ("lr", None),
    ("betas", 0.9),
    ("betas", [0.9]),
    ("betas", [0.9, 1.0]),
    ("betas", [-0.1, 0.9]),
    ("betas", ["0.9", 0.9]),
    ("eps", -1e-8),
    ("eps", "1e-8"),
    ("weight_decay", -0.1),
    ("weight_decay", "auto"),
    ("schedule", "ACCO"),
    ("schedule", 1),
    ("estimate_fraction", 0),
    ("estimate_fraction", 1),
    ("estimate_fraction", "half"),
    ("estimate_comm", "int2"),
    ("estimate_comm", 4),
    ("overlap_warmup_steps", -1),
    ("overlap_warmup_steps", 1.5),
    ("overlap_warmup_steps", True),
    ("overlap_warmup_steps", 10**400),
    ("accumulation", "adaptiv"),
    ("accumulation", True),
    ("max_window", 0),
    ("max_window", 16.0),
    ("max_window", True),
    ("max_window", 16),  # with fixed accumulation
    ("lr_follows", "windows"),
    ("lane", "thread"),
    ("sm_share", 0),
    ("sm_share", 1.01),
    ("sm_share", "0.5"),
    ("comm_timeout_s", 0),
    ("comm_timeout_s", "60"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_value_out_of_range_names_key_value_and_what_is_allowed(key, value):
    with pytest.raises(ValueError) as caught:
        _make(**{key: value})
    message = str(caught.value)
    assert f"optimizer.params.{key} = {value!r}" in message
    assert "allowed:" in message


def test_a_misspelt_auto_is_told_what_is_meant():
    with pytest.raises(ValueError, match='allowed: a number > 0 and < 1, "auto", or "measured"'):
        _make(estimate_fraction="Auto")


@pytest.mark.parametrize("schedule", ["local", "wp", "dpu", "sync"])
@pytest.mark.parametrize(
    ("key", "value"), [("estimate_comm", "int4"), ("estimate_fraction", "auto"), ("estimate_fraction", "measured")]
)
def test_what_only_an_estimate_has_is_refused_elsewhere(schedule, key, value):
    with pytest.raises(ValueError, match=f'{key} = .{value}. is not allowed; .* schedule = "{schedule}"'):
        _make(schedule=schedule, **{key: value})


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, []),
        ({"schedule": "wp"}, []),
        ({"schedule": "wp", "estimate_fraction": 0.25}, ["estimate_fraction"]),
        ({"estimate_fraction": 0.25, "overlap_warmup_steps": 3}, []),
        ({"schedule": "sync", "overlap_warmup_steps": 3}, ["overlap_warmup_steps"]),
        ({"lr_follows": "steps"}, ["lr_follows"]),
        ({"lr_follows": "steps", "accumulation": "adaptive"}, []),
        ({"sm_share": 0.5}, []),
    ],
)
def test_what_changes_nothing_is_known(params, expected):
    assert list(Settings(**params).without_effect("cuda")) == expected


def test_a_cpu_has_no_multiprocessors():
    assert list(Settings(sm_share=0.5).without_effect("cpu")) == ["sm_share"]
    assert not Settings().without_effect("cpu")


@pytest.mark.parametrize(("n", "schedule"), [(1, "local"), (2, "acco"), (3, "acco"), (64, "acco")])
def test_auto_stands_for_the_schedule_that_the_window_has_room_for(n, schedule):
    given = Settings(accumulation="adaptive", max_window=64, comm_timeout_s=5)
    assert given.schedule == "auto"
    assert given.of_window(n) == replace(given, schedule=schedule)
    for name in ("acco", "wp", "sync"):
        assert Settings(schedule=name).of_window(n).schedule == name


@pytest.mark.parametrize(("key", "value"), [("estimate_comm", "int8"), ("estimate_fraction", "auto")])
def test_what_auto_comes_to_must_take_the_other_keys(key, value):
    given = Settings(**{key: value})
    assert getattr(given.of_window(2), key) == value
    with pytest.raises(ValueError, match=f'{key} = \'{value}\' is not allowed.*steps = 1: there "auto" is "local"'):
        given.of_window(1)


def test_the_signature_has_every_key():
    parameters = list(inspect.signature(ACCO).parameters)
    assert parameters == ["params", *ADAMW_KEYS, *ACCO_KEYS, "unknown"]


def test_a_schedule_is_a_row_of_the_table(monkeypatch):
    with pytest.raises(ValueError, match="schedule = 'twin' is not allowed"):
        Settings(schedule="twin")
    acco, sync = schedules.SCHEDULES["acco"], schedules.SCHEDULES["sync"]
    monkeypatch.setitem(schedules.SCHEDULES, "twin", acco)
    monkeypatch.setitem(schedules.SCHEDULES, "waits", sync)
    assert Settings(schedule="twin", estimate_comm="int4", estimate_fraction="auto").wire.estimate == Bits(4, 4)
    with pytest.raises(ValueError, match='accumulation = .adaptive. .* "fixed" with schedule = "waits"'):
        Settings(schedule="waits", accumulation="adaptive")
    with pytest.raises(ValueError, match='set the schedule to "acco" or "twin"'):
        Settings(schedule="dpu", estimate_comm="int4")
    assert _key_schema("schedule")["enum"] == ["auto", "acco", "local", "wp", "dpu", "sync", "twin", "waits"]


def _key_schema(key):
    return json_schema()["properties"]["optimizer"]["then"]["properties"]["params"]["properties"][key]


def _is_valid(params, type="ACCO"):
    document = json.loads(json.dumps({"optimizer": {"type": type, "params": params}, "steps_per_print": 10}))
    return jsonschema.Draft7Validator(json_schema()).is_valid(document)


def test_the_schema_is_one_and_has_the_defaults():
    jsonschema.Draft7Validator.check_schema(json_schema())
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert {key: _key_schema(key)["default"] for key in ADAMW_KEYS} == {key: adamw[key] for key in ADAMW_KEYS}
    assert {key: _key_schema(key)["default"] for key in ACCO_KEYS} == vars(Settings())
    assert all(_key_schema(key)["description"] for key in ADAMW_KEYS + ACCO_KEYS)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_schema_accepts_the_json_files(path):
    jsonschema.Draft7Validator(json_schema()).validate(json.loads(path.read_text()))


# Trainers fill "auto", JSON has no NaN, to a schema 16.0 is whole and no number is too large, and one key does not know
# another.
NOT_OF_A_FILE = [("lr", "auto"), ("weight_decay", "auto"), ("max_window", 16), ("lr", math.inf), ("lr", 1e39)]
NOT_OF_A_FILE += [("lr", 10**400), ("overlap_warmup_steps", 10**400)]


@pytest.mark.parametrize(
    ("key", "value"), [row for row in REFUSED if row not in NOT_OF_A_FILE and row[1] is not math.nan]
)
def test_the_schema_refuses_what_training_refuses(key, value):
    assert not _is_valid({key: value})


def test_the_schema_refuses_unknown_keys():
    assert _is_valid({"schedule": "acco"}) and not _is_valid({"shedule": "acco"})


def test_the_schema_leaves_other_optimizers_alone():
    assert _is_valid({"lr": "x", "amsgrad": True}, type="Adam")


@pytest.mark.parametrize(
    ("key", "meant"), [("shedule", "schedule"), ("learning_rate", None), ("estimatefraction", "estimate_fraction")]
)
def test_an_unknown_key_is_named_with_what_may_be_meant(key, meant):
    with pytest.raises(ValueError, match=f"unknown key optimizer.params.{key}; allowed: lr, betas") as caught:
        _make(**{key: 1})
    if meant:
        assert f'Did you mean "{meant}"?' in str(caught.value)


def test_groups():
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    made = ACCO([{"params": [first], "lr": 0.5}, {"params": [second], "weight_decay": 0.0}], lr=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == [(0.5, 0.01), (0.1, 0.0)]
    with pytest.raises(ValueError, match="schedule = 'dpu' in a parameter group"):
        ACCO([{"params": [first], "schedule": "dpu"}])
    with pytest.raises(ValueError, match=r"optimizer.params.lr = -1"):
        ACCO([{"params": [first], "lr": -1}])


def test_step_is_an_error():
    with pytest.raises(RuntimeError, match="deepspeed.initialize"):
        _make().step()


@pytest.mark.parametrize(
    ("n", "fraction", "a"),
    [
        (2, 0.5, 1),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (4, 0.25, 1),
        (4, 0.75, 3),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (10, 0.8, 8),
        (3, 0.99, 2),
    ],
)
def test_phase_a(n, fraction, a):
    assert phase_a_micro_batches(n, fraction) == a


def test_one_micro_batch_has_no_phases():
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps = 1 is not allowed.*Set gradient_accumulation_steps to 2"
    ):
        require_room(SCHEDULES["acco"], 1)
    require_room(SCHEDULES["dpu"], 1)


def test_adaptive_windows():
    settings = _make(accumulation="adaptive", schedule="dpu", max_window=3, lr_follows="steps").settings
    assert settings.is_adaptive and not _make().settings.is_adaptive
    with pytest.raises(ValueError, match='accumulation = .adaptive. is not allowed; allowed: "fixed" with'):
        _make(accumulation="adaptive", schedule="sync")
    assert max_window_micro_batches(4, None) == 32
    assert max_window_micro_batches(4, 4) == 4
    with pytest.raises(ValueError, match="max_window = 3 is not allowed; allowed: >= gradient_accumulation_steps = 4"):
        max_window_micro_batches(4, 3)


def test_layout():
    layout = GroupLayout(padded_numel=12, levels=Levels.flat(3), rank=1)
    assert layout.shard_numel == 4
    assert [layout.shard_of(rank) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="13 elements cannot be cut into 3"):
        GroupLayout(13, Levels.flat(3), 0)
    assert list(pieces(0, 4)) == []
    assert list(pieces(9, 4)) == [(0, 4), (4, 4), (8, 1)]
    assert list(pieces(2**31 + 5, 2**31)) == [(0, 2**31), (2**31, 5)]


def test_schedulers_of_torch_do_not_complain_about_a_step_that_is_the_engines():
    optimizer = _make(lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)).step()
    assert optimizer.param_groups[0]["lr"] == 0.5
