# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says how a round's gradients travel between hosts: as values in their dtype, or as records of few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..optim import ops
from ..optim.quantization import BLOCK, RECORDS_OF_A_PIECE, message_bytes, message_stride, record_bytes


@dataclass(frozen=True)
class Encoding:
    """Makes messages of gradients, and adds up those that arrive.

    Attributes:
        dtype: of the values that are sent inside a host, and between hosts with ``bits`` = 0.
        bits: of a value between hosts, 8 or 4, in records (optim/quantization.py); 0: values in ``dtype``.
    """

    dtype: torch.dtype
    bits: int = 0

    @property
    def unit_numel(self) -> int:
        """Returns the elements of which every piece but the last has a multiple."""
        return BLOCK * RECORDS_OF_A_PIECE if self.bits else 1

    def message_bytes(self, numel: int) -> int:
        """Returns the bytes of the message of so many elements."""
        return message_bytes(numel, self.bits) if self.bits else numel * self.dtype.itemsize

    def message_stride(self, numel: int) -> int:
        """Returns the bytes from one shard's message to the next, where those of several lie in one buffer."""
        return message_stride(numel, self.bits) if self.bits else numel * self.dtype.itemsize

    def message_in(self, buffer: Tensor, numel: int) -> Tensor:
        """Returns the first bytes of ``buffer`` (uint8) as a message of so many elements."""
        message = buffer[: self.message_bytes(numel)]
        return message if self.bits else message.view(self.dtype)

    def piece_of(self, message: Tensor, start: int, numel: int) -> Tensor:
        """Returns the message of ``numel`` elements from ``start`` on, a multiple of the unit, as a view."""
        if not self.bits:
            return message.narrow(0, start, numel)
        return message.narrow(0, start // BLOCK * record_bytes(self.bits), message_bytes(numel, self.bits))

    def encode(self, values: Tensor, message: Tensor) -> None:
        """Writes ``values`` (1-D, floating) to ``message``."""
        if self.bits:
            ops.quantize(values, message, self.bits, 1.0)
        else:
            message.copy_(values)

    def add_up(self, messages: list[Tensor], total: Tensor) -> None:
        """Writes to ``total`` (fp32) the sum of the messages, in fp32 and in their order."""
        if self.bits:
            ops.dequantize_sum(messages, total, self.bits)
        else:
            total.copy_(messages[0])
            for message in messages[1:]:
                total.add_(message)
