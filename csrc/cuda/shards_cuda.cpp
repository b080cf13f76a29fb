// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops that move shards: arguments checked, then one launch on the current stream of the tensors' device. Nothing
// waits for it.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "common/checks.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace acco::cuda {
namespace {

void pack(at::Tensor grads, at::Tensor packed, double scale, bool clears, const std::optional<at::Tensor>& places,
          int64_t max_blocks) {
  check_flat(grads, grads, "grads");
  check_flat(packed, grads, "packed");
  const c10::cuda::CUDAGuard guard(grads.device());
  C10_CUDA_CHECK(launch_pack(write(grads), write(packed), shards_of(places, grads), static_cast<float>(scale), clears,
                             max_blocks, c10::cuda::getCurrentCUDAStream()));
}

void copy_shards(const at::Tensor& source, at::Tensor target, const at::Tensor& places, int64_t max_blocks) {
  check_flat(source, source, "source");
  check_flat(target, source, "target");
  check_same_dtype(source, target);
  const c10::cuda::CUDAGuard guard(source.device());
  C10_CUDA_CHECK(launch_copy_shards(source.const_data_ptr(), target.mutable_data_ptr(), source.element_size(),
                                    shards_of(places, source), max_blocks, c10::cuda::getCurrentCUDAStream()));
}

void swap_shards(at::Tensor one, at::Tensor other, const std::optional<at::Tensor>& places, int64_t max_blocks) {
  check_flat(one, one, "one");
  check_flat(other, one, "other");
  check_same_dtype(one, other);
  const c10::cuda::CUDAGuard guard(one.device());
  C10_CUDA_CHECK(launch_swap_shards(one.mutable_data_ptr(), other.mutable_data_ptr(), one.element_size(),
                                    shards_of(places, one), max_blocks, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace acco::cuda

TORCH_LIBRARY_IMPL(deepspeed_acco, CUDA, m) {
  m.impl("pack", acco::cuda::pack);
  m.impl("copy_shards", acco::cuda::copy_shards);
  m.impl("swap_shards", acco::cuda::swap_shards);
}
