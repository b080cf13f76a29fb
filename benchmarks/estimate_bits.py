# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How few bits rounds may have: the example's model and text in the one-process reference (reference.py), which also
knows 2 bits, the negative control. The same batches, learning rates and clipping for all.

    python benchmarks/estimate_bits.py --out benchmarks/results/estimate_bits.json
    python benchmarks/estimate_bits.py --modes sync full 4+8/8 4+8/4 4+8/2 sync+8/4 --n 2 --micro_batch 8 --steps 600

A mode is the bits of an ESTIMATE; behind a plus the bits of a COMMIT's gradients and of the changes of its weights.

Told are the final validation loss of the true weights, the estimate's error |θ~ - θ| / |step|
(docs/how-to/monitor.md), and the share of weights that an estimate changes at all: with ``--bf16`` weights are rounded
to bf16, as training in bf16 sees them, and at a small learning rate a change may be less than half a unit in a weight's
last place.
"""

import statistics
import time

import torch
from _common import make_parser, origin, progress, tell, write

VALIDATION_BATCH = 32
COMMITS = {"": None, "+8/8": (8, 8), "+8/4": (8, 4), "+8/2": (8, 2), "+4/4": (4, 4)}
ESTIMATES = {"full": None, "8": 8, "4": 4, "2": 2}
MODES = {f"{name}{commit}": (name, commit) for commit in COMMITS for name in ("sync", *ESTIMATES)}
ALONE = ("sync", *ESTIMATES)  # what a COMMIT in full is told of


def flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


class Example:
    """The model, its text, and what the reference asks of them."""

    def __init__(self, arguments, seed: int):
        import train_gpt
        from text_data import load_text, make_model

        self.training_batch = train_gpt.training_batch
        self.seed, self.ranks, self.n, self.micro_batch = seed, arguments.ranks, arguments.n, arguments.micro_batch
        self.model = make_model(arguments.preset, arguments.seq_len, seed)
        self.parameters = list(self.model.parameters())
        self.training, self.validation = load_text(None, arguments.seq_len, self.micro_batch * self.n * self.ranks)

    def set_weights(self, flat) -> None:
        with torch.no_grad():
            start = 0
            for parameter in self.parameters:
                count = parameter.numel()
                parameter.copy_(flat[start : start + count].view_as(parameter))
                start += count

    def gradient(self, weights, rank, window, micro_batch):
        self.set_weights(weights[0])
        first_sample = ((window * self.n + micro_batch) * self.ranks + rank) * self.micro_batch
        batch = self.training_batch(self.training, self.seed, first_sample, self.micro_batch)
        self.model.zero_grad(set_to_none=True)
        (self.model(input_ids=batch, labels=batch).loss / self.n).backward()
        return [flatten([parameter.grad for parameter in self.parameters])]

    def validate(self, weights) -> float:
        self.set_weights(weights[0])
        with torch.no_grad():
            batches = self.validation.long().split(VALIDATION_BATCH)
            total = sum(self.model(input_ids=b, labels=b).loss.item() * len(b) for b in batches)
        return total / len(self.validation)


def levels_from_master(reference, held, bits: int) -> float:
    """Returns how far the weights that all ranks hold are from the masters at most, in levels of their block's last
    change; what their dtype rounds away is taken off."""
    largest = 0.0
    (numel,) = reference.shard_numels
    for of_shard in zip(*(tensor.split(numel) for tensor in (reference.theta[0], held, reference.shown[0]))):
        master, before, shown = (
            torch.nn.functional.pad(tensor.double(), (0, -tensor.numel() % 256)).view(-1, 256) for tensor in of_shard
        )
        level = (master - before).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        half_ulp = torch.ldexp(torch.ones_like(shown), torch.frexp(shown)[1] - 9)
        rounded = half_ulp if reference.see(shown).dtype is torch.bfloat16 else 0.0
        far = ((shown - master).abs() - rounded) / level.clamp(min=1e-30)
        largest = max(largest, float(far.max()))
    return largest


def train(arguments, mode: str, seed: int) -> dict:
    """One run; the medians are over the second half of the steps."""
    from train_gpt import lr_factor

    from deepspeed_acco.algorithm.reference import Reference, ReferenceHyper

    example = Example(arguments, seed)
    start = flatten([parameter.detach() for parameter in example.parameters])

    def see(weights):
        return weights.float().bfloat16() if arguments.bf16 else weights

    estimate, commit = MODES[mode]
    reference = Reference(
        [start],
        [ReferenceHyper(arguments.lr, 0.9, 0.95, 1e-8, 0.1)],
        "sync" if estimate == "sync" else "acco",
        arguments.ranks,
        clip_grad=1.0,
        see=see,
        estimate_bits=ESTIMATES.get(estimate),
        commit_bits=COMMITS[commit],
        shard_numels=[-(-start.numel() // (2 * arguments.ranks)) * 2],  # as DeepSpeed pads them
    )
    errors, changed, drift = [], [], 0.0
    for step in range(arguments.steps):
        reference.hyper[0].lr = arguments.lr * lr_factor(step, arguments.steps, arguments.steps // 10, "cosine")
        before, held = reference.theta[0], see(reference.shown[0]).double()
        reference.run_window(example.gradient, arguments.n, arguments.n // 2)
        stands_at, theta = see(reference.estimate[0]), reference.theta[0]
        if commit:
            held = held if estimate == "sync" else see(reference.estimate[0]).double()
            drift = max(drift, levels_from_master(reference, held, COMMITS[commit][1]))
        if estimate != "sync" and step >= arguments.steps // 2:
            errors.append(float((stands_at - theta).norm() / (theta - before).norm()))
            changed.append(float((stands_at != see(before)).double().mean()))
    row: dict = {"mode": mode, "seed": seed, "val_loss": round(example.validate([see(reference.shown[0])]), 5)}
    if commit:
        row["most_levels_from_master"] = round(drift, 4)
    if errors:
        row |= {"estimate_error": round(statistics.median(errors), 4), "share_changed": statistics.median(changed)}
        row["share_changed"] = round(row["share_changed"], 4)
    return row


def summarize(rows: list[dict]) -> list[dict]:
    """Of each mode: how far its final losses are above those of ``sync`` with the same seed, in percent."""
    sync = {row["seed"]: row["val_loss"] for row in rows if row["mode"] == "sync"}
    summary = []
    for mode in MODES:
        of_mode = [row for row in rows if row["mode"] == mode and row["seed"] in sync]
        if mode == "sync" or not of_mode:
            continue
        above = [100 * (row["val_loss"] / sync[row["seed"]] - 1) for row in of_mode]
        entry = {"mode": mode, "percent_above_sync": [round(value, 3) for value in above]}
        entry["mean_percent"] = round(statistics.mean(above), 3)
        for key in ("estimate_error", "share_changed", "most_levels_from_master"):
            if key in of_mode[0]:
                entry[key] = round(statistics.mean(row[key] for row in of_mode), 4)
        summary.append(entry)
    return summary


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(ALONE), choices=MODES)
    parser.add_argument("--ranks", type=int, default=2)  # this and what follows: as ds_configs/acco.json on two ranks
    parser.add_argument("--n", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--micro_batch", type=int, default=32, help="samples of a micro-batch")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="weights rounded to bf16")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seq_len", type=int, default=64)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for mode in arguments.modes:
            begin = time.perf_counter()
            rows.append(train(arguments, mode, seed))
            progress(f"{rows[-1]} ({time.perf_counter() - begin:.0f} s)")
            results = {**origin(), "summary": summarize(rows), "runs": rows}
            write(results, arguments.out)
    tell(results, arguments.out)


if __name__ == "__main__":
    main()
