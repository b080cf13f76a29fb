# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How scripts end that never call engine.destroy(): ACCO, with a round in flight, beside stock DeepSpeed ZeRO-1.

    python benchmarks/exits.py --runs 30 --out benchmarks/results/exits.json

The two alternate. A run is two ranks; every exit code that is not 0 is printed with what the rank wrote.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, make_parser, origin, progress, tell

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import deepspeed, deepspeed_acco
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(1)
module = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Tanh(), torch.nn.Linear(512, 64))
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {{"stage": 1}},
    "optimizer": {optimizer},
}}
engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
for step in range(3):
    for micro_batch in range(2):
        engine.backward(engine(torch.randn(8, 64)).square().mean())
        engine.step()
"""
OPTIMIZERS = {
    "acco": '{"type": "ACCO", "params": {"lr": 1e-3}}',
    "stock": '{"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}',
}


def run(name: str) -> list[tuple[int, str]]:
    """Returns exit code and output of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), optimizer=OPTIMIZERS[name]))
        ranks = []
        for rank in (0, 1):
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(script), os.path.join(folder, "rendezvous")]
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [process.communicate(timeout=200)[0] for process in ranks]
        return [(process.returncode, output) for process, output in zip(ranks, outputs)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=30, help="of each")
    arguments = parser.parse_args()
    failed: dict[str, list[int]] = {name: [] for name in OPTIMIZERS}
    for number in range(arguments.runs):
        for name in OPTIMIZERS:
            for code, output in run(name):
                if code:
                    failed[name].append(code)
                    progress(f"{name} run {number}: exit code {code}\n{output[-3000:]}")
        progress(f"{number + 1}/{arguments.runs} {failed}")
    tell({**origin(), "runs_of_each": arguments.runs, "ranks_with_an_exit_code": failed}, arguments.out)


if __name__ == "__main__":
    main()
