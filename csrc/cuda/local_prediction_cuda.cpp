// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops of the schedule `local`: arguments checked, then launches on the current stream of the tensors' device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace acco::cuda {
namespace {

void block_roots(const at::Tensor& exp_avg_sq, const at::Tensor& step, double beta2, double eps, at::Tensor roots,
                 int64_t max_blocks) {
  check_roots(roots, exp_avg_sq, exp_avg_sq.numel());
  check_exp_avg_sq(exp_avg_sq);
  check_scalar(step, exp_avg_sq, at::kFloat, "step");
  const c10::cuda::CUDAGuard guard(exp_avg_sq.device());
  C10_CUDA_CHECK(launch_block_roots(exp_avg_sq.const_data_ptr<float>(), exp_avg_sq.numel(),
                                    step.const_data_ptr<float>(), beta2, eps, roots.mutable_data_ptr<float>(),
                                    max_blocks, c10::cuda::getCurrentCUDAStream()));
}

void predict_locally(const at::Tensor& newest, at::Tensor before, const at::Tensor& grad, const at::Tensor& roots,
                     const at::Tensor& step, double lr, double beta1, double beta2, double kept,
                     const at::Tensor& grad_scale, const at::Tensor& is_finite, at::Tensor live, int64_t shard_numel,
                     int64_t max_blocks) {
  check_prediction(newest, before, grad, roots, step, grad_scale, is_finite, live, shard_numel);
  const c10::cuda::CUDAGuard guard(newest.device());
  const Prediction operands{read(newest),
                            write(before),
                            write(live),
                            read(grad),
                            roots.const_data_ptr<float>(),
                            step.const_data_ptr<float>(),
                            grad_scale.const_data_ptr<float>(),
                            is_finite.const_data_ptr<bool>(),
                            newest.numel(),
                            shard_numel,
                            max_blocks};
  const at::Tensor room = room_for<PreparedLocally>(newest);
  C10_CUDA_CHECK(launch_predict_locally(operands, Hyper{lr, beta1, beta2, 0.0, 0.0}, kept,
                                        in_room<PreparedLocally>(room), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace acco::cuda

TORCH_LIBRARY_IMPL(deepspeed_acco, CUDA, m) {
  m.impl("block_roots", acco::cuda::block_roots);
  m.impl("predict_locally", acco::cuda::predict_locally);
}
