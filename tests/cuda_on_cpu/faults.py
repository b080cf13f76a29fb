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
        "a barrier is missing before the first addition",
        ADAMW,
        "values[threadIdx.x] = value;\n  __syncthreads();",
        "values[threadIdx.x] = value;",
        "the sum is wrong",
    ),
    Fault(
        "a barrier is missing between additions",
        ADAMW,
        "values[threadIdx.x + half];\n    }\n    __syncthreads();",
        "values[threadIdx.x + half];\n    }",
        "the sum is wrong",
    ),
    Fault(
        "a barrier that only some threads reach",
        ADAMW,
        "values[threadIdx.x + half];\n    }\n    __syncthreads();",
        "values[threadIdx.x + half];\n    __syncthreads();\n    }",
        EMULATION,
    ),
    Fault(
        "the tail is one element short",
        ADAMW,
        "for (int64_t i = 4 * fours + first; i < numel; i += stride) {",
        "for (int64_t i = 4 * fours + first; i + 1 < numel; i += stride) {",
        VALUE,
    ),
    Fault(
        "the tail is one element long",
        ADAMW,
        "for (int64_t i = 4 * fours + first; i < numel; i += stride) {",
        "for (int64_t i = 4 * fours + first; i <= numel; i += stride) {",
        OVERFLOW,
    ),
    Fault("a skipped step counts", ADAMW, "if (*is_finite) {\n    *step += 1.0f;", "{\n    *step += 1.0f;", VALUE),
    Fault("a skipped step is taken", ADAMW, "shared.is_taken = *is_finite;", "shared.is_taken = true;", VALUE),
    Fault(
        "an operand's address is not asked for",
        ADAMW,
        "is_aligned_for_four(source, 0) && is_aligned_for_four(target, 0)",
        "is_aligned_for_four(source, 0)",
        MISALIGNED,
    ),
    Fault("the gradient is not cleared", ADAMW, "source[i] = 0;", "", VALUE),
    Fault("warps stride as threads", QUANTIZE, "grid_stride(gridDim.x, blockDim.x) / kWarp;", "1 << 20;", VALUE),
    Fault("messages beyond 64 are dropped", QUANTIZE, "done < message_count;", "done < 1;", VALUE),
    Fault(
        "a change that is not to be added is",
        QUANTIZE,
        "if (!*is_added) {",
        "if (false && !*is_added) {",
        VALUE,
    ),
    Fault(
        "a lane is missing in a shuffle",
        QUANTIZE,
        "const int32_t other = __shfl_xor_sync(0xffffffffu, value, distance);",
        "const int32_t other = threadIdx.x % kWarp ? __shfl_xor_sync(0xffffffffu, value, distance) : value;",
        EMULATION,
    ),
    Fault(
        "half a warp takes part in a shuffle that names all",
        LOCAL,
        "for (uint32_t half = kLanes / 2; half > 0; half /= 2) {",
        "for (uint32_t half = kLanes / 2; half > lane / 16; half /= 2) {",
        EMULATION,
    ),
    Fault("the weights before are not kept", LOCAL, "before[i] = kept;", "", VALUE),
)
