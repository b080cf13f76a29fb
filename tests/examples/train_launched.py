"""Trains the tests' network as a user's script does, for test_launchers.py, and tells where each rank found itself.

Under ``accelerate launch`` the JSON comes from the launcher's file, and Accelerate makes the engine.
"""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch

import deepspeed_acco  # noqa: F401
from deepspeed_acco.engine.hosts import host_of_this_rank
from tests.support import training


def make_engine(config, port):
    module = training.make_network()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config is not None:
        deepspeed.init_distributed(distributed_port=port)
        return deepspeed.initialize(model=module, model_parameters=parameters, config=config)[0]
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DummyOptim

    PartialState(cpu=True)
    loader = torch.utils.data.DataLoader([0.0] * 8, batch_size=4)
    return Accelerator().prepare(module, DummyOptim(parameters), loader)[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", help="without it Accelerate has one")
    parser.add_argument("--port", type=int, default=29500, help="where no launcher gives one, as with mpirun")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    engine = make_engine(args.config, args.port)
    history = training.run_windows(engine, 4)
    rank = torch.distributed.get_rank()
    told = {
        "optimizer": type(engine.optimizer).__name__,
        "ranks": torch.distributed.get_world_size(),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "host": host_of_this_rank(),
        "losses": history["losses"],
    }
    engine.destroy()
    (args.out / f"rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
