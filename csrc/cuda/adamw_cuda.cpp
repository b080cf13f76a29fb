// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops: arguments checked, then launches on the current stream of the tensors' device. Nothing waits for it.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cuda/ops.h"
#include "cuda/launch.h"

namespace acco::cuda {
namespace {

void adamw_estimate(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                    const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                    const at::Tensor& is_finite, double lr, double beta1, double beta2, double eps, double weight_decay,
                    at::Tensor out, int64_t max_blocks) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_flat(out, master, "out");
  const c10::cuda::CUDAGuard guard(master.device());
  const at::Tensor room = room_for<Prepared>(master);
  C10_CUDA_CHECK(launch_estimate(
      master.const_data_ptr<float>(), exp_avg.const_data_ptr<float>(), exp_avg_sq.const_data_ptr<float>(),
      scalars_of(Hyper{lr, beta1, beta2, eps, weight_decay}, step, grad_scale, is_finite, room),
      {read(grad), grad.numel(), max_blocks}, write(out), c10::cuda::getCurrentCUDAStream()));
}

void adamw_commit(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step, const at::Tensor& grad,
                  const at::Tensor& grad_scale, const at::Tensor& is_finite, double lr, double beta1, double beta2,
                  double eps, double weight_decay, at::Tensor out, int64_t max_blocks) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_flat(out, master, "out");
  const c10::cuda::CUDAGuard guard(master.device());
  const at::Tensor room = room_for<Prepared>(master);
  C10_CUDA_CHECK(launch_commit(
      master.mutable_data_ptr<float>(), exp_avg.mutable_data_ptr<float>(), exp_avg_sq.mutable_data_ptr<float>(),
      step.mutable_data_ptr<float>(),
      scalars_of(Hyper{lr, beta1, beta2, eps, weight_decay}, step, grad_scale, is_finite, room),
      {read(grad), grad.numel(), max_blocks}, write(out), c10::cuda::getCurrentCUDAStream()));
}

at::Tensor grad_sumsq(const at::Tensor& grad, int64_t max_blocks) {
  check_flat(grad, grad, "grad");
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto options = grad.options().dtype(at::kDouble);
  const at::Tensor sums = at::empty({sum_chunks(grad.numel())}, options);
  at::Tensor total = at::empty({}, options);
  C10_CUDA_CHECK(launch_sum_of_squares(read(grad), grad.numel(), sums.mutable_data_ptr<double>(),
                                       total.mutable_data_ptr<double>(), max_blocks,
                                       c10::cuda::getCurrentCUDAStream()));
  return total;
}

at::Tensor error_and_step(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                          const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                          double weight_decay, const at::Tensor& stands_at, int64_t max_blocks) {
  check_state(master, exp_avg, exp_avg_sq, stands_at, "stands_at");
  check_scalar(step, master, at::kFloat, "step");
  const c10::cuda::CUDAGuard guard(master.device());
  const auto options = master.options().dtype(at::kDouble);
  const at::Tensor room = room_for<StepFactors>(master), sums = at::empty({2 * sum_chunks(master.numel())}, options);
  at::Tensor totals = at::empty({2}, options);
  const Committed state{master.const_data_ptr<float>(), exp_avg.const_data_ptr<float>(),
                        exp_avg_sq.const_data_ptr<float>(), read(stands_at), master.numel()};
  C10_CUDA_CHECK(launch_error_and_step(state, Hyper{lr, beta1, beta2, eps, weight_decay}, step.const_data_ptr<float>(),
                                       in_room<StepFactors>(room), sums.mutable_data_ptr<double>(),
                                       totals.mutable_data_ptr<double>(), max_blocks,
                                       c10::cuda::getCurrentCUDAStream()));
  return totals;
}

void traffic(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad,
             const at::Tensor& out, bool writes_state) {
  check_state(master, exp_avg, exp_avg_sq, grad);
  check_flat(out, master, "out");
  const c10::cuda::CUDAGuard guard(master.device());
  const auto pointer = [&](const at::Tensor& state) {
    return writes_state ? state.mutable_data_ptr<float>() : const_cast<float*>(state.const_data_ptr<float>());
  };
  const Inputs inputs{read(grad), grad.numel(), 0};
  C10_CUDA_CHECK(launch_traffic(pointer(master), pointer(exp_avg), pointer(exp_avg_sq), inputs, write(out),
                                writes_state, c10::cuda::getCurrentCUDAStream()));
}

void traffic_estimate(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                      const at::Tensor& grad, at::Tensor out) {
  traffic(master, exp_avg, exp_avg_sq, grad, out, false);
}

void traffic_commit(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, const at::Tensor& grad,
                    at::Tensor out) {
  traffic(master, exp_avg, exp_avg_sq, grad, out, true);
}

}  // namespace
}  // namespace acco::cuda

TORCH_LIBRARY_IMPL(deepspeed_acco, CUDA, m) {
  m.impl("adamw_estimate", acco::cuda::adamw_estimate);
  m.impl("adamw_commit", acco::cuda::adamw_commit);
  m.impl("grad_sumsq", acco::cuda::grad_sumsq);
  m.impl("error_and_step", acco::cuda::error_and_step);
  m.impl("traffic_estimate", acco::cuda::traffic_estimate);
  m.impl("traffic_commit", acco::cuda::traffic_commit);
}
