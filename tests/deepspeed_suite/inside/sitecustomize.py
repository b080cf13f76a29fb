# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Python imports this at the start of every process that has this folder on its path: pytest itself, the server that
DeepSpeed's tests fork their ranks from, and ranks that are spawned. Others are left alone."""

import sys

if any(part in word for word in sys.orig_argv for part in ("pytest", "forkserver", "spawn_main")):
    import acco_instead

    acco_instead.install()
