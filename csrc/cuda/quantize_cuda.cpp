// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops of the quantised rounds: arguments checked, then launches on the current stream of the tensors' device.
// Nothing waits for it.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "cuda/ops.h"
#include "cuda/launch.h"

namespace acco::cuda {
namespace {

void quantize(const at::Tensor& values, at::Tensor records, int64_t bits, double scale,
              const std::optional<at::Tensor>& places, int64_t max_blocks) {
  check_flat(values, values, "values");
  const Shards shards = shards_of(places, values);
  const int64_t stride = check_records(records, values, bits, "records", places);
  const c10::cuda::CUDAGuard guard(values.device());
  C10_CUDA_CHECK(launch_quantize(read(values), shards, stride, static_cast<float>(scale),
                                 records.mutable_data_ptr<uint8_t>(), static_cast<int>(bits), max_blocks,
                                 c10::cuda::getCurrentCUDAStream()));
}

void dequantize_sum(at::TensorList messages, at::Tensor total, int64_t bits, int64_t max_blocks) {
  check_messages(messages, total, bits);
  std::vector<const uint8_t*> bytes;
  for (const at::Tensor& message : messages) {
    bytes.push_back(message.const_data_ptr<uint8_t>());
  }
  const c10::cuda::CUDAGuard guard(total.device());
  C10_CUDA_CHECK(launch_dequantize_sum(bytes.data(), static_cast<int64_t>(bytes.size()),
                                       total.mutable_data_ptr<float>(), total.numel(), static_cast<int>(bits),
                                       max_blocks, c10::cuda::getCurrentCUDAStream()));
}

void adamw_estimate_change(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                           const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                           const at::Tensor& is_finite, double lr, double beta1, double beta2, double eps,
                           double weight_decay, at::ScalarType live_dtype, at::Tensor records, int64_t bits,
                           const std::optional<at::Tensor>& base, int64_t max_blocks) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_base(base, live_dtype, master);
  check_records(records, master, bits, "records");
  const c10::cuda::CUDAGuard guard(master.device());
  const at::Tensor room = room_for<Prepared>(master);
  C10_CUDA_CHECK(launch_estimate_change(
      master.const_data_ptr<float>(), exp_avg.const_data_ptr<float>(), exp_avg_sq.const_data_ptr<float>(),
      scalars_of(Hyper{lr, beta1, beta2, eps, weight_decay}, step, grad_scale, is_finite, room),
      {read(grad), grad.numel(), max_blocks}, base ? read(*base) : Array{nullptr, format_of(live_dtype)},
      records.mutable_data_ptr<uint8_t>(), static_cast<int>(bits), c10::cuda::getCurrentCUDAStream()));
}

void adamw_commit_change(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step,
                         const at::Tensor& grad, const at::Tensor& grad_scale, const at::Tensor& is_finite, double lr,
                         double beta1, double beta2, double eps, double weight_decay, const at::Tensor& base,
                         at::Tensor records, int64_t bits, int64_t max_blocks) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_flat(base, master, "base");
  check_records(records, master, bits, "records");
  const c10::cuda::CUDAGuard guard(master.device());
  const at::Tensor room = room_for<Prepared>(master);
  C10_CUDA_CHECK(launch_commit_change(
      master.mutable_data_ptr<float>(), exp_avg.mutable_data_ptr<float>(), exp_avg_sq.mutable_data_ptr<float>(),
      step.mutable_data_ptr<float>(),
      scalars_of(Hyper{lr, beta1, beta2, eps, weight_decay}, step, grad_scale, is_finite, room),
      {read(grad), grad.numel(), max_blocks}, read(base), records.mutable_data_ptr<uint8_t>(), static_cast<int>(bits),
      c10::cuda::getCurrentCUDAStream()));
}

void add_change(const at::Tensor& records, const at::Tensor& is_added, at::Tensor live, int64_t bits,
                const std::optional<at::Tensor>& places, int64_t max_blocks) {
  check_flat(live, live, "live");
  const Shards shards = shards_of(places, live);
  const int64_t stride = check_records(records, live, bits, "records", places);
  check_scalar(is_added, live, at::kBool, "is_added");
  const c10::cuda::CUDAGuard guard(live.device());
  C10_CUDA_CHECK(launch_add_change(records.const_data_ptr<uint8_t>(), is_added.const_data_ptr<bool>(), write(live),
                                   shards, stride, static_cast<int>(bits), max_blocks,
                                   c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace acco::cuda

TORCH_LIBRARY_IMPL(deepspeed_acco, CUDA, m) {
  m.impl("quantize", acco::cuda::quantize);
  m.impl("dequantize_sum", acco::cuda::dequantize_sum);
  m.impl("adamw_estimate_change", acco::cuda::adamw_estimate_change);
  m.impl("adamw_commit_change", acco::cuda::adamw_commit_change);
  m.impl("add_change", acco::cuda::add_change);
}
