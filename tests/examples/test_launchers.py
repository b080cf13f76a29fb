# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Every launcher that starts two ranks on one machine, as a user calls it: what they train is the same, bit for bit."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepspeed_acco.tools.launch.launcher import free_port
from tests.support import training
from tests.support.launcher import rank_environment
from tests.support.ranks import run_script

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.timeout(400)]
SCRIPT = Path(__file__).with_name("train_launched.py")
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]

# What `accelerate config` writes of a machine without GPUs, with the answer that DeepSpeed is to be used.
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: CONFIG
  zero3_init_flag: false
machine_rank: 0
num_machines: 1
num_processes: 2
main_process_port: PORT
rdzv_backend: static
same_network: true
use_cpu: false
"""

# What a batch script under SLURM says: srun starts it once for each rank, with these variables.
BATCH_SCRIPT = (
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=127.0.0.1; exec "$@"'
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses of ranks that no launcher started, and the JSON."""
    folder = tmp_path_factory.mktemp("expected")
    config = folder / "config.json"
    config.write_text(json.dumps(training.ds_config(4, 2.0)))
    done = run_script(SCRIPT, "--config", config, "--out", folder, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return config, [told["losses"] for told in _told(folder)]


def _told(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def _check(folder, expected, nodes=1):
    first, second = _told(folder)
    assert (first["host"] == second["host"]) == (nodes == 1)
    for rank, told in enumerate((first, second)):
        assert (told["optimizer"], told["ranks"]) == ("AccoZeroOptimizer", 2)
        assert told["local_rank"] == (rank if nodes == 1 else 0)
        assert told["losses"] == expected[1][rank]


def _run(command, folder, expected, words=(), environment=(), with_config=True):
    words = [*words, *(["--config", str(expected[0])] if with_config else [])]
    done = subprocess.run(
        [*command, str(SCRIPT), *words, "--out", str(folder)],
        env=rank_environment() | dict(environment),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_deepspeed_include(tmp_path, expected):
    include = ["--include", "localhost:0,1", "--master_port", str(free_port())]
    devices = {"LOCAL_SIZE": "2"}  # from which the launcher takes their number where they are CPUs
    _run([*RUNNER, *include], tmp_path, expected, environment=devices)
    _check(tmp_path, expected)


def test_deepspeed_hostfile(tmp_path, expected):
    (tmp_path / "hosts").write_text("worker-1 slots=4\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--include", "worker-1:0,1", "--no_ssh", "--node_rank", "0"]
    words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    _run([*RUNNER, *words], tmp_path, expected)
    _check(tmp_path, expected)


def test_torchrun(tmp_path, expected):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    _run([*torchrun, "--master-port", str(free_port())], tmp_path, expected)
    _check(tmp_path, expected)


def test_accelerate_launch_with_a_config_file(tmp_path, expected):
    text = ACCELERATE.replace("CONFIG", str(expected[0])).replace("PORT", str(free_port()))
    (tmp_path / "accelerate.yaml").write_text(text)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    _run(launch, tmp_path, expected, with_config=False)
    _check(tmp_path, expected)


@pytest.mark.skipif(
    shutil.which("mpirun") is None or find_spec("mpi4py") is None,
    reason="mpirun or mpi4py, by which DeepSpeed finds the ranks, is not installed",
)
def test_mpirun(tmp_path, expected):
    mpirun = ["mpirun", "-n", "2", "--oversubscribe", "--allow-run-as-root", sys.executable]
    _run(mpirun, tmp_path, expected, words=["--port", str(free_port())])
    _check(tmp_path, expected)


@pytest.mark.parametrize("nodes", [1, 2])
def test_variables_of_slurm(tmp_path, expected, nodes):
    """Two tasks on one node, or one on each of two: nothing else than SLURM tells these apart here."""
    port, tasks = str(free_port()), []
    for rank in range(2):
        node, local_rank = (0, rank) if nodes == 1 else (rank, 0)
        variables = {"SLURM_PROCID": rank, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node, "SLURM_NTASKS": 2}
        environment = rank_environment() | {name: str(value) for name, value in variables.items()}
        words = ["bash", "-c", BATCH_SCRIPT, "batch.sh", sys.executable, str(SCRIPT), "--config", str(expected[0])]
        tasks.append(subprocess.Popen([*words, "--out", str(tmp_path)], env=environment | {"MASTER_PORT": port}))
    assert [task.wait(300) for task in tasks] == [0, 0]
    _check(tmp_path, expected, nodes)
