# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small GPT from random weights on real text, byte by byte, with whatever optimizer the DeepSpeed JSON names.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/train_gpt.py --deepspeed_config ds_configs/acco.json

Without ``DS_ACCELERATOR=cpu`` the same command trains on the machine's GPUs. The text is the source of Python's
standard library unless ``--data`` names another. Nothing here but the first import knows which optimizer trains: with
the same seed every JSON sees the same micro-batches, so their losses can be compared. The learning rate of the JSON is
warmed up and decays over the run, unless the JSON has a "scheduler" of its own.
"""

import argparse
import json
import math
import time
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from text_data import add_text_arguments, check_text_arguments, load_text, make_model, share_cores
from tqdm import tqdm

import deepspeed_acco  # noqa: F401  makes DeepSpeed know "optimizer": {"type": "ACCO"}

VALIDATIONS = 10
PROMPT = b"def "
GENERATED_BYTES = 200


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a GPT on bytes of text with DeepSpeed.")
    add_text_arguments(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        help="optimizer steps, of train_batch_size samples: adaptive windows take more at once (default: %(default)s)",
    )
    parser.add_argument("--warmup_steps", type=int, help="of the learning rate (default: a tenth of --steps)")
    parser.add_argument(
        "--lr_decay",
        choices=("cosine", "none"),
        default="cosine",
        help="of the learning rate after the warm-up, to a tenth at the end of the run (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order (default: %(default)s)")
    parser.add_argument(
        "--slow", nargs=2, type=float, metavar=("RANK", "FACTOR"), help="that rank takes FACTOR times as long"
    )
    parser.add_argument("--out", type=Path, help="folder for metrics.jsonl, one line per validation")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = deepspeed.add_config_arguments(parser).parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is missing; give a DeepSpeed JSON, for example ds_configs/acco.json")
    if not Path(args.deepspeed_config).is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config} is not a file; give the path of a DeepSpeed JSON")
    check_text_arguments(parser, args)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is not allowed; allowed: 1 and more")
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10
    if not 0 <= args.warmup_steps <= args.steps:
        parser.error(f"--warmup_steps {args.warmup_steps} is not allowed; allowed: 0 to --steps, {args.steps}")
    if args.slow is not None and args.slow[1] < 1:
        parser.error(f"--slow with the factor {args.slow[1]:g} is not allowed; allowed: 1 and more")
    return args


# ---- data


@lru_cache(maxsize=1)
def shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def training_batch(sequences: torch.Tensor, seed: int, first_sample: int, size: int) -> torch.Tensor:
    """Samples ``first_sample`` and following of the run: an endless walk through newly shuffled epochs."""
    rows = []
    for sample in range(first_sample, first_sample + size):
        epoch, place = divmod(sample, len(sequences))
        rows.append(shuffled(len(sequences), seed, epoch)[place])
    return sequences[torch.stack(rows)].long()


# ---- evaluation and text: every rank takes part, since some optimizers must gather the weights for it


@torch.no_grad()
def evaluate(engine, sequences: torch.Tensor) -> float:
    """Mean loss per byte of the sequences, each evaluated by one rank. All ranks make the same number of forwards."""
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), engine.train_micro_batch_size_per_gpu()
    total = torch.zeros(2, device=engine.device)  # sum of the losses, number of sequences
    engine.eval()
    for first in range(0, len(sequences), size * ranks):
        mine = sequences[first + rank * size : first + (rank + 1) * size]
        batch = (mine if len(mine) else sequences[:1]).long().to(engine.device)  # nothing left for this rank: counts 0
        loss = engine(input_ids=batch, labels=batch).loss.float()
        total += torch.stack([loss * len(mine), torch.ones_like(loss) * len(mine)])
    engine.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def generate(engine, seed: int, seq_len: int) -> str:
    """A continuation of PROMPT, sampled; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor(list(PROMPT))
    engine.eval()
    for _ in range(GENERATED_BYTES):
        logits = engine(input_ids=text[-seq_len:].unsqueeze(0).to(engine.device)).logits[0, -1]
        likely = torch.softmax(logits.float().cpu() / 0.8, dim=0)
        text = torch.cat([text, torch.multinomial(likely, 1, generator=generator)])
    engine.train()
    return bytes(text.tolist()).decode(errors="replace")


# ---- training


def lr_factor(step: int, steps: int, warmup_steps: int, decay: str) -> float:
    """What multiplies the JSON's learning rate in that step, from 0: linear warm-up, then a cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "none":
        return 1.0
    part = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, part)))  # adaptive windows go a little past the end


def make_scheduler(args):
    """For DeepSpeed, which calls it with the optimizer; None where the JSON names a scheduler."""
    if "scheduler" in json.loads(Path(args.deepspeed_config).read_text()):
        return None
    factor = partial(lr_factor, steps=args.steps, warmup_steps=args.warmup_steps, decay=args.lr_decay)
    return partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor)


@contextmanager
def slowed_down(factor: float):
    """Makes what is inside take ``factor`` times as long: a slower accelerator beside the others."""
    begin = time.perf_counter()
    yield
    if factor > 1:
        get_accelerator().synchronize()
        time.sleep((factor - 1) * (time.perf_counter() - begin))


def finite(value) -> float | None:
    """As JSON can hold it: null for what is not known or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def main():
    args = parse_arguments()
    deepspeed.init_distributed()
    share_cores()
    model = make_model(args.preset, args.seq_len, args.seed)
    engine, *_ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), lr_scheduler=make_scheduler(args)
    )

    rank, ranks = dist.get_rank(), dist.get_world_size()
    micro_batch, n = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    samples_per_step = micro_batch * n * ranks
    training, validation = load_text(args.data, args.seq_len, samples_per_step)

    metrics = None
    if args.out is not None and rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        metrics = open(args.out / "metrics.jsonl", "w", encoding="utf-8")
    total = args.steps * samples_per_step
    bar = tqdm(total=total, unit="sample", disable=rank != 0)
    train_s = 0.0  # without the validations
    losses = torch.zeros(2, device=engine.device)  # sum and number since the last validation

    def validate() -> tuple[float, int]:
        """Validation loss after so many samples; writes and shows one line of metrics."""
        dist.all_reduce(losses)
        micro_batches = torch.tensor(index, device=engine.device)
        dist.all_reduce(micro_batches)  # with adaptive windows the engine knows them one step later
        samples = int(micro_batches) * micro_batch
        val_loss = evaluate(engine, validation)
        line = {
            "step": engine.global_steps,
            "samples": samples,
            "loss": finite(losses[0] / losses[1]),
            "val_loss": finite(val_loss),
            "grad_norm": finite(engine.get_global_grad_norm()) if engine.global_steps else None,
            "lr": engine.get_lr()[0],
            "seconds": round(train_s, 3),
        }
        losses.zero_()
        bar.set_postfix_str(f"val_loss {val_loss:.4f}")
        if metrics is not None:
            print(json.dumps(line), file=metrics, flush=True)
        return val_loss, samples

    index, part = 0, 0  # of this rank's micro-batches; of the run, in VALIDATIONS parts
    val_loss, samples = validate()
    slowness = args.slow[1] if args.slow is not None and args.slow[0] == rank else 1.0
    begin = time.perf_counter()
    while engine.global_samples < total:
        step = engine.global_steps
        while engine.global_steps == step:  # n micro-batches, or as many as the engine makes of them
            # Consecutive samples of the run lie side by side over the ranks: no two ranks see the same one.
            first_sample = (index * ranks + rank) * micro_batch
            batch = training_batch(training, args.seed, first_sample, micro_batch).to(engine.device)
            with slowed_down(slowness):
                loss = engine(input_ids=batch, labels=batch).loss
                engine.backward(loss)
            engine.step()
            index += 1
            losses += torch.stack([loss.detach().float(), losses.new_ones(())])  # no .item(): it waits for the device
        bar.update(engine.global_samples - bar.n)
        if engine.global_samples * VALIDATIONS // total > part:
            part = engine.global_samples * VALIDATIONS // total
            get_accelerator().synchronize()
            train_s += time.perf_counter() - begin
            val_loss, samples = validate()
            begin = time.perf_counter()
    bar.close()

    text = generate(engine, args.seed, args.seq_len)
    hidden = f"{engine.optimizer.lane_times().hidden_share:.0%}" if hasattr(engine.optimizer, "lane_times") else "n/a"
    if rank == 0:
        print(f"--- generated text\n{text}\n---")
        print(
            f"val_loss {val_loss:.4f} | {samples / train_s:.1f} samples/s | communication hidden {hidden}", flush=True
        )
    if metrics is not None:
        metrics.close()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
