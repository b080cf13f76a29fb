// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU ops: arguments checked, dtypes resolved, the ranges of cpu/kernels.h shared out over torch's threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace acco::cpu {
namespace {

template <bool kWritesState, class Arithmetic>
void update(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad,
            const at::Tensor& out, const Arithmetic& arithmetic) {
  const bool streams = out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamingBytes;
  with_format(grad.scalar_type(), [&](auto grad_format) {
    with_format(out.scalar_type(), [&](auto out_format) {
      using Grad = decltype(grad_format);
      using Out = decltype(out_format);
      for_parts(master.numel(), kThreadNumel, [&](int64_t begin, int64_t end) {
        update_range<Grad, Out, kWritesState>(arithmetic, state<kWritesState>(master), state<kWritesState>(exp_avg),
                                              state<kWritesState>(exp_avg_sq), read<Grad>(grad), write<Out>(out),
                                              begin, end, streams);
      });
    });
  });
}

template <bool kWritesState>
void adamw_or_skip(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                   const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                   const at::Tensor& is_finite, const Hyper& hyper, const at::Tensor& out) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_flat(out, master, "out");
  if (!*is_finite.const_data_ptr<bool>()) {
    out.copy_(master.detach());
    return;
  }
  const AdamW arithmetic{make_factors(hyper, *read<Float32>(step), *read<Float32>(grad_scale))};
  update<kWritesState>(master, exp_avg, exp_avg_sq, grad, out, arithmetic);
  if (kWritesState) {
    *write<Float32>(step) += 1.0f;
  }
}

void adamw_estimate(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                    const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                    const at::Tensor& is_finite, double lr, double beta1, double beta2, double eps, double weight_decay,
                    at::Tensor out, int64_t /*max_blocks*/) {
  adamw_or_skip<false>(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite,
                       Hyper{lr, beta1, beta2, eps, weight_decay}, out);
}

void adamw_commit(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step, const at::Tensor& grad,
                  const at::Tensor& grad_scale, const at::Tensor& is_finite, double lr, double beta1, double beta2,
                  double eps, double weight_decay, at::Tensor out, int64_t /*max_blocks*/) {
  adamw_or_skip<true>(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite,
                      Hyper{lr, beta1, beta2, eps, weight_decay}, out);
}

at::Tensor grad_sumsq(const at::Tensor& grad, int64_t /*max_blocks*/) {
  check_flat(grad, grad, "grad");
  const int64_t numel = grad.numel();
  std::vector<double> sums(static_cast<size_t>(pieces_of(numel, kSumBlock)));
  with_format(grad.scalar_type(), [&](auto format) {
    using Source = decltype(format);
    const auto* values = read<Source>(grad);
    for_parts(static_cast<int64_t>(sums.size()), kThreadNumel / kSumBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kSumBlock;
        sums[static_cast<size_t>(block)] = block_sum_of_squares<Source>(values + at, std::min(kSumBlock, numel - at));
      }
    });
  });
  double total = 0.0;
  for (const double sum : sums) {
    total += sum;
  }
  return at::scalar_tensor(total, grad.options().dtype(at::kDouble));
}

at::Tensor error_and_step(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                          const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                          double weight_decay, const at::Tensor& stands_at, int64_t /*max_blocks*/) {
  check_state(master, exp_avg, exp_avg_sq, stands_at, "stands_at");
  check_scalar(step, master, at::kFloat, "step");
  const StepFactors factors = make_step_factors(Hyper{lr, beta1, beta2, eps, weight_decay}, *read<Float32>(step));
  const int64_t numel = master.numel();
  std::vector<ErrorAndStep> sums(static_cast<size_t>(pieces_of(numel, kSumBlock)));
  with_format(stands_at.scalar_type(), [&](auto format) {
    using Live = decltype(format);
    for_parts(static_cast<int64_t>(sums.size()), kThreadNumel / kSumBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kSumBlock;
        sums[static_cast<size_t>(block)] = block_error_and_step<Live>(
            factors, read<Float32>(master) + at, read<Float32>(exp_avg) + at, read<Float32>(exp_avg_sq) + at,
            read<Live>(stands_at) + at, std::min(kSumBlock, numel - at));
      }
    });
  });
  at::Tensor totals = at::zeros({2}, master.options().dtype(at::kDouble));
  auto* total = totals.mutable_data_ptr<double>();
  for (const ErrorAndStep& sum : sums) {
    total[0] += sum.error;
    total[1] += sum.step;
  }
  return totals;
}

template <bool kWritesState>
void traffic(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad,
             const at::Tensor& out) {
  check_state(master, exp_avg, exp_avg_sq, grad);
  check_flat(out, master, "out");
  update<kWritesState>(master, exp_avg, exp_avg_sq, grad, out, Traffic{});
}

void traffic_estimate(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                      const at::Tensor& grad, at::Tensor out) {
  traffic<false>(master, exp_avg, exp_avg_sq, grad, out);
}

void traffic_commit(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, const at::Tensor& grad,
                    at::Tensor out) {
  traffic<true>(master, exp_avg, exp_avg_sq, grad, out);
}

}  // namespace
}  // namespace acco::cpu

TORCH_LIBRARY_IMPL(deepspeed_acco, CPU, m) {
  m.impl("adamw_estimate", acco::cpu::adamw_estimate);
  m.impl("adamw_commit", acco::cpu::adamw_commit);
  m.impl("grad_sumsq", acco::cpu::grad_sumsq);
  m.impl("error_and_step", acco::cpu::error_and_step);
  m.impl("traffic_estimate", acco::cpu::traffic_estimate);
  m.impl("traffic_commit", acco::cpu::traffic_commit);
}
