# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The model and text of train_gpt.py in a loop of Hugging Face Accelerate, with whatever optimizer the JSON names.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/accelerate_loop.py --deepspeed ds_configs/acco_auto.json

Without ``DS_ACCELERATOR=cpu`` the same command trains on the machine's GPUs. A JSON without "optimizer" and "scheduler"
leaves both to the script, which then builds ``deepspeed_acco.ACCO`` and a scheduler of torch.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, set_seed
from deepspeed.accelerator import get_accelerator
from text_data import Sequences, add_text_arguments, check_text_arguments, load_text, make_model, share_cores

import deepspeed_acco  # also makes DeepSpeed know "optimizer": {"type": "ACCO"}

ADAM, WEIGHT_DECAY = {"betas": [0.9, 0.95], "eps": 1e-8}, 0.1


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a GPT on bytes of text with Accelerate.")
    add_text_arguments(parser)
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed JSON, as ds_configs/acco_auto.json")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches in a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=6, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="runs/accelerate", help="folder of results (default: %(default)s)")
    parser.add_argument("--save_step", type=int, help="save the training state in --out after so many steps")
    parser.add_argument("--resume", type=Path, help="folder of a saved training state to go on from")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = parser.parse_args()
    check_text_arguments(parser, args)
    return args


def make_accelerator(args) -> Accelerator:
    if get_accelerator().device_name() == "cpu":
        # Accelerate on a host without GPUs: on its own it takes each rank for the only one, and Accelerator(cpu=True)
        # turns DeepSpeed off. Made before the Accelerator, this tells it of the ranks. On GPUs it is not needed.
        PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config=str(args.deepspeed))
    # prepare() fills no other "auto" of the optimizer than lr and weight_decay, and refuses what is left.
    values = {"lr": args.lr, "weight_decay": WEIGHT_DECAY, **ADAM}
    plugin.deepspeed_config_process(
        prefix="optimizer.params.",
        config=plugin.deepspeed_config.get("optimizer", {}).get("params", {}),
        must_match=False,
        **{f"optimizer.params.{key}": value for key, value in values.items()},
    )
    return Accelerator(
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),  # exact resume
    )


def make_optimizer(args, accelerator, model):
    """Optimizer and scheduler: placeholders for what the JSON names, or real ones where it names none."""
    ranks = accelerator.num_processes  # Accelerate counts a scheduler's steps once for each rank
    if "optimizer" in accelerator.state.deepspeed_plugin.deepspeed_config:
        optimizer = DummyOptim(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY)
        return optimizer, DummyScheduler(optimizer, total_num_steps=args.steps * ranks, warmup_num_steps=args.warmup)

    def warmup_then_decay(count: int) -> float:
        """As the JSON's WarmupDecayLR, whose first two steps are both at zero."""
        step = max(count // ranks - 1, 0)
        return step / args.warmup if step < args.warmup else (args.steps - step) / (args.steps - args.warmup)

    optimizer = deepspeed_acco.ACCO(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, **ADAM)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_decay)


@torch.no_grad()
def evaluate(accelerator, model, loader) -> float:
    """Mean loss of the validation sequences, without those that fill up the last batch."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss.float()
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    model.train()
    return torch.cat(losses).mean().item()


def main():
    args = parse_arguments()
    accelerator = make_accelerator(args)
    share_cores()
    training, validation = load_text(args.data, args.seq_len, args.batch * args.accumulate * accelerator.num_processes)
    model = make_model(args.preset, args.seq_len, args.seed)
    optimizer, scheduler = make_optimizer(args, accelerator, model)
    loader = torch.utils.data.DataLoader(Sequences(training), args.batch, shuffle=True)
    validation_loader = torch.utils.data.DataLoader(Sequences(validation), args.batch)
    model, optimizer, scheduler, loader, validation_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, validation_loader
    )
    set_seed(args.seed)
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
    step = model.global_steps
    lines = []

    steps_per_epoch = -(-len(loader) // accelerator.gradient_accumulation_steps)
    while step < args.steps:
        epoch, steps_done = divmod(step, steps_per_epoch)
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, steps_done * accelerator.gradient_accumulation_steps)
        losses = []
        for batch in rest:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            step += 1
            loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses.clear()
            lr = scheduler.get_last_lr()[0]  # of the step to come
            norm = model.get_global_grad_norm()  # None until it is known
            norm = None if norm is None else float(norm)
            lines.append({"step": step, "loss": loss, "grad_norm": norm, "lr": lr})
            accelerator.print(lines[-1])
            if step == args.save_step:
                accelerator.save_state(str(args.out / f"step_{step}"))
            if step == args.steps:
                break

    val_loss = evaluate(accelerator, model, validation_loader)
    accelerator.print(f"val_loss {val_loss:.4f}", flush=True)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out, state_dict=weights)
        lines.append({"step": step, "val_loss": val_loss})
        (args.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    accelerator.end_training()


if __name__ == "__main__":
    main()
