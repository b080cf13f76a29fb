"""Gives the distributed tests what they train: a small network, its data, and runs under DeepSpeed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

FEATURES, HIDDEN, TARGETS = 7, 13, 3


class Network(nn.Module):
    """Has odd sizes, a tied weight, a frozen parameter and one that no forward uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.middle = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.again = nn.Linear(HIDDEN, HIDDEN)
        self.again.weight = self.middle.weight
        self.last = nn.Linear(HIDDEN, TARGETS)
        self.frozen = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.again(torch.tanh(self.middle(h))) + self.frozen.sum())
        return (self.last(h) - y).square().mean()


def make_network(seed: int = 5) -> Network:
    """Makes the network, the same of every seed on every rank."""
    torch.manual_seed(seed)
    return Network()


def batch(rank: int, window: int, micro_batch: int, dtype=torch.float32):
    """Returns inputs and targets of one micro-batch; every one differs, so that a mixed-up order shows."""
    generator = torch.Generator().manual_seed(1 + micro_batch + 100 * window + 10_000 * rank)
    x = torch.randn(4, FEATURES, generator=generator)
    y = torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x.square().mean(1)], 1)
    y = y + 0.1 * torch.randn(4, TARGETS, generator=generator)
    return x.to(dtype), y.to(dtype)


def batch_for(engine, rank: int, window: int, micro_batch: int, dtype=torch.float32):
    """Returns :func:`batch` on the engine's device."""
    return [values.to(engine.device) for values in batch(rank, window, micro_batch, dtype)]


def param_groups(module: nn.Module, groups: int):
    """Returns one group, or one with decay and one without and with another learning rate."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if groups == 1:
        return trainable
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0, "lr": 4e-3},
    ]


HYPER = {"lr": 1e-2, "betas": [0.8, 0.97], "eps": 1e-8, "weight_decay": 0.1}


def ds_config(n: int, clip: float = 0.0, precision: str = "fp32", **params) -> dict:
    """Returns a DeepSpeed JSON for ACCO; ``precision`` is fp32, bf16, fp16 or fp16static; ``+fp32`` accumulates so."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": n,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "ACCO", "params": {**HYPER, **params}},
        "steps_per_print": 10**9,
    }
    kind, _, accumulation = precision.partition("+")
    if kind == "bf16":
        config["bf16"] = {"enabled": True}
    elif kind == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 6, "hysteresis": 1}
    elif kind == "fp16static":
        config["fp16"] = {"enabled": True, "loss_scale": 128.0}
    if accumulation:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    return config


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16static": torch.float16}


def allow_fp16() -> None:
    """Lets DeepSpeed train in fp16 on a CPU without the fast instructions that it asks for: all have the arithmetic."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def start_engine(config: dict, groups: int = 1, seed: int = 5, **arguments):
    """Returns DeepSpeed's engine for the network; further arguments go to ``deepspeed.initialize``."""
    import deepspeed

    import deepspeed_acco  # noqa: F401

    allow_fp16()
    module = make_network(seed)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=param_groups(module, groups), config=config, **arguments
    )
    return engine


def true_master_weights(engine) -> list[torch.Tensor]:
    """Returns the fp32 true weights of the trainable parameters, in the order of the module."""
    from deepspeed.utils import safe_get_full_fp32_param

    import deepspeed_acco

    with deepspeed_acco.true_weights(engine):
        return [safe_get_full_fp32_param(p).cpu().clone() for p in engine.module.parameters() if p.requires_grad]


def live_weights(engine) -> list[torch.Tensor]:
    """Returns copies in host memory of the trainable parameters as they stand, in the order of the module."""
    return [p.detach().cpu().clone() for p in engine.module.parameters() if p.requires_grad]


def train(config, windows, groups=1, precision="fp32", counts=None, style="engine", look=None, lr_decay=None):
    """Trains with ACCO under DeepSpeed and returns what the reference must give, too.

    Args:
        counts: micro-batches of each window, where they differ from n (the boundary is then set by hand).
        style: ``engine``, ``torch`` (``loss.backward()``), ``no_sync``, ``boundary`` or ``unmanaged``.
        look: name of a function of this file, called as ``look(engine, window, micro_batch)`` after every backward; it
            must not change the trajectory.
    """
    arguments = {}
    if lr_decay is not None:
        arguments["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, lr_decay)
    if style == "unmanaged":
        config = {**config, "managed_gradient_accumulation": False}
    engine = start_engine(config, groups, **arguments)
    history = run_windows(engine, windows, precision, counts, style, globals()[look] if look else None)
    history["weights"] = true_master_weights(engine)
    history["live"] = live_weights(engine)
    engine.destroy()
    history["after_destroy"] = live_weights(engine)
    return history


def train_stock(config, windows, groups=1, precision="fp32"):
    """Trains by the same loop with whatever optimizer the JSON names."""
    engine = start_engine(config, groups)
    history = run_windows(engine, windows, precision)
    engine.destroy()
    return history


def run_windows(
    engine, windows, precision="fp32", counts=None, style="engine", look=None, first_window=0, same_data=False
):
    """Trains, and returns losses by micro-batch and after each window norm, skipped steps, lr, scale, replica sum.

    Args:
        same_data: every rank sees rank 0's, so that their number changes nothing.
    """
    import torch.distributed as dist

    rank = 0 if same_data else dist.get_rank()
    dtype = DTYPES[precision.partition("+")[0]]
    history = {"losses": [], "norms": [], "replicas": [], "skipped": [], "lr": [], "scale": []}
    for window in range(first_window, first_window + windows):
        count = counts[window] if counts else engine.gradient_accumulation_steps()
        for micro_batch in range(count):
            is_last = micro_batch == count - 1
            if style in ("boundary", "no_sync") or counts:
                # With no_sync the flag stays up from the step before: it must not count inside.
                engine.set_gradient_accumulation_boundary(is_last or style == "no_sync")
            x, y = batch_for(engine, rank, window, micro_batch, dtype)
            with engine.no_sync() if style == "no_sync" and not is_last else nullcontext():
                loss = engine(x, y)
                if style == "torch":
                    engine.scale(loss).backward()
                else:
                    engine.backward(loss)
            history["losses"].append(loss.item())
            if look is not None:
                look(engine, window, micro_batch)
            if is_last or style in ("engine", "torch", "boundary"):
                engine.step()
        norm = engine.get_global_grad_norm()
        history["norms"].append(None if norm is None else float(norm))  # None: stock stage 0 in fp32
        history["skipped"].append(engine.skipped_steps)
        history["lr"].append(engine.get_lr()[0])
        history["scale"].append(getattr(engine.optimizer, "cur_scale", 1.0))
        history["replicas"].append(torch.cat([p.flatten() for p in live_weights(engine)]).double().sum().item())
    return history


def look_in_every_way(engine, window, micro_batch):
    """Evaluates, reads state_dict() and the true weights at changing moments of the window."""
    import deepspeed_acco

    dtype = next(engine.module.parameters()).dtype
    x, y = batch_for(engine, 77, window, micro_batch, dtype)
    if micro_batch % 2 == 0:
        engine.eval()
        with torch.no_grad():
            engine(x, y)
        engine.train()
    if (window + micro_batch) % 3 == 0:
        engine.module.state_dict()
        engine.module.first.state_dict()
    if (window + micro_batch) % 4 == 0:
        with deepspeed_acco.true_weights(engine), deepspeed_acco.true_weights(engine):
            live_weights(engine)
    if window % 5 == 4 and micro_batch == 1:
        engine.module.eval()  # a forward that builds a graph nobody uses
        engine(x, y)
        engine.module.train()
