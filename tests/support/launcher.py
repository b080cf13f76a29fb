# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Starts a script through DeepSpeed's launcher, as a user does, on CPU ranks of this machine.

The package is imported where it is needed: ranks import this module before they have their environment.
"""

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
    """DeepSpeed builds its operators at first use, and those of different versions do not get on in one folder."""
    built = f"deepspeed_acco_ops_{getuser()}_{version('deepspeed')}_{version('torch')}"
    return str(Path(tempfile.gettempdir()) / built)


def remove_shared_memory(master_port: int | str) -> None:
    """Removes what the ranks of a job left in shared memory."""
    from deepspeed_acco.tools.launch import launcher

    launcher.remove_shared_memory(master_port)


class Launched:
    """A script that is running; ``process`` is the launcher's."""

    def __init__(self, script, *arguments, ranks: int = 2, **pipes):
        from deepspeed_acco.tools.launch import launcher

        self._left = ExitStack()
        self._folder = Path(self._left.enter_context(tempfile.TemporaryDirectory()))
        operators = {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", operators_folder())}
        place = launcher.Place(world_size=ranks, slots=ranks, is_cpu=True)
        words = ([str(script)], [str(argument) for argument in arguments])
        (self.process,) = self._left.enter_context(launcher.started(*words, self._folder, place, operators, **pipes))

    def kill(self) -> None:
        """SIGKILL for the launcher and every rank at once."""
        from deepspeed_acco.tools.launch import launcher

        launcher.kill_processes(self._folder)
        self._left.close()

    def wait(self) -> tuple[str | None, str | None]:
        """Output and errors, when the script has ended."""
        with self._left:
            return self.process.communicate(timeout=LIMIT_S)


def launch(script, *arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """Runs a script through the launcher to its end."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    run = Launched(script, *arguments, ranks=ranks, **pipes)
    output, errors = run.wait()
    return subprocess.CompletedProcess(run.process.args, run.process.returncode, output, errors)
