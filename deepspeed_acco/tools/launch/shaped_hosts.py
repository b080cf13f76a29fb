# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes several hosts with a slow network of one machine: network namespaces on a bridge, each link shaped by tc.

Needs Linux, root and iproute2. Names hold this process's number, so that two comparisons get on with each other; what
a killed one left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SUBNET = "10.77.0."
INTERFACE = "eth0"
MOST_HOSTS = 99
_NAMESPACE = re.compile(r"^accohost(\d+)-(\d+)\b")
_RATE = re.compile(r"^\d+(\.\d+)?([kmgt]i?)?(bit|bps)", re.IGNORECASE)


def check_rate(rate: str) -> str:
    """Returns ``rate``, as tc spells it.

    Raises:
        ValueError: for anything that tc would not read.
    """
    if not _RATE.fullmatch(rate):
        raise ValueError(f"{rate!r} is not allowed; allowed: a rate as tc spells it, for example 300mbit or 1gbit")
    return rate


def why_not() -> str | None:
    """Says what is missing here for shaped hosts, and what to do; None where nothing is."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, and this is {sys.platform}. Run it on Linux, or without --hosts"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found. Install iproute2 (for example: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root, and this is not. Run it with sudo -E, or without --hosts"
    return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise RuntimeError(f"the shaped hosts could not be made: {' '.join(command)}: {said}")


def _try(*command: str) -> None:
    subprocess.run(command, capture_output=True)


class ShapedHosts:
    """Holds as a context ``count`` namespaces, each with ``eth0`` at ``10.77.0.{1 + host}`` shaped to ``rate``.

    Args:
        count: 1 to 99.
        rate: of each host's outgoing link, as tc spells it.

    Raises:
        RuntimeError: on entry, with what is missing or what ``ip`` or ``tc`` said; nothing is left behind.
    """

    def __init__(self, count: int, rate: str):
        self.count = count
        self.rate = rate

    def address(self, host: int) -> str:
        """Returns the IP address of that host."""
        return f"{SUBNET}{host + 1}"

    def enter(self, host: int) -> list[str]:
        """Returns the words to put before a command that is to run on that host."""
        return ["ip", "netns", "exec", _namespace(os.getpid(), host)]

    def __enter__(self) -> ShapedHosts:
        reason = why_not()
        if reason:
            raise RuntimeError(reason)
        remove_stale()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        _remove(os.getpid(), range(self.count))

    def _make(self) -> None:
        bridge = _bridge(os.getpid())
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for host in range(self.count):
            name, link = _namespace(os.getpid(), host), _link(os.getpid(), host)
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _run("ip", "link", "set", link, "master", bridge)
            _run("ip", "link", "set", link, "up")
            inside = self.enter(host)
            _run(*inside, "ip", "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _run(*inside, "ip", "link", "set", INTERFACE, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            # BBR, the default of some machines, sends next to nothing for 0.2 s every 10 s; reno is allowed everywhere.
            _run(*inside, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
            shape = f"root tbf rate {self.rate} burst 256kb latency 100ms".split()
            _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, *shape)


# Names of interfaces have at most 15 characters; a process number has at most 7 digits.


def _bridge(process: int) -> str:
    return f"accobr{process}"


def _link(process: int, host: int) -> str:
    return f"accov{process}-{host}"


def _namespace(process: int, host: int) -> str:
    return f"accohost{process}-{host}"


def _remove(process: int, hosts) -> None:
    for host in hosts:
        _try("ip", "netns", "del", _namespace(process, host))
        _try("ip", "link", "del", _link(process, host))
    _try("ip", "link", "del", _bridge(process))


def remove_stale() -> None:
    """Removes the namespaces, links and bridges of processes that are gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    left: dict[int, list[int]] = {}
    for match in filter(None, map(_NAMESPACE.match, listed.splitlines())):
        left.setdefault(int(match[1]), []).append(int(match[2]))
    with contextlib.suppress(OSError):
        for bridge in Path("/sys/class/net").glob("accobr[0-9]*"):
            left.setdefault(int(bridge.name.removeprefix("accobr")), [])
    for process, hosts in left.items():
        if not Path(f"/proc/{process}").exists():
            _remove(process, hosts)
