// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU ops that move shards: arguments checked, dtypes resolved, one shard after the other, each shared out over
// torch's threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "common/checks.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace acco::cpu {
namespace {

void pack(at::Tensor grads, at::Tensor packed, double scale, bool clears, const std::optional<at::Tensor>& places,
          int64_t /*max_blocks*/) {
  check_flat(grads, grads, "grads");
  check_flat(packed, grads, "packed");
  const int64_t count = check_places(places, grads);
  const int64_t numel = grads.numel() / count;
  const bool streams = packed.numel() * static_cast<int64_t>(packed.element_size()) >= kStreamingBytes;
  with_format(grads.scalar_type(), [&](auto source_format) {
    with_format(packed.scalar_type(), [&](auto target_format) {
      using Source = decltype(source_format);
      using Target = decltype(target_format);
      const auto run = clears ? pack_range<Source, Target, true> : pack_range<Source, Target, false>;
      for_shards(places, count, [&](int64_t shard, int64_t place) {
        auto* from = write<Source>(grads) + shard * numel;
        auto* to = write<Target>(packed) + place * numel;
        for_parts(numel, kThreadNumel, [&](int64_t begin, int64_t end) {
          run(from, to, static_cast<float>(scale), begin, end, streams);
        });
      });
    });
  });
}

// f(a part of a shard of `one`, where it is in `other`, its bytes) for all parts.
template <class F>
void for_bytes(void* one, void* other, const at::Tensor& like, const std::optional<at::Tensor>& places, const F& f) {
  const int64_t count = check_places(places, like);
  const int64_t numel = like.numel() / count, element = static_cast<int64_t>(like.element_size());
  for_shards(places, count, [&](int64_t shard, int64_t place) {
    auto* in_one = static_cast<char*>(one) + shard * numel * element;
    auto* in_other = static_cast<char*>(other) + place * numel * element;
    for_parts(numel, kThreadNumel, [&](int64_t begin, int64_t end) {
      f(in_one + begin * element, in_other + begin * element, (end - begin) * element);
    });
  });
}

void copy_shards(const at::Tensor& source, at::Tensor target, const at::Tensor& places, int64_t /*max_blocks*/) {
  check_flat(source, source, "source");
  check_flat(target, source, "target");
  check_same_dtype(source, target);
  for_bytes(const_cast<void*>(source.const_data_ptr()), target.mutable_data_ptr(), source, places,
            [](const char* from, char* to, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}

void swap_shards(at::Tensor one, at::Tensor other, const std::optional<at::Tensor>& places, int64_t /*max_blocks*/) {
  check_flat(one, one, "one");
  check_flat(other, one, "other");
  check_same_dtype(one, other);
  for_bytes(one.mutable_data_ptr(), other.mutable_data_ptr(), one, places,
            [](char* in_one, char* in_other, int64_t bytes) { std::swap_ranges(in_one, in_one + bytes, in_other); });
}

}  // namespace
}  // namespace acco::cpu

TORCH_LIBRARY_IMPL(deepspeed_acco, CPU, m) {
  m.impl("pack", acco::cpu::pack);
  m.impl("copy_shards", acco::cpu::copy_shards);
  m.impl("swap_shards", acco::cpu::swap_shards);
}
