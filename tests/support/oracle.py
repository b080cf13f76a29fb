"""Repeats the runs of training.py in the one-process reference, and measures the distance between the two."""

from __future__ import annotations

import torch

from deepspeed_acco.algorithm.reference import Reference, ReferenceHyper
from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.tools.doctor.training import one_thread
from tests.support.training import DTYPES, HYPER, batch, make_network, param_groups


def groups_of(module, groups):
    """Returns the parameters and the reference's hyper-parameters of each group of :func:`training.param_groups`."""
    made = param_groups(module, groups)
    if groups == 1:
        return [made], [ReferenceHyper(HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])]
    hyper = [ReferenceHyper(g.get("lr", HYPER["lr"]), *HYPER["betas"], HYPER["eps"], g["weight_decay"]) for g in made]
    return [g["params"] for g in made], hyper


def flatten(tensors):
    """Returns the elements of all tensors in one 1-D tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _split(flat, like):
    pieces, start = [], 0
    for tensor in like:
        pieces.append(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return pieces


@one_thread()
def run_reference(
    *,
    schedule,
    world_size,
    windows,
    n,
    a,
    clip=0.0,
    groups=1,
    precision="fp32",
    counts=None,
    warmup=0,
    lr_decay=None,
    lrs=None,
    data=batch,
    scales=None,
    send=None,
    spoil=None,
    drop=None,
    keep=None,
    eps=None,
    estimate_bits=None,
    commit_bits=None,
    shard_numels=(),
    ranks_per_host=1,
    seed=5,
    device="cpu",
):
    """Trains as training.py does, dense and in float64. In 16 bit the forward and backward run in that dtype on the
    same rounded weights, sums are rounded where the run rounds them, and only the rest is float64.

    Args:
        n, a: one number, or a list with one for each window (of ``a`` with a number for each rank: adaptive windows).
        counts: of each window, one number or, with adaptive windows, one for each rank.
        lrs: the learning rate of each window, for all groups.
        data: ``data(rank, window, micro_batch)`` gives inputs and targets.
        scales: fp16: the loss scale of each window.
        send: replaces the rounding of what is communicated.
        spoil: ``spoil(rank, window, micro_batch)`` multiplies that micro-batch's targets.
        drop: ``drop(micro_batch)``: that micro-batch's gradient is thrown away.
        estimate_bits, commit_bits, ranks_per_host: see Reference. shard_numels: likewise, where DeepSpeed has others.
        device: where forward and backward run, which round in an order of their own there.
        keep: called as ``keep(reference, report)`` after every window.
    Returns:
        dict with losses (rank 0, every micro-batch) and those of all ranks, norms, weights (trainable parameters in the
        module's order), what looks show of them, and whether all ranks train at the same weights.
    """
    kind, _, accumulation = precision.partition("+")
    dtype = DTYPES[kind] if kind != "fp32" else torch.float64
    accumulation_dtype = {"": dtype, "fp32": torch.float32}[accumulation]
    module = make_network(seed).to(device, dtype)
    parameters, hyper = groups_of(module, groups)
    for h in hyper:
        h.eps = h.eps if eps is None else eps
    losses = [[] for _ in range(world_size)]
    scale = [1.0]
    n_of = n if isinstance(n, list) else [n] * windows
    a_of = a if isinstance(a, list) else [a] * windows

    def gradient(weights, rank, window, micro_batch):
        with torch.no_grad():
            for flat, group in zip(weights, parameters):
                for param, value in zip(group, _split(flat, group)):
                    param.copy_(value)
                    param.grad = None
        x, y = data(rank, window, micro_batch)
        y = y if spoil is None else y * spoil(rank, window, micro_batch)
        loss = module(x.to(device, dtype), y.to(device, dtype))
        losses[rank].append(loss.item())
        # In the loss's own dtype, as the engine does: at 2**16 fp16 overflows here.
        (loss / n_of[window] * scale[0]).backward()
        return [
            flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in group]).to(accumulation_dtype)
            * (0 if drop is not None and drop(micro_batch) else 1)
            for group in parameters
        ]

    def accumulate(total, new):
        return (total.to(accumulation_dtype) + new).to(accumulation_dtype)

    def rounded(total):
        if kind == "fp32":
            return total
        if dtype is torch.float16:
            return (total * (1.0 / world_size)).to(dtype).double() * (world_size / scale[0])
        return total.to(dtype)

    def pass_on(total):
        if kind == "fp32":
            return total
        if dtype is torch.float16:
            return (total * (scale[0] / world_size)).to(dtype).double() * (world_size / scale[0])
        return total.to(dtype)

    numels = [sum(p.numel() for p in group) for group in parameters]
    # The engine casts the module before it copies the master weights.
    rounded_start = make_network(seed).to(device, DTYPES[kind])
    reference = Reference(
        [flatten(group) for group in groups_of(rounded_start, groups)[0]],
        hyper,
        schedule,
        world_size,
        clip,
        most_kept=1.0 if kind == "fp32" else 0.5,
        see=(lambda weights: weights) if kind == "fp32" else (lambda weights: weights.float().to(dtype)),
        accumulate=accumulate,
        send=send or rounded,
        ranks_per_host=ranks_per_host,
        pass_on=pass_on,
        stands_on_true_after_skip=dtype is torch.float16,
        estimate_bits=estimate_bits,
        commit_bits=commit_bits,
        shard_numels=shard_numels or [-(-numel // (2 * world_size)) * 2 for numel in numels],  # as DeepSpeed pads
    )
    norms, lowest_lr = [], [h.lr for h in hyper]
    for window in range(windows):
        if scales is not None:
            scale[0] = reference.loss_scale = scales[window]
        for h in hyper if lrs is not None else ():
            h.lr = lrs[window]
        n, a = n_of[window], a_of[window]
        report = reference.run_window(gradient, n, a, counts[window] if counts else n, runs_sync=window < warmup)
        norms.append(report.grad_norm)
        if keep is not None:
            keep(reference, report)
        if lr_decay is not None and not (report.skipped and dtype is torch.float16):
            lowest_lr = [lr * lr_decay for lr in lowest_lr]
            for h, lr in zip(hyper, lowest_lr):
                h.lr = lr
    by_parameter, shown = {}, {}
    for of_flat, flats in ((by_parameter, reference.theta), (shown, reference.shown)):
        for flat, group in zip(flats, parameters):
            for param, value in zip(group, _split(flat, group)):
                of_flat[id(param)] = value.cpu()
    trainable = [p for p in module.parameters() if p.requires_grad]
    return {
        "losses": losses[0],
        "losses_of_ranks": losses,
        "norms": norms,
        "is_alike": not SCHEDULES[schedule].predicts_locally,
        "weights": [by_parameter[id(p)] for p in trainable],
        "shown": [shown[id(p)] for p in trainable],
    }


def start_weights(seed=5):
    """Returns the trainable parameters before training, float64, in the module's order."""
    return [p.detach().double() for p in make_network(seed).parameters() if p.requires_grad]


def distance(weights, reference, seed=5) -> float:
    """Returns |weights - reference| over the distance that the reference moved from the start."""
    mine, theirs, start = flatten([w.double() for w in weights]), flatten(reference), flatten(start_weights(seed))
    return float((mine - theirs).norm() / (theirs - start).norm())


def trajectory(*, schedule, world_size, windows, n, a):
    """Returns per window the weights of phase A, of phase B, the newest true ones during it, and those after its
    COMMIT; each a list of the trainable parameters in the module's order (one group, fp32)."""
    like = [p for p in make_network().parameters() if p.requires_grad]
    true = [start_weights()]
    phases = []

    def keep(reference, report):
        phases.append((_split(report.phase_a_weights[0], like), _split(report.phase_b_weights[0], like)))
        true.append(_split(reference.shown[0].clone(), like))

    run_reference(schedule=schedule, world_size=world_size, windows=windows, n=n, a=a, keep=keep)
    return [(*both, true[window], true[window + 1]) for window, both in enumerate(phases)]
