# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How few bits an ESTIMATE may have: the example's model and text in the one-process reference (reference.py), which
also knows 2 bits, the negative control. The same batches, learning rates and clipping for all.

    python benchmarks/estimate_bits.py --out benchmarks/results/estimate_bits.json

Told are the final validation loss of the true weights, the estimate's error |θ~ - θ| / |step|
(docs/how-to/monitor.md), and the share of weights that an estimate changes at all: with ``--bf16`` weights are rounded
to bf16, as training in bf16 sees them, and at a small learning rate a change may be less than half a unit in a weight's
last place.
"""

import statistics
import time

import torch
from _common import make_parser, origin, progress, tell, write

RANKS, N, MICRO_BATCH = 2, 4, 32  # as ds_configs/acco.json on two ranks
MODES = {"sync": None, "full": None, "8": 8, "4": 4, "2": 2}


def flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


class Example:
    """The model, its text, and what the reference asks of them."""

    def __init__(self, arguments, seed: int):
        import train_gpt
        from text_data import load_text, make_model

        self.training_batch = train_gpt.training_batch
        self.seed = seed
        self.model = make_model(arguments.preset, arguments.seq_len, seed)
        self.parameters = list(self.model.parameters())
        self.training, self.validation = load_text(None, arguments.seq_len, MICRO_BATCH * N * RANKS)

    def set_weights(self, flat) -> None:
        with torch.no_grad():
            start = 0
            for parameter in self.parameters:
                count = parameter.numel()
                parameter.copy_(flat[start : start + count].view_as(parameter))
                start += count

    def gradient(self, weights, rank, window, micro_batch):
        self.set_weights(weights[0])
        first_sample = ((window * N + micro_batch) * RANKS + rank) * MICRO_BATCH
        batch = self.training_batch(self.training, self.seed, first_sample, MICRO_BATCH)
        self.model.zero_grad(set_to_none=True)
        (self.model(input_ids=batch, labels=batch).loss / N).backward()
        return [flatten([parameter.grad for parameter in self.parameters])]

    def validate(self, weights) -> float:
        self.set_weights(weights[0])
        with torch.no_grad():
            batches = self.validation.long().split(MICRO_BATCH)
            total = sum(self.model(input_ids=b, labels=b).loss.item() * len(b) for b in batches)
        return total / len(self.validation)


def train(arguments, mode: str, seed: int) -> dict:
    """One run; the medians are over the second half of the steps."""
    from train_gpt import lr_factor

    from deepspeed_acco.algorithm.reference import Reference, ReferenceHyper

    example = Example(arguments, seed)
    start = flatten([parameter.detach() for parameter in example.parameters])

    def see(weights):
        return weights.float().bfloat16().double() if arguments.bf16 else weights

    reference = Reference(
        [start],
        [ReferenceHyper(arguments.lr, 0.9, 0.95, 1e-8, 0.1)],
        "sync" if mode == "sync" else "acco",
        RANKS,
        clip_grad=1.0,
        see=see,
        estimate_bits=MODES[mode],
        shard_numels=[-(-start.numel() // (2 * RANKS)) * 2],  # as DeepSpeed pads them
    )
    errors, changed = [], []
    for step in range(arguments.steps):
        reference.hyper[0].lr = arguments.lr * lr_factor(step, arguments.steps, arguments.steps // 10, "cosine")
        before = reference.theta[0]
        reference.run_window(example.gradient, N, N // 2)
        stands_at, theta = see(reference.estimate[0]), reference.theta[0]
        if mode != "sync" and step >= arguments.steps // 2:
            errors.append(float((stands_at - theta).norm() / (theta - before).norm()))
            changed.append(float((stands_at != see(before)).double().mean()))
    row: dict = {"mode": mode, "seed": seed, "val_loss": round(example.validate([see(reference.theta[0])]), 5)}
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
        for key in ("estimate_error", "share_changed"):
            entry[key] = round(statistics.mean(row[key] for row in of_mode), 4)
        summary.append(entry)
    return summary


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
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
