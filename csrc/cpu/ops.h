// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the files of CPU ops share: threads, and tensors as typed pointers.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "common/float16.h"
#include "common/ranges.h"

namespace acco::cpu {

// Below this a thread's wake-up costs more than its share of the work.
constexpr int64_t kThreadNumel = int64_t{1} << 15;

// f(begin, end) over consecutive parts of [0, count), one per thread of the caller's torch.set_num_threads.
template <class F>
void for_parts(int64_t count, int64_t least_per_thread, const F& f) {
  const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = std::min(most, pieces_of(count, least_per_thread));
  if (parts <= 1) {
    f(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    f(part_begin(count, parts, part), part_begin(count, parts, part + 1));
  }
}

// f(shard, its place) for every shard, one after the other.
template <class F>
void for_shards(const std::optional<at::Tensor>& places, int64_t count, const F& f) {
  for (int64_t shard = 0; shard < count; ++shard) {
    f(shard, places ? places->const_data_ptr<int64_t>()[shard] : shard);
  }
}

// f(Float32{}), f(BFloat16{}) or f(Float16{}): the dtype becomes a type.
template <class F>
void with_format(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) {
    f(Float32{});
  } else if (dtype == at::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

template <class Format>
const typename Format::Storage* read(const at::Tensor& tensor) {
  return static_cast<const typename Format::Storage*>(tensor.const_data_ptr());
}

template <class Format>
typename Format::Storage* write(const at::Tensor& tensor) {
  return static_cast<typename Format::Storage*>(tensor.mutable_data_ptr());
}

template <bool kWritesState>
float* state(const at::Tensor& tensor) {
  // Without kWritesState the loops only read; the cast spares them a second set of signatures.
  return kWritesState ? write<Float32>(tensor) : const_cast<float*>(read<Float32>(tensor));
}

}  // namespace acco::cpu
