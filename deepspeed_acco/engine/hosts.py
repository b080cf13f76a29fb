# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the communicator of the rounds, and finds out which ranks share a host: from what the launcher told each."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import torch
from deepspeed.constants import default_pg_timeout

from ..runtime.communicator import Communicator
from ..runtime.levels import Levels, levels_of
from ..settings import Settings
from .agreement import require_agreement
from .json_checks import problems_of_hosts, raise_first
from .log import logger
from .tensor_parallel import model_group_of

# The number of the host: of DeepSpeed's launcher (launcher/launch.py), of torchrun, of srun.
_HOST_NUMBERS = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")


def host_of_this_rank(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Returns what tells this rank's host from others: the launcher's number, empty without one, and the name. Neither
    is enough: hosts in network namespaces have one name, and two launchers may both count from 0."""
    number = next((environment[name] for name in _HOST_NUMBERS if name in environment), "")
    return number, socket.gethostname()


def connect(optimizer, settings: Settings, device: torch.device) -> Communicator:
    """Makes the communicator of the rounds, over the levels that the ranks agree on; every rank must call it.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, ours.
    """
    timeout_s = settings.comm_timeout_s or default_pg_timeout.total_seconds()
    of_model = model_group_of(optimizer)
    comm = Communicator(optimizer.dp_process_group, device, timeout_s, settings.sm_share, of_model)
    comm.use_levels(agree_on_levels(comm, settings.ranks_per_host))
    return comm


def agree_on_levels(comm: Communicator, ranks_per_host: int | str) -> Levels:
    """Returns the levels of the rounds; every rank must call it.

    Args:
        ranks_per_host: the key of the configuration.

    Raises:
        ValueError: for a number that does not divide the ranks.
        RuntimeError: where the ranks were given different ones.
    """
    require_agreement(comm, {"optimizer.params.ranks_per_host": ranks_per_host})
    hosts = comm.gather_objects(host_of_this_rank())
    levels, reason = levels_of(hosts)
    if isinstance(ranks_per_host, int):
        raise_first(problems_of_hosts(ranks_per_host, comm.world_size))
        given = Levels.consecutive(comm.world_size, ranks_per_host)
        apart = [ranks for ranks in given.hosts if len({hosts[rank] for rank in ranks}) > 1]
        if apart and comm.rank == 0:
            logger().warning(
                f"ACCO: optimizer.params.ranks_per_host = {ranks_per_host} takes data-parallel ranks {apart[0]} for "
                "one host, and the launcher started them on several: rounds then send more between hosts. Set it to "
                '"auto"'
            )
        return given
    if comm.rank == 0:
        if reason is not None:
            logger().warning(
                "ACCO: rounds do not look at hosts, and send more between them than needed: %s. Start as many ranks on "
                "each",
                reason,
            )
        elif not levels.is_flat:
            logger().info("ACCO: rounds reduce inside a host before they go to other hosts: %s", levels)
    return levels
