# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes DeepSpeed know ACCO, as the only file that changes anything of DeepSpeed or torch; see TOUCH_POINTS."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os

import deepspeed
import hjson
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import engine as ds_engine
from deepspeed.runtime.zero import utils as ds_zero_utils
from packaging.version import Version
from torch.optim import Optimizer

from ..algorithm.schedules import SCHEDULES
from ..algorithm.window import phase_a_micro_batches
from ..optim import native
from ..optim.build_locks import describe_locks
from ..optimizer import ACCO
from . import leaving, owners, recorder, saving, trainers
from .checkpoint_model import LoadOptions
from .checks import check_engine
from .deepspeed_engine import Engine
from .json_checks import check_window, names_acco, problems_of_json, problems_of_name, raise_first, without_effect
from .log import describe_bytes, logger
from .true_weights import true_weights
from .zero_optimizer import AccoZeroOptimizer

OLDEST_DEEPSPEED = "0.16.9"
FIRST_UNTESTED_DEEPSPEED = "0.20"
VERSION_OVERRIDE = "DEEPSPEED_ACCO_ANY_DEEPSPEED"

# What is changed, and why it cannot be done without (all looked up by name, so a rename is an error at import):
TOUCH_POINTS = (
    "torch.optim.ACCO",  # the engine looks the JSON's optimizer.type up there
    "deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS",  # compared with the exact type
    "deepspeed.runtime.config.DeepSpeedConfig.__init__",  # the same ValueError for keys that it refuses; TRL's stage 0
    "deepspeed.runtime.engine.DeepSpeedEngine._configure_optimizer",  # errors before anything else looks at the config
    "deepspeed.runtime.engine.DeepSpeedEngine._do_optimizer_sanity_check",  # else bf16 with fp32 sums trains AdamW
    "deepspeed.runtime.engine.DeepSpeedEngine._configure_zero_optimizer",  # chooses the wrapper class
    "deepspeed.runtime.engine.DeepSpeedEngine._take_model_step",  # monitor events after its counting; recorder.py
    "deepspeed.runtime.engine.DeepSpeedEngine.set_gradient_accumulation_boundary",  # adaptive windows have their own
    "deepspeed.runtime.engine.DeepSpeedEngine.set_train_batch_size",  # the same ValueError for n = 1 in mid-training
    "deepspeed.runtime.engine.DeepSpeedZeroOptimizer",  # rebound only while the call above runs
    "deepspeed.runtime.engine.DeepSpeedEngine.load_checkpoint",  # all files are checked before one is loaded
    "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint",  # a tag stays whole, all ranks learn of errors
    "engine.checkpoint_engine.save, commit",  # rebound only while the call above runs
    "sys.excepthook",  # a process that an exception has ended ends, whatever a round waits for
    "engine.tput_timer.config.synchronized",  # it would wait for the device at every forward and step
)


def require_tested_deepspeed(version: str = deepspeed.__version__) -> None:
    """Raises ImportError for a DeepSpeed outside the tested range, unless the override variable is set to 1."""
    release = Version(Version(version).base_version)
    is_tested = Version(OLDEST_DEEPSPEED) <= release < Version(FIRST_UNTESTED_DEEPSPEED)
    if not is_tested and os.environ.get(VERSION_OVERRIDE) != "1":
        raise ImportError(
            f"deepspeed_acco was tested with DeepSpeed {OLDEST_DEEPSPEED} to 0.19.x and found {version}. Install one "
            f'of these (pip install "deepspeed>={OLDEST_DEEPSPEED},<{FIRST_UNTESTED_DEEPSPEED}"), or set '
            f"{VERSION_OVERRIDE}=1 to try this one at your own risk"
        )


def register() -> None:
    """Registers the plugin with torch and DeepSpeed; a second call changes nothing."""
    if getattr(torch.optim, "ACCO", None) is ACCO:
        return
    require_tested_deepspeed()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for text in describe_locks():  # before DeepSpeed's own operators are built, behind such a lock
            logger().warning(f"ACCO: {text}")
    engine_class = ds_engine.DeepSpeedEngine
    wrapped = {
        "_configure_optimizer": _wrap_configure_optimizer(engine_class._configure_optimizer),
        "_do_optimizer_sanity_check": _wrap_sanity_check(engine_class._do_optimizer_sanity_check),
        "_configure_zero_optimizer": _wrap_configure_zero(engine_class._configure_zero_optimizer),
        "load_checkpoint": _wrap_load_checkpoint(engine_class.load_checkpoint),
        "save_checkpoint": _wrap_save_checkpoint(engine_class.save_checkpoint),
        "_consolidated_16bit_state_dict": _wrap_consolidated(engine_class._consolidated_16bit_state_dict),
        "_take_model_step": _wrap_take_model_step(engine_class._take_model_step),
        "set_gradient_accumulation_boundary": _wrap_set_boundary(engine_class.set_gradient_accumulation_boundary),
        "set_train_batch_size": _wrap_set_train_batch_size(engine_class.set_train_batch_size),
    }
    for name, method in wrapped.items():
        setattr(engine_class, name, method)
    ds_config.DeepSpeedConfig.__init__ = _wrap_config(ds_config.DeepSpeedConfig.__init__)
    ds_zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(ACCO)
    setattr(torch.optim, ACCO.__name__, ACCO)
    leaving.install()


def _wrap_configure_optimizer(original):
    @functools.wraps(original)
    def configure_optimizer(engine, client_optimizer, model_parameters):
        owners.end_former_training(engine.module)
        if isinstance(client_optimizer, ACCO):
            check_engine(engine, client_optimizer)
        elif isinstance(client_optimizer, Optimizer):
            _tell_if_not_named(engine, client_optimizer)
        elif client_optimizer is None and engine.optimizer_name() == ACCO.__name__:
            # Build one to check it: nothing of the engine is changed yet, and the parameters are only listed.
            check_engine(engine, ACCO([torch.nn.Parameter(torch.empty(0))], **(engine.optimizer_params() or {})))
        elif callable(client_optimizer) and not isinstance(client_optimizer, Optimizer):
            make = client_optimizer

            def client_optimizer(parameters):
                made = make(parameters)
                if isinstance(made, ACCO):
                    check_engine(engine, made)
                else:
                    _tell_if_not_named(engine, made)
                return made

        return original(engine, client_optimizer, model_parameters)

    return configure_optimizer


def _tell_if_not_named(engine: Engine, client_optimizer: Optimizer) -> None:
    """Says in the log of rank 0 that the client's optimizer trains, unless its JSON names another one itself."""
    if engine.global_rank == 0 and "optimizer" not in engine._config._param_dict:
        _tell_not_used(type(client_optimizer).__name__)


@functools.cache  # one line, however many engines a process builds
def _tell_not_used(name: str) -> None:
    logger().info(
        f'ACCO: imported and not used: this run trains with {name}, and its JSON has no "optimizer". Add '
        '"optimizer": {"type": "ACCO", "params": {...}}'
    )


def _wrap_sanity_check(original):
    @functools.wraps(original)
    def do_optimizer_sanity_check(engine, basic_optimizer):
        chosen = original(engine, basic_optimizer)
        return ds_engine.ZERO_OPTIMIZATION if isinstance(basic_optimizer, ACCO) else chosen

    return do_optimizer_sanity_check


def _wrap_configure_zero(original):
    @functools.wraps(original)
    def configure_zero_optimizer(engine, optimizer):
        if not isinstance(optimizer, ACCO):
            return original(engine, optimizer)
        named = optimizer.settings.schedule
        optimizer.settings = optimizer.settings.of_window(engine.gradient_accumulation_steps())
        with _rebound(ds_engine, "DeepSpeedZeroOptimizer", AccoZeroOptimizer):
            wrapper = original(engine, optimizer)
        if not isinstance(wrapper, AccoZeroOptimizer):
            raise RuntimeError(
                f"ACCO: DeepSpeed {deepspeed.__version__} built {type(wrapper).__name__} instead of ACCO's ZeRO-1 "
                f"optimizer. Install DeepSpeed {OLDEST_DEEPSPEED} to 0.19.x"
            )
        try:
            wrapper.attach(engine)
        except BaseException:
            # At once: the next engine may take its groups, and must not on those ranks alone that have collected it.
            wrapper.driver.close()
            raise
        engine.tput_timer.config.synchronized = False
        _log_start(engine, wrapper, named)
        return wrapper

    return configure_zero_optimizer


def _wrap_load_checkpoint(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(engine, *args, **kwargs):
        if not isinstance(engine.optimizer, AccoZeroOptimizer):
            return original(engine, *args, **kwargs)
        given = signature.bind(engine, *args, **kwargs)
        given.apply_defaults()
        options = {field.name: given.arguments[field.name] for field in dataclasses.fields(LoadOptions)}
        engine.optimizer.require_loadable(given.arguments["load_dir"], given.arguments["tag"], LoadOptions(**options))
        with engine.optimizer.driver.bounded("load_checkpoint"):
            return original(engine, *args, **kwargs)

    return load_checkpoint


def _wrap_save_checkpoint(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_checkpoint(engine, *args, **kwargs):
        if not isinstance(engine.optimizer, AccoZeroOptimizer) or not saving.is_whole_when_written(engine):
            return original(engine, *args, **kwargs)
        given = signature.bind(engine, *args, **kwargs)
        given.apply_defaults()
        names_latest, given.arguments["save_latest"] = given.arguments["save_latest"], False

        def write_all(files: saving.Saving):
            with (
                _rebound(engine.checkpoint_engine, "save", files.write),
                _rebound(engine.checkpoint_engine, "commit", files.publish),
                _rebound(engine.optimizer, "checkpoint_event_epilogue", lambda: None),  # the ranks meet in publish
            ):
                return original(*given.args, **given.kwargs)

        return saving.save(engine, write_all, given.arguments["save_dir"], given.arguments["tag"], names_latest)

    return save_checkpoint


def _wrap_consolidated(original):
    """Shows the true weights to what gathers the parts of a model without ``state_dict()``."""

    @functools.wraps(original)
    def consolidated_16bit_state_dict(engine, *args, **kwargs):
        if not isinstance(engine.optimizer, AccoZeroOptimizer):
            return original(engine, *args, **kwargs)
        with true_weights(engine):
            return original(engine, *args, **kwargs)

    return consolidated_16bit_state_dict


@contextlib.contextmanager
def _rebound(owner, name, replacement):
    """Puts something in the place of an attribute while the block runs."""
    former = vars(owner).get(name)  # None: its class has it
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if former is None:
            delattr(owner, name)
        else:
            setattr(owner, name, former)


def _wrap_take_model_step(original):
    @functools.wraps(original)
    def take_model_step(engine, lr_kwargs=None, *args, **kwargs):
        optimizer = engine.optimizer
        with recorder.of_step(engine):
            if not isinstance(optimizer, AccoZeroOptimizer):
                original(engine, lr_kwargs, *args, **kwargs)
                return
            with optimizer.windows.own_bookkeeping(engine):
                original(engine, lr_kwargs, *args, **kwargs)
            optimizer.after_engine_step(lr_kwargs)

    return take_model_step


def _wrap_set_boundary(original):
    @functools.wraps(original)
    def set_gradient_accumulation_boundary(engine, is_boundary):
        optimizer = engine.optimizer
        if isinstance(optimizer, AccoZeroOptimizer):
            optimizer.windows.refuse_boundary(is_boundary)
            optimizer.progress.is_boundary_by_hand = not optimizer.settings.is_adaptive  # which sets its own
        return original(engine, is_boundary)

    return set_gradient_accumulation_boundary


def _wrap_set_train_batch_size(original):
    @functools.wraps(original)
    def set_train_batch_size(engine, train_batch_size):
        optimizer = engine.optimizer
        if isinstance(optimizer, AccoZeroOptimizer):
            samples = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
            if train_batch_size % samples == 0:  # else DeepSpeed's own error
                check_window(train_batch_size // samples, optimizer.settings)
        return original(engine, train_batch_size)

    return set_train_batch_size


def _log_start(engine: Engine, wrapper: AccoZeroOptimizer, named: str) -> None:
    """Prints how the run trains to the log, on rank 0.

    Args:
        named: the schedule in the user's words.
    """
    if engine.global_rank != 0:
        return
    settings = wrapper.settings
    n = engine.gradient_accumulation_steps()
    window = f"n={n}"
    if SCHEDULES[settings.schedule].has_two_phases:
        a = phase_a_micro_batches(n, settings.first_estimate_fraction)
        window = f"a={a} b={n - a} estimate_comm={settings.estimate_comm}"
    schedule = settings.schedule if named == settings.schedule else f"{settings.schedule} ({named})"
    logger().info(
        f"ACCO: schedule={schedule} {window} commit_comm={settings.commit_comm} "
        f"accumulation={settings.accumulation} lane={wrapper.lane.name} "
        f"own buffers={describe_bytes(wrapper.own_bytes())} per rank, kernels={native.kernels_name(engine.device)}; "
        "timers.throughput.synchronized set to false"
    )
    if trainers.is_running_loop() and SCHEDULES[settings.schedule].overlaps:
        logger().info("ACCO: the grad_norm that the trainer logs is that of the step before; the first step logs none")
    for line in without_effect(engine._config._param_dict, settings, engine.device.type):
        logger().info(f"ACCO: {line}")
    if engine.device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        logger().warning(
            "ACCO: CUDA_DEVICE_MAX_CONNECTIONS=1 puts all streams into one queue of the device, so that rounds run "
            "between the kernels of the computation and not beside them. Unset it, or set 8"
        )
    if engine.wall_clock_breakdown():
        logger().warning("ACCO: wall_clock_breakdown waits for the device at every timer and costs overlap")


def _wrap_config(original):
    @functools.wraps(original)
    def init(self, config, *args, **kwargs):
        raw = config
        if isinstance(config, str) and os.path.isfile(config):
            # As DeepSpeed reads it, which tells about what cannot be read.
            with open(config) as file, contextlib.suppress(ValueError, RecursionError):
                raw = hjson.load(file)
        raise_first(problems_of_name(raw))
        if names_acco(raw):
            raise_first(problems_of_json(raw))
            if trainers.is_for_reference_model(raw):
                # As with a JSON without an optimizer, where the trainer brings its own.
                logger().info(
                    "ACCO: the JSON that trains, with ZeRO stage 0, makes an engine without an optimizer: that of a "
                    "reference model"
                )
                config = {key: value for key, value in raw.items() if key not in ("optimizer", "scheduler")}
        original(self, config, *args, **kwargs)

    return init
