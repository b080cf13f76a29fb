// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU ops of the quantised rounds: arguments checked, dtypes resolved, records shared out over torch's threads.
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

// f(what changes are counted from): the given weights, or the master ones as `live_dtype` has them.
template <class F>
void with_base(const std::optional<at::Tensor>& base, at::ScalarType live_dtype, const at::Tensor& master, const F& f) {
  with_format(base ? base->scalar_type() : live_dtype, [&](auto format) {
    using Format = decltype(format);
    if (base) {
      f(GivenWeights<Format>{read<Format>(*base)});
    } else {
      f(RoundedMaster<Format>{read<Float32>(master)});
    }
  });
}

void adamw_estimate_change(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                           const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                           const at::Tensor& is_finite, double lr, double beta1, double beta2, double eps,
                           double weight_decay, at::ScalarType live_dtype, at::Tensor records, int64_t bits,
                           const std::optional<at::Tensor>& base, int64_t /*max_blocks*/) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_base(base, live_dtype, master);
  check_records(records, master, bits, "records");
  auto* bytes = records.mutable_data_ptr<uint8_t>();
  if (!*is_finite.const_data_ptr<bool>()) {
    std::memset(bytes, 0, static_cast<size_t>(records.numel()));
    return;
  }
  const AdamW arithmetic{
      make_factors(Hyper{lr, beta1, beta2, eps, weight_decay}, *read<Float32>(step), *read<Float32>(grad_scale))};
  with_format(grad.scalar_type(), [&](auto grad_format) {
    with_base(base, live_dtype, master, [&](const auto& counted_from) {
      using Grad = decltype(grad_format);
      for_record_parts(master.numel(), [&](int64_t begin, int64_t end) {
        adamw_change_range<Grad, false>(arithmetic, state<false>(master), state<false>(exp_avg),
                                        state<false>(exp_avg_sq), read<Grad>(grad), counted_from, bytes,
                                        static_cast<int>(bits), master.numel(), begin, end);
      });
    });
  });
}

void adamw_commit_change(at::Tensor master, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step,
                         const at::Tensor& grad, const at::Tensor& grad_scale, const at::Tensor& is_finite, double lr,
                         double beta1, double beta2, double eps, double weight_decay, const at::Tensor& base,
                         at::Tensor records, int64_t bits, int64_t /*max_blocks*/) {
  check_update(master, exp_avg, exp_avg_sq, step, grad, grad_scale, is_finite);
  check_flat(base, master, "base");
  check_records(records, master, bits, "records");
  auto* bytes = records.mutable_data_ptr<uint8_t>();
  const bool is_taken = *is_finite.const_data_ptr<bool>();
  const AdamW arithmetic{
      make_factors(Hyper{lr, beta1, beta2, eps, weight_decay}, *read<Float32>(step), *read<Float32>(grad_scale))};
  with_format(grad.scalar_type(), [&](auto grad_format) {
    with_format(base.scalar_type(), [&](auto base_format) {
      using Grad = decltype(grad_format);
      using Base = decltype(base_format);
      const GivenWeights<Base> counted_from{read<Base>(base)};
      for_record_parts(master.numel(), [&](int64_t begin, int64_t end) {
        if (is_taken) {
          adamw_change_range<Grad, true>(arithmetic, state<true>(master), state<true>(exp_avg), state<true>(exp_avg_sq),
                                         read<Grad>(grad), counted_from, bytes, static_cast<int>(bits), master.numel(),
                                         begin, end);
        } else {
          change_range(read<Float32>(master), counted_from, bytes, static_cast<int>(bits), master.numel(), begin, end);
        }
      });
    });
  });
  if (is_taken) {
    *write<Float32>(step) += 1.0f;
  }
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
  m.impl("adamw_commit_change", acco::cpu::adamw_commit_change);
  m.impl("add_change", acco::cpu::add_change);
}
