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
DEVICE, SHARDS = "cuda/device.h", "cuda/shards.cu"

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
        "i < split.head + split.tail;",
        "i + 1 < split.head + split.tail;",
        VALUE,
    ),
    Fault(
        "the tail is one element long",
        ADAMW,
        "i < split.head + split.tail;",
        "i <= split.head + split.tail;",
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
    Fault("gradients are not cleared", SHARDS, "if (clears) {", "if (false) {", VALUE),
    Fault("the last tile of a shard is a whole one", SHARDS, "rest < kTile ? rest : kTile", "kTile", OVERFLOW),
    Fault(
        "shards stay in their order",
        SHARDS,
        "place_of(shards, shard) * shards.numel",
        "shard * shards.numel",
        VALUE,
    ),
    Fault(
        "what is swapped is written twice",
        SHARDS,
        "one_width, others[turn]);",
        "one_width, ones[turn]);",
        VALUE,
    ),
    Fault(
        "only the first shard's address is asked for",
        DEVICE,
        "shards.count > 1 ? width_of_rows(address, shards.numel) : width_at(address);",
        "width_at(address);",
        MISALIGNED,
    ),
    Fault("a shard's first pieces are left out", DEVICE, "piece -= per_shard;", "piece = 0;", VALUE),
    Fault(
        "messages lie one behind the other",
        QUANTIZE,
        "place_of(shards, shard) * stride",
        "place_of(shards, shard) * record_bytes(kBits) * records",
        OVERFLOW,
    ),
    Fault(
        "warps stride as threads do",
        QUANTIZE,
        "stride = grid_stride(gridDim.x, blockDim.x) / kWarp;",
        "stride = 1 << 20;",
        VALUE,
    ),
    Fault("messages beyond 64 are dropped", QUANTIZE, "done < message_count;", "done < 1;", VALUE),
    Fault(
        "four levels of a record are one access",
        QUANTIZE,
        "halves[0] | static_cast<uint32_t>(halves[1]) << 16;",
        "*reinterpret_cast<const uint32_t*>(packed);",
        MISALIGNED,
    ),
    Fault(
        "a change is counted from the master though weights are given",
        QUANTIZE,
        "const auto from = base.template four<kIsWide>(p, at, first, count);",
        "const auto from = p;",
        VALUE,
    ),
    Fault(
        "the given weights' address is not asked for",
        QUANTIZE,
        "width.grad == 4 && base.is_aligned();",
        "width.grad == 4;",
        MISALIGNED,
    ),
    Fault(
        "a commit's change is that before the step",
        QUANTIZE,
        "now.master - from.at[k] : 0.0f;",
        "(kWritesState ? p.at[k] : now.master) - from.at[k] : 0.0f;",
        VALUE,
    ),
    Fault(
        "a commit's change leaves the state as it is",
        QUANTIZE,
        "v.at[k] = now.exp_avg_sq;\n      }\n    }\n    if (kWritesState) {",
        "v.at[k] = now.exp_avg_sq;\n      }\n    }\n    if (false) {",
        VALUE,
    ),
    Fault(
        "the state of a shard's tail is not written",
        QUANTIZE,
        "store_up_to_four(master + at, first, count, width_of<kIsWide>(width.master), p);",
        "if (first + 4 <= count) { store_four(master + at + first, width_of<kIsWide>(width.master), p); }",
        VALUE,
    ),
    Fault(
        "the state is written as if the last record were a whole one",
        QUANTIZE,
        "store_up_to_four(exp_avg + at, first, count, width",
        "store_up_to_four(exp_avg + at, first, 256, width",
        OVERFLOW,
    ),
    Fault("a skipped commit has no change", QUANTIZE, "} else if (kWritesState) {", "} else if (false) {", VALUE),
    Fault("a skipped estimate has a change", QUANTIZE, "} else if (kWritesState) {", "} else {", VALUE),
    Fault("a change is added that is not to be", QUANTIZE, "if (!*is_added) {", "if (stride < 0) {", VALUE),
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
