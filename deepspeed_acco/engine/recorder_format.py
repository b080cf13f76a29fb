# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What a recorder and those who start it agree on. It stands apart because a launcher needs no PyTorch."""

RECORD_FOLDER = "DEEPSPEED_ACCO_RECORD"  # the environment variable that names the folder of a run's records
