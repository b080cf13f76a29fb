"""Starts what the tests of checkpoints save and load, and compares what was loaded."""

import hashlib
import os

import torch

import deepspeed_acco
from tests.support import training

EXACT = ("losses", "norms", "replicas", "skipped", "lr", "scale")
BEFORE, AFTER = 5, 4  # windows before and after the save
SHORT = 3, 3  # likewise, where the engine is another test's


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
            states[name] = [safe_get_full_fp32_param(param).cpu().clone()]
            for moment in ("exp_avg", "exp_avg_sq"):
                states[name].append(safe_get_full_optimizer_state(param, moment).cpu().clone())
    step = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return {"states": states, "step": step}


def same_state(mine, theirs) -> bool:
    """Tells whether two of these have the same bits."""
    return mine["step"] == theirs["step"] and all(
        all(a.equal(b) for a, b in zip(mine["states"][name], theirs["states"][name])) for name in theirs["states"]
    )


def resume(config, precision, groups, folder):
    """Trains the same windows uninterrupted, with a save in between, and resumed in a fresh engine of another seed.

    Returns:
        Of each of the three what :func:`training.run_windows` gives of the last windows, and weights and state.
    """

    def finish(engine, record):
        record["live"], record["state"] = training.live_weights(engine), whole_state(engine)
        record["true"] = training.true_master_weights(engine)
        engine.destroy()
        return record

    engine = start(config, groups)
    training.run_windows(engine, BEFORE, precision)
    plain = finish(engine, training.run_windows(engine, AFTER, precision, first_window=BEFORE))

    engine = start(config, groups)
    training.run_windows(engine, BEFORE, precision)
    engine.save_checkpoint(folder, client_state={"note": 7})
    saving = finish(engine, training.run_windows(engine, AFTER, precision, first_window=BEFORE))

    engine = start(config, groups, seed=9)
    training.run_windows(engine, 2, precision, first_window=50)  # a run that stands elsewhere
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and client_state["note"] == 7
    resumed = finish(engine, training.run_windows(engine, AFTER, precision, first_window=BEFORE))
    return plain, saving, resumed


def check_resumed(results) -> None:
    """Requires of what :func:`resume` gave on every rank that the runs have the same bits."""
    for plain, *others in results:
        for name, other in zip(("saving", "resumed"), others):
            for key in EXACT:
                assert other[key] == plain[key], (name, key)
            for key in ("live", "true"):
                assert all(a.equal(b) for a, b in zip(other[key], plain[key])), (name, key)
            assert same_state(other["state"], plain["state"]), name


def resumed_beside_uninterrupted(start, train, finish, folder) -> list:
    """Trains the same windows uninterrupted, with a save in between, and resumed in a fresh engine of another seed.

    Args:
        start: ``start(seed)`` gives an engine. train: ``train(engine, windows, first_window)`` gives a record, and
            ``finish(engine, record)`` completes it and destroys the engine.
    """
    before, after = SHORT
    records = []
    for saves in (False, True):
        engine = start(5)
        train(engine, before, 0)
        if saves:
            engine.save_checkpoint(folder)
        records.append(finish(engine, train(engine, after, before)))
    engine = start(9)
    train(engine, 2, 50)  # a run that stands elsewhere
    assert engine.load_checkpoint(folder)[0] is not None
    return [*records, finish(engine, train(engine, after, before))]


def exchanged(start, train, finish, configs, folder) -> list:
    """Goes from each configuration's checkpoint to the other; returns losses of who saved and of who loaded.

    Args:
        start: ``start(config, seed)`` gives an engine; the others as above.
    """
    before, after = SHORT
    pairs = []
    for first, second in (configs, configs[::-1]):
        at = os.path.join(folder, first["optimizer"]["type"])
        engine = start(first, 5)
        train(engine, before, 0)
        engine.save_checkpoint(at)
        losses = finish(engine, train(engine, after, before))["losses"]
        engine = start(second, 9)
        engine.load_checkpoint(at)
        pairs.append([losses, finish(engine, train(engine, after, before))["losses"]])
    return pairs


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
