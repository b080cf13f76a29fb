"""The plugin in DeepSpeed: what is refused and how, ways to build the optimizer, the start-up line, versions."""

import json
import subprocess
import sys

import pytest

from deepspeed_acco.tools.check.problems import checked
from deepspeed_acco.tools.check.trainers import FilledBy
from tests.support import training

pytestmark = pytest.mark.timeout(300)


def _try(config, kind="json"):
    """Starts an engine; returns the error's exact type and text, or what was built."""
    import deepspeed
    import torch

    import deepspeed_acco

    arguments, module = {}, training.make_network()
    training.allow_fp16()
    if kind != "json":
        params = config.pop("optimizer")["params"]
        if kind == "instance":
            arguments["optimizer"] = deepspeed_acco.ACCO(module.parameters(), **params)
        else:
            arguments["optimizer"] = lambda parameters: torch.optim.ACCO(parameters, **params)
    try:
        engine, optimizer, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=config,
            **arguments,
        )
    except BaseException as error:
        return type(error).__name__, str(error)
    built = type(optimizer).__name__
    engine.destroy()
    return "built", built


REFUSED = {
    "stage 0": ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage = 0", "allowed: 1"]),
    "stage 2": ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage = 2", "allowed: 1"]),
    "stage 3": ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "allowed: 1"]),
    "no stage": ({"zero_optimization": {}}, ["zero_optimization.stage = 0", '"stage": 1']),
    "offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        ["offload_optimizer.device = 'cpu'", "Remove offload_optimizer"],
    ),
    "zenflow": (
        {
            "zero_optimization": {
                "stage": 1,
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "select_strategy": "step", "select_interval": 4},
            }
        },
        ["zero_optimization.zenflow"],
    ),
    "elastic": ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, ["elastic_checkpoint = True"]),
    "one micro-batch": (
        {"gradient_accumulation_steps": 1, "params": {"schedule": "acco"}},
        ["gradient_accumulation_steps = 1", "allowed: >= 2", 'use the schedule "local"'],
    ),
    "an estimate of one micro-batch": (
        {"gradient_accumulation_steps": 1, "params": {"estimate_comm": "int4"}},
        ["estimate_comm = 'int4'", 'gradient_accumulation_steps = 1: there "auto" is "local"'],
    ),
    "sparse": ({"sparse_gradients": True}, ["sparse_gradients = True"]),
    "amp": ({"amp": {"enabled": True}}, ["amp.enabled = True"]),
    "hybrid": ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine.enabled = True"]),
    "deepcompile": ({"compile": {"deepcompile": True}}, ["compile.deepcompile = True"]),
    "fp16 master": (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        ["fp16.fp16_master_weights_and_grads = True"],
    ),
    "bf16 master": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        ["bf16.bf16_master_weights_and_grads = True"],
    ),
    "fp16 autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast.dtype = 'float16'"]),
    "unknown key": ({"params": {"learning_rate": 1}}, ["unknown key optimizer.params.learning_rate"]),
    "wrong value": ({"params": {"lr": "auto"}}, ["optimizer.params.lr = 'auto'"]),
    "wrong schedule": ({"params": {"schedule": "dpo"}}, ["optimizer.params.schedule = 'dpo'", 'Did you mean "dpu"?']),
}


def _first_line_of_log(config):
    import logging

    from deepspeed_acco.engine.log import logger

    told = []
    handler = logging.Handler()
    handler.emit = lambda line: told.append(line.getMessage())
    logger().addHandler(handler)
    training.start_engine(config).destroy()
    logger().removeHandler(handler)
    return told[0]


def test_the_start_says_which_schedule_auto_is(ranks):
    for n, said in ((1, "ACCO: schedule=local (auto) n=1 "), (4, "ACCO: schedule=acco (auto) a=2 b=2 ")):
        assert ranks(1).run(_first_line_of_log, config=training.ds_config(n))[0].startswith(said)
    named = ranks(1).run(_first_line_of_log, config=training.ds_config(4, schedule="local"))[0]
    assert named.startswith("ACCO: schedule=local n=4 ")


def test_a_refused_autocast_does_not_scale_the_gradients_of_the_next_engine(ranks):
    config = training.ds_config(4)
    expected = ranks(1).run(training.train, config=config, windows=4)[0]
    ranks(1).run(_try, config=config | REFUSED["fp16 autocast"][0])
    after = ranks(1).run(training.train, config=config, windows=4)[0]
    assert (after["losses"], after["norms"]) == (expected["losses"], expected["norms"])


@pytest.mark.parametrize("kind", ["json", "instance", "callable"])
@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_as_a_value_error(ranks, what, kind):
    change, expected = REFUSED[what]
    config = training.ds_config(4)
    config["optimizer"]["params"].update(change.get("params", {}))
    config.update({key: value for key, value in change.items() if key != "params"})
    if kind != "json" and what in ("sparse", "amp"):
        pytest.skip("DeepSpeed refuses these two itself before it sees the client's optimizer")
    if kind == "instance" and what in ("unknown key", "wrong value", "wrong schedule"):
        pytest.skip("the constructor itself raises it: tests/test_settings.py")
    name, message = ranks(1).run(_try, config=config, kind=kind)[0]
    assert name == "ValueError", message
    for part in expected:
        assert part in message, message
    assert "allowed" in message
    assert kind != "json" or message in _as_the_command_lists(config)


def _as_the_command_lists(config):
    """``ds_acco check`` has the same words, without an engine."""
    return checked(config, FilledBy.NOBODY, ranks=1).problems


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        (
            {"schedule": "dpu"},
            {},
            ["optimizer.schedule = 'dpu'", "one level deeper", '{"schedule": "dpu"} under params'],
        ),
        ({"lr": 1e-3}, {}, ["optimizer.lr = 0.001", "one level deeper"]),
        ({"name": "mine"}, {}, ["optimizer.name = 'mine'", "Remove it"]),
        ({"params": {"self": 1}}, {}, ["unknown key optimizer.params.self"]),
        ({"params": {"params": []}}, {}, ["unknown key optimizer.params.params"]),
        ({"params": [1]}, {}, ["optimizer.params = [1]", "an object"]),
        ({"params": {"comm_timeout_s": 1e15}}, {}, ["comm_timeout_s = 1000000000000000.0", "< 1e+09"]),
        ({"type": "acco"}, {}, ["optimizer.type = 'acco'", 'allowed: "ACCO"']),
        ({"params": []}, {}, ["optimizer.params = []", "an object"]),
        ({}, {"schedule": "dpu"}, ["schedule = 'dpu'", "in optimizer.params alone"]),
        ({}, {"params": {"lr": 1}}, ["params = {'lr': 1}", "in optimizer alone"]),
        ({}, {"train_batch_size": "16"}, ["train_batch_size = '16'", "a whole number >= 1"]),
        ({}, {"gradient_accumulation_steps": 2.0}, ["gradient_accumulation_steps = 2.0", "a whole number >= 1"]),
        ({}, {"gradient_clipping": "auto"}, ["gradient_clipping = 'auto'", "HF Trainer and Accelerate fill it"]),
        ({}, {"prescale_gradients": "no"}, ["prescale_gradients = 'no'", "true, false"]),
        ({}, {"communication_data_type": 16}, ["communication_data_type = 16", '"fp32", "fp16", "bf16"']),
        ({}, {"bf16": True}, ["bf16 = True", "an object"]),
        ({}, {"fp16": {"enabled": True, "initial_scale_power": 10**9}}, ["fp16.initial_scale_power = 1000000000"]),
        ({}, {"scheduler": "WarmupLR"}, ["scheduler = 'WarmupLR'", "an object"]),
        ({}, {"scheduler": {"type": "WarmupLR"}}, ["scheduler.params = None", "an object"]),
        ({}, {"gradient_clipping": -1}, ["gradient_clipping = -1", "a number >= 0"]),
        ({}, {"gradient_clipping": 1e39}, ["gradient_clipping = 1e+39"]),
        ({}, {"gradient_clipping": "much"}, ["gradient_clipping = 'much'"]),
        ({}, {"gradient_predivide_factor": 0}, ["gradient_predivide_factor = 0", "a number > 0"]),
        (
            {},
            {"data_types": {"grad_accum_dtype": "int8"}},
            ["data_types.grad_accum_dtype = 'int8'", "fp32, fp16, bf16"],
        ),
    ],
)
def test_keys_that_deepspeed_ignores_or_breaks_at_are_refused(ranks, section, changes, expected):
    config = training.ds_config(4) | changes
    config["optimizer"] = {**config["optimizer"], **section}
    name, message = ranks(1).run(_try, config=config, kind="json")[0]
    assert name == "ValueError", message
    for part in [*expected, "allowed"]:
        assert part in message, message
    assert message in _as_the_command_lists(config)


@pytest.mark.parametrize("kind", ["json", "instance", "callable"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},  # would go to BF16_Optimizer
        {"gradient_accumulation_steps": 1, "schedule": "wp"},
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 3.0},
        {
            "zero_optimization": {
                "stage": 1,
                "overlap_comm": True,
                "contiguous_gradients": False,
                "reduce_scatter": False,
            }
        },
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"data_types": {"grad_accum_dtype": "float32"}, "gradient_clipping": 1e30},
    ],
)
def test_accepted(ranks, change, kind):
    change = dict(change)
    config = training.ds_config(4, **({"schedule": change.pop("schedule")} if "schedule" in change else {}))
    assert ranks(1).run(_try, config={**config, **change}, kind=kind)[0] == ("built", "AccoZeroOptimizer")
    assert not _as_the_command_lists({**config, **change})


@pytest.mark.parametrize(
    "change",
    [{"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}, {"gradient_allreduce_op": "sum"}],
)
def test_how_the_mean_is_taken(ranks, change):
    """Scaling before or after the sum is the same mean; a sum instead of a mean is honored."""
    from tests.support import oracle

    config = training.ds_config(4, schedule="acco", eps=1e-2) | change
    records = ranks(2).run(training.train, config=config, windows=6)
    factor = 2.0 if "gradient_allreduce_op" in change else 1.0
    reference = oracle.run_reference(
        schedule="acco", world_size=2, windows=6, n=4, a=2, eps=1e-2, send=lambda total: total * factor
    )
    assert oracle.distance(records[0]["weights"], reference["weights"]) < 1e-5


def _run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env={**os.environ, **environment}
    )


def test_import_registers_once_and_does_nothing_else():
    code = """
import torch, threading, os, warnings
import deepspeed
from deepspeed.runtime import engine
before = (threading.active_count(), dict(os.environ), torch.get_num_threads())
stock = engine.DeepSpeedEngine._configure_zero_optimizer
import deepspeed_acco
first = engine.DeepSpeedEngine._configure_zero_optimizer
from deepspeed_acco.engine.patches import register
register()
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
assert ZERO_SUPPORTED_OPTIMIZERS.count(deepspeed_acco.ACCO) == 1
assert first is not stock and engine.DeepSpeedEngine._configure_zero_optimizer is first
assert torch.optim.ACCO is deepspeed_acco.ACCO
assert before == (threading.active_count(), dict(os.environ), torch.get_num_threads())
assert not torch.distributed.is_initialized()
print(deepspeed_acco.__version__)
"""
    done = _run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].count(".") == 2


def test_import_without_deepspeed_is_one_sentence():
    code = "import sys; sys.modules['deepspeed'] = None; import deepspeed_acco"
    done = _run_python(code)
    assert done.returncode != 0
    assert "deepspeed_acco is a plugin of DeepSpeed, which could not be imported. Install it" in done.stderr


@pytest.mark.parametrize(("version", "is_tested"), [("0.16.8", 0), ("0.16.9", 1), ("0.19.8+abc", 1), ("0.20.0", 0)])
def test_deepspeed_versions(version, is_tested, monkeypatch):
    from deepspeed_acco.engine.patches import VERSION_OVERRIDE, require_tested_deepspeed

    if is_tested:
        require_tested_deepspeed(version)
        return
    with pytest.raises(ImportError, match=f"found {version}.*{VERSION_OVERRIDE}=1"):
        require_tested_deepspeed(version)
    monkeypatch.setenv(VERSION_OVERRIDE, "1")
    require_tested_deepspeed(version)


def test_another_optimizer_is_not_touched(ranks):
    config = training.ds_config(4)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    assert ranks(1).run(_try, config=config)[0] == ("built", "DeepSpeedZeroOptimizer")


def _other_engine_in_true_weights():
    import deepspeed_acco

    config = training.ds_config(4)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    engine = training.start_engine(config)
    try:
        with deepspeed_acco.true_weights(engine):
            return "no error"
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()


def test_true_weights_of_another_optimizer_is_refused(ranks):
    assert "allowed: one whose optimizer.type is" in ranks(1).run(_other_engine_in_true_weights)[0]


def _log_of_start(config, has_own_optimizer=False):
    import io
    import logging

    import torch

    from deepspeed_acco.engine.log import logger as acco_logger

    logger = acco_logger()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    arguments = {}
    if has_own_optimizer:
        arguments["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    engine = training.start_engine(config, **arguments)
    synchronized = engine.tput_timer.config.synchronized
    engine.destroy()
    logger.removeHandler(handler)
    return [line for line in stream.getvalue().splitlines() if "ACCO:" in line], synchronized


def test_one_start_up_line_on_rank_zero(ranks):
    config = training.ds_config(5, estimate_fraction=0.75) | {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    (first, synchronized), (second, _) = ranks(2).run(_log_of_start, config=config)
    assert len(first) == 2 and not second
    for part in ("schedule=acco", "a=4 b=1", "lane=thread", "own buffers=", "kernels="):
        assert part in first[0]
    assert "accepted without effect in zero_optimization: overlap_comm" in first[1]
    assert synchronized is False


def _log_of_start_in_a_trainer(schedule):
    import os

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        return _log_of_start(training.ds_config(4, schedule=schedule))[0]
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


@pytest.mark.parametrize(("schedule", "is_late"), [("acco", True), ("sync", False)])
def test_a_trainer_is_told_whose_norm_it_logs(ranks, schedule, is_late):
    first, second = ranks(2).run(_log_of_start_in_a_trainer, schedule=schedule)
    late = [line for line in first if "grad_norm that the trainer logs is that of the step before" in line]
    assert (len(late), len(first), second) == (is_late, 1 + is_late, [])


def test_a_json_without_an_optimizer_is_told(ranks):
    """Where the trainer brings its own; a JSON that names another means it."""
    config = training.ds_config(2) | {"zero_optimization": {"stage": 0}}
    named = config | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    del config["optimizer"]
    (lines, _), (second, _) = ranks(2).run(_log_of_start, config=config, has_own_optimizer=True)
    assert len(lines) == 1 and "imported and not used: this run trains with SGD" in lines[0] and not second
    assert not ranks(2).run(_log_of_start, config=config, has_own_optimizer=True)[0][0], "it is told once"
    assert not ranks(2).run(_log_of_start, config=named)[0][0]


def test_a_switched_off_overflow_check_is_told(ranks):
    config = training.ds_config(2) | {"bf16": {"enabled": True, "check_grad_overflow": False}}
    (lines, _), (second, _) = ranks(2).run(_log_of_start, config=config)
    assert any("accepted without effect: bf16.check_grad_overflow = false" in line for line in lines)
    assert not second


REFERENCE_MODEL = """
import copy
import json
import sys

import deepspeed
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin

import deepspeed_acco
from tests.support import training

PartialState(cpu=True)
plugin = DeepSpeedPlugin(hf_ds_config=json.loads(sys.argv[-1]))
accelerator = Accelerator(deepspeed_plugin=plugin)
changed = copy.deepcopy(plugin.deepspeed_config)
changed["zero_optimization"]["stage"] = 0
module = training.make_network()
expected = module(*training.batch(0, 0, 0)).item()
engine, optimizer, _, scheduler = deepspeed.initialize(model=module, config=changed)
print("made", optimizer, scheduler, engine(*training.batch(0, 0, 0)).item() == expected)
other = {**changed, "gradient_clipping": 0.5}  # another JSON than the one that trains
plugin.deepspeed_config["zero_optimization"]["stage"] = 1
for config in (other, changed):
    try:
        deepspeed.initialize(model=module, config=config)
    except ValueError as error:
        print("refused", error)
    plugin.deepspeed_config["zero_optimization"]["stage"] = 0  # what would be trained has stage 0 itself
"""


@pytest.mark.full
@pytest.mark.distributed
def test_a_reference_model_of_trl_gets_no_optimizer(tmp_path):
    from tests.support.ranks import run_script

    (script := tmp_path / "reference_model.py").write_text(REFERENCE_MODEL)
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    config = json.dumps(training.ds_config(1) | {"scheduler": scheduler})
    ended = run_script(script, config, ranks=1)
    assert "made None None True" in ended.stdout, ended.stderr
    assert ended.stdout.count("refused ACCO: zero_optimization.stage = 0 is not allowed") == 2, ended.stderr
    assert "makes an engine without an optimizer: that of a reference model" in ended.stdout + ended.stderr
