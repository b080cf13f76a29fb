"""Starts what the tests of checkpoints save and load, and compares what was loaded."""

import hashlib

import torch

import deepspeed_acco
from tests.support import training


def _decays(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def start(config, groups=2, seed=5):
    """Returns an engine with a learning-rate scheduler."""
    return training.start_engine(config, groups, seed=seed, lr_scheduler=_decays)


def whole_state(engine) -> dict:
    """Returns master weights and AdamW state of all parameters, whatever the optimizer and the number of ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            states[name] = [safe_get_full_fp32_param(param).clone()]
            for moment in ("exp_avg", "exp_avg_sq"):
                states[name].append(safe_get_full_optimizer_state(param, moment).clone())
    step = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return {"states": states, "step": step}


def same_state(mine, theirs) -> bool:
    """Tells whether two of these have the same bits."""
    return mine["step"] == theirs["step"] and all(
        all(a.equal(b) for a, b in zip(mine["states"][name], theirs["states"][name])) for name in theirs["states"]
    )


def fingerprint(engine) -> str:
    """Returns a hash of everything of this rank that a checkpoint would overwrite, but the last norm."""
    optimizer = engine.optimizer
    with deepspeed_acco.true_weights(engine):
        tensors = [tensor.clone() for tensor in engine.module.state_dict().values()]
        resume = optimizer.driver.resume_state()
    tensors += [*resume.live, *resume.predictions]
    for master in optimizer.single_partition_of_fp32_groups:
        state = optimizer.optimizer.state[master]
        tensors += [master, state["exp_avg"], state["exp_avg_sq"], torch.as_tensor(state["step"])]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    groups = [
        sorted((key, value) for key, value in group.items() if key != "params") for group in optimizer.param_groups
    ]
    counts = (engine.global_steps, engine.global_samples, engine.skipped_steps, optimizer.position.window)
    digest.update(repr((groups, counts, vars(optimizer.loss_scaler), optimizer.clip_grad)).encode())
    digest.update(repr(engine.lr_scheduler.state_dict()).encode())
    return digest.hexdigest()
