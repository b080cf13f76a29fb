# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of ``ds_acco doctor`` under any launcher.

deepspeed --module deepspeed_acco.doctor --config ds_config.json
torchrun --nproc-per-node 8 -m deepspeed_acco.doctor --config ds_config.json
"""

from __future__ import annotations

import os
import sys

from .tools.doctor.command import add_check_arguments
from .tools.subcommand import Parser


def main(arguments: list[str] | None = None) -> int:
    """Checks on this rank, and returns the exit status: 0, or 1 where something failed.

    Args:
        arguments: default: those of the process.

    Raises:
        SystemExit: with code 2, for arguments that cannot be used, and without a launcher.
    """
    parser = Parser(prog="deepspeed_acco.doctor", description="Check training with ACCO on these ranks.")
    add_check_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    options = parser.parse_args(arguments)
    if not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        parser.error(
            "there are no ranks. Start it by a launcher: deepspeed --module deepspeed_acco.doctor, torchrun -m "
            "deepspeed_acco.doctor, or ds_acco doctor"
        )
    from .tools.doctor import session

    return session.run(options)


if __name__ == "__main__":
    sys.exit(main())
