"""Trains as a script that saves every few steps and goes on from the newest checkpoint when it is started again.

Usage: resuming.py FOLDER CONFIG_JSON STEPS. Rank 0 appends one line of JSON per step to FOLDER/steps.jsonl, and writes
the last weights to FOLDER/weights.pt.
"""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import deepspeed_acco
from tests.support import training

SAVE_EVERY = 3


def main():
    """Trains to the last step, from the newest checkpoint on where there is one."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder, config, steps = Path(arguments[0]), json.loads(arguments[1]), int(arguments[2])
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    engine = training.start_engine(config, groups=2)
    engine.load_checkpoint(folder)  # the first time there is none
    with open(folder / "steps.jsonl", "a", encoding="utf-8") as log:
        for step in range(engine.global_steps, steps):
            history = training.run_windows(engine, 1, first_window=step)
            losses = torch.tensor(history["losses"], dtype=torch.float64)
            dist.all_reduce(losses)
            if dist.get_rank() == 0:
                line = {"step": step, "losses": losses.tolist(), "norm": history["norms"][0], "pid": os.getpid()}
                print(json.dumps(line), file=log, flush=True)
            if (step + 1) % SAVE_EVERY == 0:
                engine.save_checkpoint(folder)
            time.sleep(0.03)  # a step takes no time here, and the test wants to kill in between
    with deepspeed_acco.true_weights(engine):
        if dist.get_rank() == 0:
            torch.save(training.live_weights(engine), folder / "weights.pt")
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
