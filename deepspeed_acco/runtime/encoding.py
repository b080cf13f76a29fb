# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says how a round's gradients travel: as values in their dtype, or as records of few bits."""

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
        dtype: of the values that are sent with no bits.
        bits: of a value between hosts, 8 or 4, in records (optim/quantization.py); 0: values in ``dtype``.
        inner_bits: likewise of a value inside a host, where there are two levels. Not 0 only with ``bits``, and then
            the buffers that values leave from are no larger than such records.
    """

    dtype: torch.dtype
    bits: int = 0
    inner_bits: int = 0

    @property
    def inner(self) -> Encoding:
        """Returns how values travel inside a host."""
        return Encoding(self.dtype, self.inner_bits)

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
        return self.piece_of(buffer, 0, numel)

    def piece_of(self, buffer: Tensor, start: int, numel: int) -> Tensor:
        """Returns the message of ``numel`` elements from ``start`` on, a multiple of the unit, as a view of a message's
        bytes (uint8, 1-D)."""
        if not self.bits:
            at = slice(start * self.dtype.itemsize, (start + numel) * self.dtype.itemsize)
            return buffer[at].view(self.dtype)
        return buffer.narrow(0, start // BLOCK * record_bytes(self.bits), message_bytes(numel, self.bits))

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
