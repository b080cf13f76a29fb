// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU ops of the schedule `local`: arguments checked, dtypes resolved, blocks shared out over torch's threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/local_prediction.h"
#include "cpu/ops.h"

namespace acco::cpu {
namespace {

void block_roots(const at::Tensor& exp_avg_sq, const at::Tensor& step, double beta2, double eps, at::Tensor roots,
                 int64_t /*max_blocks*/) {
  check_roots(roots, exp_avg_sq, exp_avg_sq.numel());
  check_exp_avg_sq(exp_avg_sq);
  check_scalar(step, exp_avg_sq, at::kFloat, "step");
  const double correction = root_correction(beta2, *read<Float32>(step));
  for_parts(roots.numel(), kThreadNumel / kRootNumel, [&](int64_t begin, int64_t end) {
    roots_range(read<Float32>(exp_avg_sq), exp_avg_sq.numel(), correction, eps, write<Float32>(roots), begin, end);
  });
}

void predict_locally(const at::Tensor& newest, at::Tensor before, const at::Tensor& grad, const at::Tensor& roots,
                     const at::Tensor& step, double lr, double beta1, double beta2, double kept,
                     const at::Tensor& grad_scale, const at::Tensor& is_finite, at::Tensor live, int64_t shard_numel,
                     int64_t /*max_blocks*/) {
  check_prediction(newest, before, grad, roots, step, grad_scale, is_finite, live, shard_numel);
  const LocalFactors factors = make_local_factors(Hyper{lr, beta1, beta2, 0.0, 0.0}, kept, *read<Float32>(step));
  const bool has_gradient = *is_finite.const_data_ptr<bool>();
  const float grad_scale_value = *read<Float32>(grad_scale);
  with_format(newest.scalar_type(), [&](auto weight_format) {
    with_format(grad.scalar_type(), [&](auto grad_format) {
      using Weight = decltype(weight_format);
      using Grad = decltype(grad_format);
      for_parts(roots.numel(), kThreadNumel / kRootNumel, [&](int64_t begin, int64_t end) {
        predict_range<Weight, Grad>(factors, has_gradient, grad_scale_value, read<Weight>(newest),
                                    write<Weight>(before), read<Grad>(grad), read<Float32>(roots),
                                    write<Weight>(live), shard_numel, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace acco::cpu

TORCH_LIBRARY_IMPL(deepspeed_acco, CPU, m) {
  m.impl("block_roots", acco::cpu::block_roots);
  m.impl("predict_locally", acco::cpu::predict_locally);
}
