# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The smallest script that trains with ACCO: two ranks fit a small network to a function.

DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/minimal.py
"""

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import deepspeed_acco  # noqa: F401  makes DeepSpeed know "optimizer": {"type": "ACCO"}

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 4,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "ACCO", "params": {"lr": 0.01, "weight_decay": 0.0}},
    "steps_per_print": 1000000,
}
STEPS = 50


def main():
    torch.manual_seed(1)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    torch.manual_seed(dist.get_rank())  # other data on every rank

    for step in range(1, STEPS + 1):
        losses = []
        for _ in range(engine.gradient_accumulation_steps()):
            x = 4 * torch.rand(engine.train_micro_batch_size_per_gpu(), 1, device=engine.device) - 2
            loss = nn.functional.mse_loss(engine(x), torch.sin(2 * x))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step} loss {torch.stack(losses).mean().item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
