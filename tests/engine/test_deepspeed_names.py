# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Every name of DeepSpeed that deepspeed_acco relies on. Where a new DeepSpeed fails here, the message says which name
is gone; further tests keep the tables complete."""

import ast
import functools
import importlib
import inspect
import textwrap
from pathlib import Path

import deepspeed
import pytest
from packaging.version import Version

import deepspeed_acco
from deepspeed_acco.engine.deepspeed_engine import Engine

PACKAGE = Path(deepspeed_acco.__file__).parent
ENGINE_ROOM = PACKAGE / "engine"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
ZERO = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"

USED_METHODS = [name for name, member in vars(Engine).items() if inspect.isfunction(member) and name[:2] != "__"]

# A name with "@" is needed from that DeepSpeed on: the first of the tested ones that has it; with those before it the
# code does without.

# modules, classes and what is found in them: "module:name" or "module:class"
EXISTING = {
    "deepspeed": "__version__ add_config_arguments comm init_distributed initialize",
    "deepspeed.accelerator": "get_accelerator",
    "deepspeed.checkpoint": "SubparamShape",
    "deepspeed.constants": "default_pg_timeout",
    "deepspeed.ops.adam": "DeepSpeedCPUAdam FusedAdam",
    "deepspeed.runtime.config": "DeepSpeedConfig",
    "deepspeed.runtime.engine": "DeepSpeedEngine DeepSpeedZeroOptimizer ZERO_OPTIMIZATION",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine": "TorchCheckpointEngine",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine": "save commit",
    "deepspeed.runtime.pipe.module:PipelineModule": "ckpt_layer_path ckpt_layer_path_list num_pipeline_stages",
    "deepspeed.runtime.fp16.loss_scaler": "DynamicLossScaler LossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.utils": "ZERO_SUPPORTED_OPTIMIZERS",
    "deepspeed.utils": "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state",
    "deepspeed.utils.logging": "LoggerFactory",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.utils.logging:LoggerFactory": "create_logger",
    # wrapped or called by engine/
    "deepspeed.runtime.utils": "is_model_parallel_parameter",
    ENGINE: "_configure_optimizer _configure_zero_optimizer _do_optimizer_sanity_check _take_model_step "
    "_consolidated_16bit_state_dict "
    f"load_checkpoint save_checkpoint set_train_batch_size {' '.join(USED_METHODS)}",
    # overridden by AccoZeroOptimizer or called by it
    ZERO: "_lazy_init_hp_params_optimizer_state _link_all_hp_params _restore_from_bit16_weights _update_scale "
    "backward_epilogue destroy load_state_dict loss_scale offload_states@0.17.6 process_gradients "
    "create_gradient_handling_hooks@0.17.6 queue_post_backward_callback@0.19 _remaining_grad_acc_hooks@0.19 "
    "reduce_gradients state_dict step update_lp_params zero_grad backward_prologue",
}

# instance attributes: the class or one of its bases assigns them (or a property of that name exists)
ASSIGNED = {
    ENGINE: " ".join(Engine.__annotations__),
    ZERO: "_global_grad_norm _hp_optimizer_states_linked bit16_groups bit16_groups_flat clip_grad "
    "communication_data_type dp_process_group dtype gradient_accumulation_dtype gradient_predivide_factor optimizer "
    "overflow partition_count postscale_gradients single_partition_of_fp32_groups loss_scaler "
    "timers _param_slice_mappings groups_padding param_names round_robin_bit16_padding@0.19 "
    "model_parallel_group model_parallel_world_size model_parallel_rank "
    "gradient_average@0.19 sequence_parallel_size compute_grad_norm@0.19 _coalesce_grad_reduction@0.19",
    "deepspeed.monitor.monitor:MonitorMaster": "enabled tb_monitor",
    "deepspeed.monitor.tensorboard:TensorBoardMonitor": "summary_writer",
    "deepspeed.runtime.config:DeepSpeedConfig": "_param_dict managed_gradient_accumulation@0.19 zero_config",
    "deepspeed.runtime.pipe.module:PipelineModule": "forward_funcs",
    "deepspeed.utils.timer:ThroughputTimer": "batch_size config",
}

# fields of pydantic configurations
FIELDS = {
    "deepspeed.runtime.zero.config:DeepSpeedZeroConfig": "stage offload_optimizer elastic_checkpoint zenflow@0.17.6",
    "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig": "device",
}

# keyword arguments of constructors
ARGUMENTS = {ZERO: "init_optimizer contiguous_gradients overlap_comm"}

# attributes, functions and strings that a module's source names: what it reads of our optimizer or our parameters, or
# looks up under a name that we rebind
READ = {
    "deepspeed.runtime.engine": "DeepSpeedZeroOptimizer _do_optimizer_sanity_check _global_grad_norm "
    "backward_epilogue@0.18.9 checkpoint_event_epilogue checkpoint_event_prologue destroy is_zero_supported_optimizer "
    "overflow reduce_gradients",
    "deepspeed.runtime.pipe.engine": "_take_model_step",
    "deepspeed.runtime.zero.utils": "ZERO_SUPPORTED_OPTIMIZERS",
    "deepspeed.runtime.zero.stage_1_and_2": "process_gradients",
    "deepspeed.utils.tensor_fragment": "get_full_hp_grad get_full_hp_param set_full_hp_grad set_full_hp_param",
    "deepspeed.utils.timer": "synchronized",
}


def _entries(table):
    """(where, name) of what this DeepSpeed must have."""
    present = Version(Version(deepspeed.__version__).base_version)
    for where, names in table.items():
        for entry in names.split():
            name, _, since = entry.partition("@")
            if not since or present >= Version(since):
                yield where, name


def _find(where):
    module, _, name = where.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@functools.cache
def _names_in(where):
    """Attributes, variables and strings in the source, and those of them that ``self`` gets assigned."""
    found = _find(where)
    classes = [c for c in inspect.getmro(found) if c is not object] if inspect.isclass(found) else [found]
    read, assigned = set(), set()
    for part in classes:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part)))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    assigned.add(node.attr)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.__dict__":
                if isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
                    assigned.add(node.slice.value)
            elif isinstance(node, ast.Name):
                read.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    return read, assigned


def _has(kind, where, name):
    found = _find(where)
    if kind == "name":
        return hasattr(found, name)
    if kind == "attribute":
        return name in _names_in(where)[1] or hasattr(found, name)
    if kind == "field":
        return name in found.model_fields
    if kind == "argument":
        return name in inspect.signature(found.__init__).parameters
    assert kind == "use"
    return name in _names_in(where)[0]


TABLES = {"name": EXISTING, "attribute": ASSIGNED, "field": FIELDS, "argument": ARGUMENTS, "use": READ}


def missing_names() -> list[str]:
    """``kind module:class.name`` of everything that this DeepSpeed lacks."""
    missing = []
    for kind, table in TABLES.items():
        for where, name in _entries(table):
            try:
                is_there = _has(kind, where, name)
            except (ImportError, AttributeError):
                is_there = False
            if not is_there:
                missing.append(f"{kind} {where}.{name}")
    return missing


def test_every_name_of_deepspeed_is_there():
    missing = missing_names()
    assert not missing, f"DeepSpeed {deepspeed.__version__} lacks what deepspeed_acco relies on: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("where", "name", "reported"),
    [
        (ENGINE, "_do_optimizer_sanity_check", f"name {ENGINE}._do_optimizer_sanity_check"),
        (ZERO, "update_lp_params", f"name {ZERO}.update_lp_params"),
        ("deepspeed.runtime.zero.utils", "ZERO_SUPPORTED_OPTIMIZERS", "name deepspeed.runtime.zero.utils.ZERO"),
    ],
)
def test_a_missing_name_is_named(monkeypatch, where, name, reported):
    for part in inspect.getmro(_find(where)) if ":" in where else [_find(where)]:
        if name in vars(part):
            monkeypatch.delattr(part, name)
    assert [entry for entry in missing_names() if entry.startswith(reported)]


def test_a_missing_attribute_argument_field_or_use_is_named(monkeypatch):
    """As if the source no longer had it."""
    monkeypatch.setitem(ASSIGNED, ZERO, ASSIGNED[ZERO] + " bit17_groups")
    monkeypatch.setitem(ARGUMENTS, ZERO, "overlap_commotion")
    monkeypatch.setitem(FIELDS, "deepspeed.runtime.zero.config:DeepSpeedZeroConfig", "stages")
    monkeypatch.setitem(READ, "deepspeed.runtime.engine", "checkpoint_event_intermezzo")
    monkeypatch.setitem(EXISTING, "deepspeed.nowhere", "nothing nothing_yet@99")
    assert missing_names() == [
        "name deepspeed.nowhere.nothing",
        f"attribute {ZERO}.bit17_groups",
        "field deepspeed.runtime.zero.config:DeepSpeedZeroConfig.stages",
        f"argument {ZERO}.overlap_commotion",
        "use deepspeed.runtime.engine.checkpoint_event_intermezzo",
    ]


# ---- the tables are complete


def _listed(*places):
    names = set()
    for table in TABLES.values():
        for where, entries in table.items():
            if where in places:
                names.update(entry.partition("@")[0] for entry in entries.split())
    return names


def _class_of(module, name):
    tree = ast.parse((ENGINE_ROOM / f"{module}.py").read_text())
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def _used_of(tree, *owners):
    """Names that are read of one of these variables, also by getattr, hasattr and ``super()``."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners:
            used.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            if ast.unparse(node.args[0]) in owners and isinstance(node.args[1], ast.Constant):
                used.add(node.args[1].value)
    return used


def _defined_by(tree):
    """Methods of the class and what it alone assigns to ``self``."""
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    constants = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    return stored | constants | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_our_subclass_uses_or_overrides_is_listed():
    tree, where = _class_of("zero_optimizer", "AccoZeroOptimizer"), ZERO
    inherited = _used_of(tree, "self", "super()") - _defined_by(tree) - {"__init__"}
    assert inherited <= _listed(where), f"not listed: {sorted(inherited - _listed(where))}"
    overridden = {method for method in _defined_by(tree) if hasattr(_find(where), method)} - {"__init__"}
    assert overridden <= _listed(where), f"not listed: {sorted(overridden - _listed(where))}"


def test_what_we_use_of_the_engine_is_listed():
    used = set()
    for path in ENGINE_ROOM.glob("*.py"):
        tree = ast.parse(path.read_text())
        used |= _used_of(tree, "engine", "engine_class", "self._engine()")
    assert used <= _listed(ENGINE), f"not listed: {sorted(used - _listed(ENGINE))}"
    checkpoint = ast.parse((ENGINE_ROOM / "checkpoint_shards.py").read_text())
    ours = {
        method.name for method in ast.walk(_class_of("zero_optimizer", "AccoZeroOptimizer")) if hasattr(method, "name")
    }
    shard = _used_of(checkpoint, "optimizer", "engine.optimizer") - ours - {"settings", "origin"}
    assert shard <= _listed(ZERO), f"not listed: {sorted(shard - _listed(ZERO))}"
    config = _used_of(
        ast.parse((ENGINE_ROOM / "patches.py").read_text()), "config", "zero", "offload", "engine._config"
    )
    listed = _listed("deepspeed.runtime.config:DeepSpeedConfig", *FIELDS)
    assert config <= listed, f"not listed: {sorted(config - listed)}"


def test_what_we_import_of_deepspeed_is_listed():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed" and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    assert alias.name in _listed(node.module) or _listed(whole), f"not listed: {whole} ({path.name})"
        for where, variable in (
            ("deepspeed", "deepspeed"),
            ("deepspeed.runtime.engine", "ds_engine"),
            ("deepspeed.runtime.config", "ds_config"),
            ("deepspeed.runtime.zero.utils", "ds_zero_utils"),
        ):
            unlisted = _used_of(tree, variable) - _listed(where)
            assert path.name == "__init__.py" or not unlisted, f"not listed: {where} {sorted(unlisted)} ({path.name})"
