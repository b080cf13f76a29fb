"""What the distributed tests train: a small network, its data, a run under DeepSpeed and the same run in the reference."""

from __future__ import annotations

import torch
from torch import nn

FEATURES, HIDDEN, TARGETS = 7, 13, 3


class Network(nn.Module):
    """Odd sizes, a tied weight, a frozen parameter and one that no forward uses."""

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
    torch.manual_seed(seed)
    return Network()


def batch(rank: int, window: int, micro_batch: int, dtype=torch.float32):
    """Inputs and targets of one micro-batch; every one differs, so that a mixed-up order shows."""
    generator = torch.Generator().manual_seed(1 + micro_batch + 100 * window + 10_000 * rank)
    x = torch.randn(4, FEATURES, generator=generator)
    y = torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x.square().mean(1)], 1)
    y = y + 0.1 * torch.randn(4, TARGETS, generator=generator)
    return x.to(dtype), y.to(dtype)


def param_groups(module: nn.Module, groups: int):
    """One group, or one with decay and one without and with another learning rate."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if groups == 1:
        return trainable
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0, "lr": 4e-3},
    ]


HYPER = {"lr": 1e-2, "betas": [0.8, 0.97], "eps": 1e-8, "weight_decay": 0.1}


def ds_config(n: int, clip: float = 0.0, precision: str = "fp32", **params) -> dict:
    """A DeepSpeed JSON for ACCO; ``precision`` is fp32, bf16, fp16 (dynamic) or fp16static, ``+fp32`` accumulates in fp32."""
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
        config["fp16"] = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 6, "hysteresis": 1}
    elif kind == "fp16static":
        config["fp16"] = {"enabled": True, "loss_scale": 128.0}
    if accumulation:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    return config


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16static": torch.float16}


def start_engine(config: dict, groups: int = 1, seed: int = 5, **arguments):
    import deepspeed

    import deepspeed_acco  # noqa: F401

    module = make_network(seed)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=param_groups(module, groups), config=config, **arguments
    )
    return engine


def true_master_weights(engine) -> list[torch.Tensor]:
    """The fp32 true weights of the trainable parameters, in the order of the module."""
    from deepspeed.utils import safe_get_full_fp32_param

    import deepspeed_acco

    with deepspeed_acco.true_weights(engine):
        return [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters() if p.requires_grad]


def live_weights(engine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters() if p.requires_grad]


def train(config, windows, groups=1, precision="fp32", counts=None, style="engine", look=None, lr_decay=None):
    """Trains under DeepSpeed and returns what the reference must give, too.

    Args:
        counts: micro-batches of each window, where they differ from n (the boundary is then set by hand).
        style: ``engine``, ``torch`` (``loss.backward()``), ``no_sync``, ``boundary`` or ``unmanaged``.
        look: called as ``look(engine, window, micro_batch)`` between micro-batches; must not change the trajectory.
    """
    import torch.distributed as dist

    rank = dist.get_rank()
    arguments = {}
    if lr_decay is not None:
        arguments["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, lr_decay)
    if style == "unmanaged":
        config = {**config, "managed_gradient_accumulation": False}
    engine = start_engine(config, groups, **arguments)
    n = engine.gradient_accumulation_steps()
    dtype = DTYPES[precision.partition("+")[0]]
    record = {"losses": [], "norms": [], "replicas": [], "skipped": [], "lr": [], "scale": []}
    for window in range(windows):
        count = counts[window] if counts else n
        for micro_batch in range(count):
            is_last = micro_batch == count - 1
            if style == "boundary" or counts:
                engine.set_gradient_accumulation_boundary(is_last)
            x, y = batch(rank, window, micro_batch, dtype)
            if style == "no_sync" and not is_last:
                with engine.no_sync():
                    loss = engine(x, y)
                    engine.backward(loss)
            else:
                loss = engine(x, y)
                if style == "torch":
                    engine.scale(loss).backward()
                else:
                    engine.backward(loss)
            record["losses"].append(loss.item())
            if look is not None:
                look(engine, window, micro_batch)
            if style == "engine" or (style == "torch") or is_last:
                if style != "unmanaged" or is_last:
                    if style == "no_sync" and n > 1:
                        engine.set_gradient_accumulation_boundary(True)
                    engine.step()
        record["norms"].append(float(engine.get_global_grad_norm()))
        record["skipped"].append(engine.skipped_steps)
        record["lr"].append(engine.get_lr()[0])
        record["scale"].append(engine.optimizer.cur_scale)
        record["replicas"].append(torch.cat([p.flatten() for p in live_weights(engine)]).double().sum().item())
    record["weights"] = true_master_weights(engine)
    record["live"] = live_weights(engine)
    engine.destroy()
    record["after_destroy"] = live_weights(engine)
    return record
