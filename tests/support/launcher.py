# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Starts a script through DeepSpeed's launcher, as a user does, on CPU ranks of this machine.

The package is imported where it is needed: ranks import this module before they have their environment.
"""

import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from getpass import getuser
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 390  # the first use of DeepSpeed's own AdamW compiles it, and its communication on shared memory


def operators_folder() -> str:
    """Returns where DeepSpeed builds its operators at first use: those of different versions do not get on in one
    folder."""
    built = f"deepspeed_acco_ops_{getuser()}_{version('deepspeed')}_{version('torch')}"
    return str(Path(tempfile.gettempdir()) / built)


def rank_environment() -> dict[str, str]:
    """Returns the environment of a rank: this one's, the checkout, the operators' folder, and one thread, since the
    ranks of a test are as many as the cores."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    defaults = {"TORCH_EXTENSIONS_DIR": operators_folder(), "OMP_NUM_THREADS": "1"}
    return {**defaults, **os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": search}


def with_torch_adam(config: Path, folder: Path) -> Path:
    """Returns a copy of a DeepSpeed JSON that takes torch.optim.AdamW: DeepSpeed's own is compiled for more than a
    minute."""
    made = json.loads(config.read_text())
    made["optimizer"]["params"]["torch_adam"] = True
    path = folder / config.name
    path.write_text(json.dumps(made))
    return path


class Launched:
    """Holds a script that is running; ``process`` is the launcher's.

    Args:
        per_node: starts the module that the launcher starts on each node, which saves its imports.
    """

    def __init__(self, script, *arguments, ranks: int = 2, per_node: bool = False, **pipes):
        from deepspeed_acco.tools.launch import launcher

        self._left = ExitStack()
        self._folder = Path(self._left.enter_context(tempfile.TemporaryDirectory()))
        place = launcher.Ranks(world_size=ranks, slots=ranks, is_cpu=True, per_node=per_node)
        words = ([str(script)], [str(argument) for argument in arguments])
        begun = launcher.started(*words, self._folder, place, rank_environment(), **pipes)
        (self.process,) = self._left.enter_context(begun)

    def kill(self) -> None:
        """Sends SIGKILL to the launcher and every rank at once."""
        from deepspeed_acco.tools.launch import processes

        processes.kill_processes(self._folder)
        self._left.close()

    def wait(self) -> tuple[str | None, str | None]:
        """Returns output and errors, when the script has ended."""
        with self._left:
            return self.process.communicate(timeout=LIMIT_S)


def launch(script, *arguments, ranks: int = 2, per_node: bool = False) -> subprocess.CompletedProcess:
    """Runs a script through the launcher to its end."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    run = Launched(script, *arguments, ranks=ranks, per_node=per_node, **pipes)
    output, errors = run.wait()
    return subprocess.CompletedProcess(run.process.args, run.process.returncode, output, errors)
