# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lists the faults that are put into the kernels to see that the emulation finds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VALUE = "is wrong"  # the comparison's words
OVERFLOW = "heap-buffer-overflow"
MISALIGNED = "misaligned address"
EMULATION = "emulated CUDA"


@dataclass(frozen=True)
class Fault:
    """A change of a kernel's source: ``old``, which must be there once, becomes ``new``.

    Args:
        found_by: what is in the words of the check that must find it.
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str

    def put_into(self, csrc: Path) -> None:
        """Changes the file in that copy of the sources.

        Raises:
            ValueError: the file has the place not once.
        """
        path = csrc / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has the place of the fault {self.name!r} {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


ADAMW, QUANTIZE, LOCAL = "cuda/adamw.cu", "cuda/quantize.cu", "cuda/local_prediction.cu"

FAULTS = (
    Fault(
        "a barrier is missing before what it waits for is read",
        ADAMW,
        "of_warps[threadIdx.x / kWarp] = value;\n  }\n  __syncthreads();",
        "of_warps[threadIdx.x / kWarp] = value;\n  }",
        "the sum is wrong",
    ),
    Fault(
        "a barrier is missing before what was read is overwritten",
        ADAMW,
        "__syncthreads();  // before the next chunk overwrites them",
        "",
        "the sum is wrong",
    ),
    Fault(
        "a barrier that one warp alone reaches",
        ADAMW,
        "__syncthreads();  // before the next chunk overwrites them",
        "if (threadIdx.x < kWarp) { __syncthreads(); }",
        EMULATION,
    ),
    Fault(
        "the tail is one element short",
        ADAMW,
        "one < split.head + split.tail;",
        "one + 1 < split.head + split.tail;",
        VALUE,
    ),
    Fault(
        "the tail is one element long",
        ADAMW,
        "one < split.head + split.tail;",
        "one <= split.head + split.tail;",
        OVERFLOW,
    ),
    Fault("a skipped step counts", ADAMW, "next_step != nullptr && is_taken", "next_step != nullptr", "step is wrong"),
    Fault("a skipped step is taken", ADAMW, "if (prepared.is_taken) {", "if (true) {", VALUE),
    Fault(
        "one operand's address is not asked for",
        ADAMW,
        "width.grad == 4 && width.out == 4;",
        "width.out == 4;",
        MISALIGNED,
    ),
    Fault("a small gradient is not cleared", ADAMW, "source[i] = 0;", "", VALUE),
    Fault("warps stride as threads do", QUANTIZE, "grid_stride(gridDim.x, blockDim.x) / kWarp;", "1 << 20;", VALUE),
    Fault("messages beyond 64 are dropped", QUANTIZE, "done < message_count;", "done < 1;", VALUE),
    Fault(
        "four levels of a record are one access",
        QUANTIZE,
        "halves[0] | static_cast<uint32_t>(halves[1]) << 16;",
        "*reinterpret_cast<const uint32_t*>(packed);",
        MISALIGNED,
    ),
    Fault("a change is added that is not to be", QUANTIZE, "if (!*is_added) {", "if (numel < 0) {", VALUE),
    Fault(
        "a lane is missing in a shuffle",
        QUANTIZE,
        "const int32_t other = __shfl_xor_sync(0xffffffffu, value, distance);",
        "const int32_t other = threadIdx.x % kWarp ? __shfl_xor_sync(0xffffffffu, value, distance) : value;",
        EMULATION,
    ),
    Fault(
        "half a warp leaves before a shuffle that names all",
        LOCAL,
        "half > 0; half /= 2) {",
        "half > lane / 16; half /= 2) {",
        EMULATION,
    ),
    Fault("shared memory is read that nobody wrote", LOCAL, "correction = root_correction(beta2, *step);", "", VALUE),
    Fault(
        "a gradient that is not finite has a part",
        LOCAL,
        "has_gradient = prepared->has_gradient;",
        "has_gradient = true;",
        VALUE,
    ),
    Fault("the weights before are not kept", LOCAL, "arrays.before[i] = kept;", "", VALUE),
)
