// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU ops of the quantised estimate: arguments checked, dtypes resolved, records shared out over torch's threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/quantize.h"

namespace acco::cpu {
namespace {

// f(begin, end) over the records of `numel` elements.
template <class F>
void for_record_parts(int64_t numel, const F& f) {
  for_parts(pieces_of(numel, kRecordNumel), kThreadNumel / kRecordNumel, f);
}

void quantize(const at::Tensor& values, at::Tensor records, int64_t bits, double scale,
              const std::optional<at::Tensor>& places, int64_t /*max_blocks*/) {
  check_flat(values, values, "values");
  const int64_t count = check_places(places, values);
  const int64_t stride = check_records(records, values, bits, "records", places);
  const int64_t numel = values.numel() / count;
  with_format(values.scalar_type(), [&](auto format) {
    using Source = decltype(format);
    for_shards(places, count, [&](int64_t shard, int64_t place) {
      const auto* from = read<Source>(values) + shard * numel;
      auto* to = records.mutable_data_ptr<uint8_t>() + place * stride;
      for_record_parts(numel, [&](int64_t begin, int64_t end) {
        quantize_range<Source>(from, to, static_cast<float>(scale), static_cast<int>(bits), numel, begin, end);
      });
    });
  });
}

void dequantize_sum(at::TensorList messages, at::Tensor total, int64_t bits, int64_t /*max_blocks*/) {
  check_messages(messages, total, bits);
  std::vector<const uint8_t*> bytes;
  for (const at::Tensor& message : messages) {
    bytes.push_back(message.const_data_ptr<uint8_t>());
  }
  const bool streams = total.numel() * static_cast<int64_t>(sizeof(float)) >= kStreamingBytes;
  for_record_parts(total.numel(), [&](int64_t begin, int64_t end) {
    dequantize_sum_range(bytes.data(), static_cast<int64_t>(bytes.size()), write<Float32>(total),
                         static_cast<int>(bits), total.numel(), begin, end, streams);
  });
}

void adamw_estimate_change(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                           const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                           const at::Tensor& is_finite, double lr, double beta1, double beta2, double eps,
                           double weight_decay, at::ScalarType live_dtype, at::Tensor records, int64_t bits,
                           int64_t /*max_blocks*/) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_dtype(live_dtype, "live");
  check_records(records, master, bits, "records");
  auto* bytes = records.mutable_data_ptr<uint8_t>();
  if (!*is_finite.const_data_ptr<bool>()) {
    std::memset(bytes, 0, static_cast<size_t>(records.numel()));
    return;
  }
  const Factors factors =
      make_factors(Hyper{lr, beta1, beta2, eps, weight_decay}, *read<Float32>(step), *read<Float32>(grad_scale));
  with_format(grad.scalar_type(), [&](auto grad_format) {
    with_format(live_dtype, [&](auto live_format) {
      using Grad = decltype(grad_format);
      using Live = decltype(live_format);
      for_record_parts(master.numel(), [&](int64_t begin, int64_t end) {
        estimate_change_range<Grad, Live>(factors, read<Float32>(master), read<Float32>(exp_avg),
                                          read<Float32>(exp_avg_sq), read<Grad>(grad), bytes, static_cast<int>(bits), master.numel(), begin, end);
      });
    });
  });
}

void add_change(const at::Tensor& records, const at::Tensor& is_added, at::Tensor live, int64_t bits,
                const std::optional<at::Tensor>& places, int64_t /*max_blocks*/) {
  check_flat(live, live, "live");
  const int64_t count = check_places(places, live);
  const int64_t stride = check_records(records, live, bits, "records", places);
  check_scalar(is_added, live, at::kBool, "is_added");
  const int64_t numel = live.numel() / count;
  if (!*is_added.const_data_ptr<bool>()) {
    return;
  }
  with_format(live.scalar_type(), [&](auto format) {
    using Live = decltype(format);
    for_shards(places, count, [&](int64_t shard, int64_t place) {
      const auto* from = records.const_data_ptr<uint8_t>() + place * stride;
      auto* to = write<Live>(live) + shard * numel;
      for_record_parts(numel, [&](int64_t begin, int64_t end) {
        add_change_range<Live>(from, to, static_cast<int>(bits), numel, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace acco::cpu

TORCH_LIBRARY_IMPL(deepspeed_acco, CPU, m) {
  m.impl("quantize", acco::cpu::quantize);
  m.impl("dequantize_sum", acco::cpu::dequantize_sum);
  m.impl("adamw_estimate_change", acco::cpu::adamw_estimate_change);
  m.impl("add_change", acco::cpu::add_change);
}
