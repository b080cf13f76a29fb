# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Every engine of ZeRO stage 1 with Adam(W) gets ACCO with the same hyper-parameters; each such engine is recorded.

``ACCO_SUITE_SCHEDULE``: the schedule, or ``stock``: nothing is replaced and deepspeed_acco is not imported.
``ACCO_SUITE_EVENTS``: the file that the processes of a test append to, one JSON object a line.
"""

import copy
import functools
import json
import multiprocessing.pool
import os

SCHEDULE = os.environ["ACCO_SUITE_SCHEDULE"]
EVENTS = os.environ["ACCO_SUITE_EVENTS"]

JSON_ADAMS = ("adam", "adamw")
# Of these, what ACCO computes anyway; another value keeps the optimizer as it is.
ONLY_VALUES = {"amsgrad": False, "maximize": False, "bias_correction": True}
ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay")


def record(**event) -> None:
    with open(EVENTS, "a") as file:
        file.write(json.dumps(event) + "\n")


def schedule_for(n: int) -> str:
    """``acco`` refuses windows of one micro-batch; ``dpu`` is the overlapping schedule that has no phases."""
    return "dpu" if SCHEDULE == "acco" and n < 2 else SCHEDULE


def acco_params(name: str, params: dict) -> dict | None:
    """The ``params`` of ACCO for those of a JSON's Adam or AdamW; None where that would be another computation."""
    params = copy.deepcopy(params)
    is_torch = params.pop("torch_adam", False)
    is_decoupled = params.pop("adam_w_mode", True) or name == "adamw"
    params.setdefault("weight_decay", 1e-2 if is_torch and is_decoupled else 0.0)
    if any(params.pop(key, value) != value for key, value in ONLY_VALUES.items()):
        return None
    return params if is_decoupled or not params["weight_decay"] else None


def acco_config(config) -> dict | None:
    """The JSON with ACCO in it, for a parsed DeepSpeedConfig of stage 1 with Adam(W); else None."""
    if config.zero_optimization_stage != 1 or str(config.optimizer_name).lower() not in JSON_ADAMS:
        return None
    params = acco_params(config.optimizer_name.lower(), config.optimizer_params or {})
    if params is None:
        return None
    changed = copy.deepcopy(config._param_dict)
    params["schedule"] = schedule_for(config.gradient_accumulation_steps)
    changed["optimizer"] = {**changed["optimizer"], "type": "ACCO", "params": params}
    return changed


def is_replaceable(optimizer) -> bool:
    """Whether a client's optimizer is an Adam(W) that ACCO computes, too."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam):
        return False
    is_decoupled = type(optimizer) is torch.optim.AdamW or bool(getattr(optimizer, "adam_w_mode", False))
    return all(
        (is_decoupled or not group["weight_decay"])
        and all(group.get(key, value) == value for key, value in ONLY_VALUES.items())
        for group in optimizer.param_groups
    )


def acco_of(optimizer, n: int):
    """ACCO on the groups of a client's Adam(W): the same objects, which its scheduler may hold."""
    from deepspeed_acco import ACCO
    from deepspeed_acco.optimizer import FUSED_ADAM_KEYS

    groups = [{key: group[key] for key in ("params", *ADAMW_KEYS)} for group in optimizer.param_groups]
    made = ACCO(groups, schedule=schedule_for(n))
    for group in optimizer.param_groups:
        for key, value in FUSED_ADAM_KEYS.items():
            group.setdefault(key, value)
    made.param_groups = optimizer.param_groups
    return made


def _prepare_forks() -> None:
    """What every rank of every test would do again for seconds, done once before it is forked."""
    import cpuinfo
    import deepspeed.module_inject  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()


def _stand_in_for_a_gpu() -> None:
    """Lets tests run on a CPU that only ask for what it has under another name: also with ``stock``."""
    import torch
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.git_version_info import torch_info
    from deepspeed.runtime.engine import DeepSpeedEngine

    CPU_Accelerator.current_device = CPU_Accelerator.current_device_name  # the tests take it for a device
    CPU_Accelerator.is_fp16_supported = lambda self: True  # which DeepSpeed denies, and torch computes
    CPU_Accelerator.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    torch_info.update(cuda_version="12.0", nccl_version="2.20", bf16_support=True)
    parallel = torch.nn.parallel.DistributedDataParallel
    make_parallel = parallel.__init__

    @functools.wraps(make_parallel)
    def init(self, module, device_ids=None, output_device=None, **kwargs):
        make_parallel(self, module, **kwargs)

    parallel.__init__ = init
    gather = torch.distributed.all_gather_into_tensor

    @functools.wraps(gather)
    def gather_scalars(output_tensor, input_tensor, *args, **kwargs):
        return gather(
            output_tensor, input_tensor.reshape(-1) if input_tensor.dim() == 0 else input_tensor, *args, **kwargs
        )

    torch.distributed.all_gather_into_tensor = gather_scalars  # NCCL takes scalars, gloo does not
    if not hasattr(DeepSpeedEngine, "sparse_tensor_module_names"):  # newer than the tests: there are none any more
        DeepSpeedEngine.sparse_tensor_module_names = frozenset()


def install() -> None:
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.optim import Optimizer

    _prepare_forks()
    _stand_in_for_a_gpu()
    replaces = SCHEDULE != "stock"
    if replaces:
        import deepspeed_acco  # noqa: F401

        read_config = DeepSpeedConfig.__init__

        @functools.wraps(read_config)
        def init(self, config, *args, **kwargs):
            read_config(self, config, *args, **kwargs)
            changed = acco_config(self)
            if changed is not None:
                read_config(self, changed, *args, **kwargs)

        DeepSpeedConfig.__init__ = init

    configure = DeepSpeedEngine._configure_optimizer

    @functools.wraps(configure)
    def configure_optimizer(engine, client_optimizer, model_parameters):
        n = engine.gradient_accumulation_steps()

        def replaced(optimizer):
            if engine.zero_optimization_stage() != 1 or not is_replaceable(optimizer):
                return optimizer
            record(event="asked", schedule=schedule_for(n), n=n)
            return acco_of(optimizer, n) if replaces else optimizer

        if client_optimizer is None:
            if engine.optimizer_name() == "ACCO" or (not replaces and acco_config(engine._config) is not None):
                record(event="asked", schedule=schedule_for(n), n=n)
        elif isinstance(client_optimizer, Optimizer):
            client_optimizer = replaced(client_optimizer)
        elif callable(client_optimizer):
            make = client_optimizer

            def client_optimizer(parameters):
                return replaced(make(parameters))

        configure(engine, client_optimizer, model_parameters)
        record(event="made", optimizer=type(engine.optimizer).__name__, deepspeed=deepspeed.__version__)

    DeepSpeedEngine._configure_optimizer = configure_optimizer

    # A rank that waits for one that failed would hide the failure: the pool reports it when all have ended.
    report_error = multiprocessing.pool.ExceptionWithTraceback

    def reported(error, traceback):
        record(event="raised", reason=f"{type(error).__name__}: {error}")
        return report_error(error, traceback)

    multiprocessing.pool.ExceptionWithTraceback = reported
