# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Launches every CUDA kernel at sizes and alignments that hurt, and checks what it gives: for compute-sanitizer, which
wants one short process. ``python -m tests.gpu.launches`` prints how many operators it called."""

import collections
import os
import sys

if "--apart" in sys.argv:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor has its own allocation, with ends that are seen
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from deepspeed_acco.optim import ops  # noqa: E402
from deepspeed_acco.optim.native import kernels_reason  # noqa: E402
from tests.support import kernel_checks, local_prediction_checks, quantization_checks, shards_checks  # noqa: E402

SIZES = (1, 255, 4099)


class Count(TorchDispatchMode):
    """Counts the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepspeed_acco":
            self.calls[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    """Runs them all."""
    reason = kernels_reason("cuda")
    assert not reason, reason
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    with Count() as count:
        for grad, out in ((fp32, fp32), (bf16, bf16), (fp32, fp16), (fp16, bf16)):
            for numel in SIZES:
                for shift in (0, 1):
                    kernel_checks.check_commit(ops, numel, grad, out, device="cuda", shift=shift)
                    kernel_checks.check_estimate(ops, numel, grad, out, device="cuda", shift=shift)
                    kernel_checks.check_pack(ops, numel, grad, out, device="cuda", shift=shift)
                    kernel_checks.check_sum_of_squares(ops, numel, grad, device="cuda", shift=shift)
                for bits in (4, 8):
                    quantization_checks.check_quantize(ops, numel, grad, bits, device="cuda")
                    quantization_checks.check_add_change(ops, numel, out, bits, device="cuda")
                    quantization_checks.check_dequantize_sum(ops, numel, bits, messages=3, device="cuda")
                    quantization_checks.check_estimate_change(ops, numel, grad, out, bits, device="cuda")
                    quantization_checks.check_commit_change(ops, numel, grad, out, bits, device="cuda")
                local_prediction_checks.check_prediction(ops, numel, 3, out, grad, device="cuda")
                places = shards_checks.PLACES[1]
                shards_checks.check_pack(ops, places, numel, grad, out, device="cuda", shift=1)
                shards_checks.check_moves(ops, places, numel, out, device="cuda", shift=1)
                shards_checks.check_messages(ops, places, numel, out, 4, device="cuda", shift=1)
        quantization_checks.check_dequantize_sum(ops, 513, 4, messages=131, device="cuda")
        for numel in SIZES:
            local_prediction_checks.check_roots(ops, numel, 3.0, device="cuda")
    torch.cuda.synchronize()
    print(f"launches: {sum(count.calls.values())} calls of {len(count.calls)} operators: {dict(count.calls)}")


if __name__ == "__main__":
    main()
