# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Final validation loss of the schedules with many virtual ranks in one process, beside ``sync`` on the same batches.

    python benchmarks/virtual_ranks.py --out benchmarks/results/virtual_ranks.json --lr 1e-3 3e-3
    python benchmarks/virtual_ranks.py --out benchmarks/results/virtual_ranks.json --lr 3e-3 --beta1 0.95 --ranks 4 64
    python benchmarks/virtual_ranks.py --out benchmarks/results/virtual_ranks.json --draw

A small GPT over the bytes of the example's text. A step has the same batch whatever the number of ranks, so that all
schedules but ``local`` train the same on 2 as on 64 ranks, and run once: their gradients are the mean over the batch.
In ``local`` each rank computes its share of the batch at weights of its own, all of them in one batched pass. Sums are
exact: what is measured is the schedule alone. tests/benchmarks compares every schedule with the one-process reference.

Runs are added to those in --out, and those that are there already are not made again. ``acco:fraction=0.75`` changes an
option of a schedule (``Options``).
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date

import torch
from _common import interval, make_parser, new_figure, origin, progress, save, table_of_losses, write
from torch import Tensor
from torch.nn import functional

from deepspeed_acco.tools.palette import colors_of

BASELINE = "sync"
VALIDATION_SEQUENCES = 1024
BLOCK = 256  # elements that share a root in ``local``
SETTING = ("preset", "seq_len", "batch", "steps", "warmup_steps", "lr", "beta1", "beta2", "weights")


# ---- the model: flat weights [ranks, numel], one row a rank


class GPT:
    """Computes a GPT over bytes for many ranks at once, each at its own weights."""

    def __init__(self, preset: str, seq_len: int):
        from text_data import PRESETS

        self.layers, self.width, self.heads = PRESETS[preset]
        self.seq_len, w = seq_len, self.width
        self.shapes = {"bytes": (256, w), "places": (seq_len, w), "last_norm": (w,), "head": (w, 256)}
        for layer in range(self.layers):
            self.shapes |= {f"norm_1.{layer}": (w,), f"qkv.{layer}": (w, 3 * w), f"out.{layer}": (w, w)}
            self.shapes |= {f"norm_2.{layer}": (w,), f"up.{layer}": (w, 4 * w), f"down.{layer}": (4 * w, w)}
        self.numel = sum(math.prod(shape) for shape in self.shapes.values())

    def start(self, seed: int) -> Tensor:
        """Returns random weights, [numel]."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)
            for name, shape in self.shapes.items()
        ]
        return torch.cat([part.flatten() for part in parts])

    def losses(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Returns each rank's mean loss in nats per byte, [ranks].

        Args:
            weights: [ranks, numel]. tokens: [ranks, sequences, seq_len], int64.
        """
        ranks, sequences, seq_len = tokens.shape
        split = weights.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        of = {name: part.view(ranks, *shape) for (name, shape), part in zip(self.shapes.items(), split)}

        def norm(x, scale):
            return functional.layer_norm(x, (self.width,)) * scale[:, None]

        first = torch.arange(ranks)[:, None, None] * 256
        embedded = functional.embedding(tokens + first, of["bytes"].reshape(ranks * 256, self.width))
        x = (embedded + of["places"][:, None, :seq_len]).flatten(1, 2)
        for layer in range(self.layers):
            qkv = norm(x, of[f"norm_1.{layer}"]) @ of[f"qkv.{layer}"]
            q, k, v = qkv.view(ranks * sequences, seq_len, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.transpose(1, 2).reshape(x.shape) @ of[f"out.{layer}"]
            up = norm(x, of[f"norm_2.{layer}"]) @ of[f"up.{layer}"]
            x = x + functional.relu(up) @ of[f"down.{layer}"]
        x = x.view(ranks, sequences, seq_len, -1)[:, :, :-1].flatten(1, 2)
        logits = norm(x, of["last_norm"]) @ of["head"]
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, :, 1:].flatten(), reduction="none")
        return loss.view(ranks, -1).mean(1)

    def gradients(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Returns each rank's gradient, [ranks, numel]."""
        weights = weights.detach().requires_grad_()
        return torch.autograd.grad(self.losses(weights, tokens).sum(), weights)[0]


# ---- training


@dataclass(frozen=True)
class Options:
    """What a schedule may be changed by.

    Attributes:
        fraction: of the batch, in phase A.
        sync_windows: so many first windows run as ``sync``.
        trust: the estimate's step takes phase A's gradient g for so much, and for the rest the mean that momentum is.
        reach: the estimate goes so many times as far as its step.
        keeping_ranks: in ``local`` so many ranks keep all of how far each stood from the true weights, more of them the
            less.
        most_kept: of it at most.
    """

    fraction: float = 0.5
    sync_windows: int = 0
    trust: float = 1.0
    reach: float = 1.0
    keeping_ranks: float = 2.0
    most_kept: float = 1.0


@dataclass
class State:
    """Holds true weights and AdamW's state, flat and in fp32, and takes its steps; each clips its gradient's norm."""

    theta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0
    lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def clip_(self, gradient: Tensor) -> Tensor:
        """Scales gradients, [..., numel], in place to a norm of ``clip_grad`` at most."""
        norms = gradient.norm(dim=-1, keepdim=True)
        return gradient.div_(((norms + 1e-6) / self.clip_grad).clamp(min=1.0))

    def after(self, gradient: Tensor, trust: float = 1.0) -> "State":
        """Returns the state after a step with the mean gradient, [numel]."""
        g = self.clip_(gradient.clone())
        exp_avg_sq = self.beta2 * self.exp_avg_sq + (1 - self.beta2) * (g * g)
        if self.step:
            g = trust * g + (1 - trust) / (1 - self.beta1**self.step) * self.exp_avg
        exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * g
        step = self.step + 1
        root = (exp_avg_sq / (1 - self.beta2**step)).sqrt() + self.eps
        moved = self.lr * exp_avg / (1 - self.beta1**step) / root
        theta = self.theta * (1 - self.lr * self.weight_decay) - moved
        return replace(self, theta=theta, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)


class Run:
    """Trains by one schedule. ``gradients(weights, tokens)`` gives each rank's, [ranks, numel]."""

    def __init__(self, gradients, see: Callable[[Tensor], Tensor], state: State, options: Options, ranks: int):
        self.gradients, self.see, self.state, self.options, self.ranks = gradients, see, state, options, ranks
        self.estimate = self.before = self.prediction = self.next_prediction = state.theta
        self.of_ranks: Tensor | None = None  # where each rank stands in ``local``
        self.errors: list[float] = []  # of the estimates, in steps

    def mean_gradient(self, weights: Tensor, tokens: Tensor) -> Tensor:
        return self.gradients(self.see(weights)[None], tokens[None])[0]

    def commit(self, gradient: Tensor) -> None:
        self.before, self.state = self.state.theta, self.state.after(gradient)

    def sync(self, tokens: Tensor) -> None:
        self.commit(self.mean_gradient(self.state.theta, tokens))
        self.estimate = self.state.theta

    def acco(self, tokens: Tensor) -> None:
        if self.state.step < self.options.sync_windows:
            return self.sync(tokens)
        in_a = round(self.options.fraction * len(tokens))
        first = self.mean_gradient(self.estimate, tokens[:in_a])
        second = self.mean_gradient(self.state.theta, tokens[in_a:])
        estimate = self.state.after(first, self.options.trust).theta
        estimate = torch.lerp(self.state.theta, estimate, self.options.reach)
        self.commit(torch.lerp(second, first, in_a / len(tokens)))
        self.estimate = estimate
        self.errors.append(float((estimate - self.state.theta).norm() / (self.state.theta - self.before).norm()))

    def dpu(self, tokens: Tensor) -> None:
        self.commit(self.mean_gradient(self.before, tokens))

    def wp(self, tokens: Tensor) -> None:
        gradient = self.mean_gradient(self.prediction, tokens)
        self.commit(gradient)
        self.prediction, self.next_prediction = self.next_prediction, self.state.after(gradient).theta

    def local(self, tokens: Tensor) -> None:
        state = self.state  # without the gradients of this window, which travel while the next one is computed
        stands_at = self.see(state.theta.expand(self.ranks, -1) if self.of_ranks is None else self.of_ranks)
        own = self.gradients(stands_at, tokens.view(self.ranks, -1, tokens.shape[1]))
        share = 1 / (1 - state.beta1 ** (state.step + 1))
        momentum = state.beta1 * (1 - state.beta1**state.step) * share
        most = math.sqrt((1 - state.beta2 ** (state.step + 1)) / (1 - state.beta2))
        newest = self.see(state.theta)
        kept = min(self.options.most_kept, self.options.keeping_ranks / self.ranks)
        moved = newest + momentum * (newest - self.see(self.before) + kept * (stands_at - newest))
        mean = own.mean(0)
        step = state.clip_(own).div_(block_roots(state)).clamp_(-most, most)  # in place: 64 ranks are 64 models
        self.of_ranks = step.mul_(-state.lr * (1 - state.beta1) * share).add_(moved)
        self.commit(mean)


def block_roots(state: State) -> Tensor:
    """Returns what ``local`` divides by, [numel]: one root for each block."""
    squares = state.exp_avg_sq / (1 - state.beta2**state.step if state.step else 1)
    means = torch.stack([block.mean() for block in squares.split(BLOCK)])  # the last one may be shorter
    roots = (means.sqrt() + state.eps).clamp(min=torch.finfo(torch.float32).tiny)
    return roots.repeat_interleave(BLOCK)[: len(squares)]


def parse_schedule(text: str) -> tuple[str, Options]:
    """Returns the schedule and its options: ``acco:fraction=0.75,sync_windows=10``."""
    name, _, changes = text.partition(":")
    known = {field.name: field.type for field in fields(Options)}
    if not hasattr(Run, name):
        raise SystemExit(f"{name} is not a schedule; allowed: sync, acco, local, wp, dpu")
    given = dict(change.split("=") for change in changes.split(",") if change)
    if unknown := given.keys() - known:
        raise SystemExit(f"{text} changes {', '.join(unknown)}; allowed: {', '.join(known)}")
    return name, Options(**{key: int(value) if key == "sync_windows" else float(value) for key, value in given.items()})


class Text:
    """Holds the sequences of the example's text, and draws batches of them."""

    def __init__(self, seq_len: int):
        from text_data import read_files, split, to_sequences

        self.training, validation = (to_sequences(text, seq_len) for text in split(read_files(None)))
        self.validation = validation[torch.linspace(0, len(validation) - 1, VALIDATION_SEQUENCES).long()].long()

    def batches(self, seed: int, size: int):
        """Yields batches without end, drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.training[torch.randint(len(self.training), (size,), generator=generator)].long()


def lr_of(setting: dict, step: int) -> float:
    """Returns the learning rate: a linear warm-up, then a cosine to a tenth, as the example has it."""
    warmup = setting["warmup_steps"]
    if step < warmup:
        return setting["lr"] * (step + 1) / (warmup + 1)
    part = (step - warmup) / max(1, setting["steps"] - warmup)
    return setting["lr"] * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))


def rounded_to_bf16(weights: Tensor) -> Tensor:
    return weights.bfloat16().float()


def train(setting: dict, schedule: str, ranks: int, seed: int, text: Text) -> dict:
    """One run; returns its final validation loss, at the true weights."""
    begin = time.perf_counter()
    name, options = parse_schedule(schedule)
    if setting["weights"] == "bf16":
        options = replace(options, most_kept=min(0.5, options.most_kept))
    gpt = GPT(setting["preset"], setting["seq_len"])
    theta = gpt.start(seed)
    state = State(theta, torch.zeros_like(theta), torch.zeros_like(theta))
    state = replace(state, beta1=setting["beta1"], beta2=setting["beta2"])
    see = rounded_to_bf16 if setting["weights"] == "bf16" else lambda weights: weights
    run = Run(gpt.gradients, see, state, options, ranks)
    for step, tokens in zip(range(setting["steps"]), text.batches(seed, setting["batch"])):
        run.state = replace(run.state, lr=lr_of(setting, step))
        getattr(run, name)(tokens)
    with torch.no_grad():
        weights = see(run.state.theta)[None]
        loss = statistics.mean(gpt.losses(weights, part[None]).item() for part in text.validation.split(64))
    row = {**setting, "schedule": schedule, "ranks": ranks, "seed": seed, "val_loss": round(loss, 5)}
    if run.errors:
        row["estimate_error"] = [
            round(statistics.median(part), 3) for part in (run.errors[:20], run.errors[20:]) if part
        ]
    return row | {"wall_s": round(time.perf_counter() - begin), "date": date.today().isoformat()}


# ---- summary


def key_of(run: dict) -> tuple:
    return tuple(run[key] for key in (*SETTING, "schedule", "ranks", "seed"))


def in_words(setting: dict) -> str:
    words = f"lr {setting['lr']:g}, beta1 {setting['beta1']:g}, beta2 {setting['beta2']:g}, {setting['weights']}"
    words += f", {setting['batch']} sequences of {setting['seq_len']} a step, {setting['steps']} steps"
    return words + (f", {setting['warmup_steps']} of them warm-up" if setting["warmup_steps"] else ", no warm-up")


def summarize(runs: list[dict]) -> list[dict]:
    """For each setting and schedule the difference to ``sync`` with the same seed, in percent of its loss."""
    rows = []
    for setting in list_without_doubles({key: run[key] for key in SETTING} for run in runs):
        of_setting = [run for run in runs if all(run[key] == value for key, value in setting.items())]
        baseline = {run["seed"]: run["val_loss"] for run in of_setting if run["schedule"] == BASELINE}
        kinds = list_without_doubles({key: run[key] for key in ("schedule", "ranks")} for run in of_setting)
        schedules = [kind["schedule"] for kind in kinds]  # together, in the order in which they came
        for kind in sorted(kinds, key=lambda kind: (schedules.index(kind["schedule"]), kind["ranks"])):
            own = [run for run in of_setting if all(run[key] == value for key, value in kind.items())]
            row = {"setting": in_words(setting), **kind, "seeds": [run["seed"] for run in own]}
            row["val_loss"] = round(statistics.mean(run["val_loss"] for run in own), 4)
            pairs = [100 * (run["val_loss"] / baseline[run["seed"]] - 1) for run in own if run["seed"] in baseline]
            if pairs and kind["schedule"] != BASELINE:
                row["percent"] = [round(pair, 3) for pair in pairs]
                row["mean_percent"] = round(statistics.mean(pairs), 3)
                row["interval_percent"] = interval(pairs)
            if "estimate_error" in own[0]:
                row["estimate_error"] = [
                    round(statistics.mean(part), 3) for part in zip(*(r["estimate_error"] for r in own))
                ]
            rows.append(row)
    return rows


def list_without_doubles(dicts) -> list[dict]:
    return [dict(items) for items in dict.fromkeys(tuple(one.items()) for one in dicts)]


def name_of(row: dict) -> str:
    return row["schedule"] + (f", {row['ranks']} ranks" if row["ranks"] else "")


def draw(results: dict):
    """Returns a figure: every difference to ``sync``, a panel for each setting."""
    rows = [row for row in results["summary"] if "percent" in row]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    counts = [sum(row["setting"] == setting for row in rows) for setting in settings]
    colors = colors_of(sorted({row["schedule"] for row in rows}))
    figure = new_figure(9.0, 1.2 + 0.25 * len(rows) + 0.5 * len(settings))
    panels = figure.subplots(len(settings), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, setting in zip(panels, settings):
        shown = [row for row in rows if row["setting"] == setting]
        for place, row in enumerate(shown):
            color = colors[row["schedule"]]
            axes.plot(row["percent"], [place] * len(row["percent"]), "|", color=color, markersize=9)
            axes.plot([row["mean_percent"]], [place], "o", color=color)
        axes.axvline(0, color="#222222", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(shown)), [name_of(row) for row in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_title(setting, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
    panels[-1].set_xscale("symlog", linthresh=1)
    panels[-1].set_xticks([-1, -0.5, 0, 0.5, 1, 3, 10], ["-1", "-0.5", "0", "0.5", "1", "3", "10"])
    panels[-1].set_xlabel("final validation loss against sync, % (logarithmic beyond 1): each seed (|) and their mean")
    return figure


def main() -> None:
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument(
        "--schedules", nargs="+", default=[BASELINE, "acco", "local", "wp", "dpu"], help="(default: %(default)s)"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 16, 64], help="of local (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="(default: %(default)s)")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3], help="(default: %(default)s)")
    parser.add_argument("--beta1", type=float, default=0.9, help="(default: %(default)s)")
    parser.add_argument("--beta2", type=float, default=0.95, help="(default: %(default)s)")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32", help="that a rank computes at")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step, of all ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--warmup_steps", type=int, help="of the learning rate (default: a tenth of --steps)")
    parser.add_argument("--seq_len", type=int, default=16, help="bytes in a sequence (default: %(default)s)")
    parser.add_argument("--preset", default="small", help="(default: %(default)s)")
    arguments = parser.parse_args()
    command, machine = (origin()[key] for key in ("command", "machine"))
    results: dict = {"machine": machine, "commands": [], "summary": [], "runs": []}
    if arguments.out.is_file():
        results |= json.loads(arguments.out.read_text())
    if not arguments.draw:
        torch.set_num_threads(1)
        make_missing_runs(arguments, results, command)
    save(draw(results), arguments.out.with_suffix(".png"))
    print(table_of_losses(results["summary"], name_of))


def make_missing_runs(arguments, results: dict, command: str) -> None:
    """Adds the runs that are asked for and not there yet; written after each."""
    if arguments.warmup_steps is None:
        arguments.warmup_steps = arguments.steps // 10
    text = Text(arguments.seq_len)
    have = {key_of(run) for run in results["runs"]}
    for lr in arguments.lr:
        setting = {key: getattr(arguments, key) for key in SETTING} | {"lr": lr}
        for seed in arguments.seeds:
            for schedule in arguments.schedules:
                for ranks in arguments.ranks if schedule.startswith("local") else [0]:  # 0: any
                    if key_of({**setting, "schedule": schedule, "ranks": ranks, "seed": seed}) in have:
                        continue
                    if command not in results["commands"]:
                        results["commands"].append(command)
                    run = train(setting, schedule, ranks, seed, text)
                    progress(f"lr {lr:g} seed {seed} {name_of(run)}: {run['val_loss']:.4f}, {run['wall_s']} s")
                    results["runs"].append(run)
                    results["summary"] = summarize(results["runs"])
                    write(results, arguments.out)


if __name__ == "__main__":
    main()
