// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the files of CUDA ops share: tensors as the launches take them.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "common/checks.h"
#include "cuda/launch.h"

namespace acco::cuda {

inline Format format_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? Format::kFloat32 : dtype == at::kBFloat16 ? Format::kBFloat16 : Format::kFloat16;
}

inline Array read(const at::Tensor& tensor) { return {tensor.const_data_ptr(), format_of(tensor.scalar_type())}; }
inline MutableArray write(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), format_of(tensor.scalar_type())};
}

// The shards of the elements of `like`, after the checks.
inline Shards shards_of(const std::optional<at::Tensor>& places, const at::Tensor& like) {
  const int64_t count = check_places(places, like);
  return {places ? places->const_data_ptr<int64_t>() : nullptr, count, like.numel() / count};
}

// Room on the device for a T. The allocator gives it to others in the order of this stream.
template <class T>
at::Tensor room_for(const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(sizeof(T))}, like.options().dtype(at::kByte));
}

template <class T>
T* in_room(const at::Tensor& room) {
  return reinterpret_cast<T*>(room.mutable_data_ptr<uint8_t>());
}

inline Scalars scalars_of(const Hyper& hyper, const at::Tensor& step, const at::Tensor& grad_scale,
                          const at::Tensor& is_finite, const at::Tensor& room) {
  return {hyper, step.const_data_ptr<float>(), grad_scale.const_data_ptr<float>(), is_finite.const_data_ptr<bool>(),
          in_room<Prepared>(room)};
}

}  // namespace acco::cuda
