// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the files of CUDA ops share: tensors as the launches take them.
#pragma once

#include <ATen/ATen.h>

#include "cuda/launch.h"

namespace acco::cuda {

inline Format format_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat      ? Format::kFloat32
         : tensor.scalar_type() == at::kBFloat16 ? Format::kBFloat16
                                                 : Format::kFloat16;
}

inline Array read(const at::Tensor& tensor) { return {tensor.const_data_ptr(), format_of(tensor)}; }
inline MutableArray write(const at::Tensor& tensor) { return {tensor.mutable_data_ptr(), format_of(tensor)}; }

inline Inputs inputs_of(const Hyper& hyper, const at::Tensor& grad, const at::Tensor& grad_scale,
                        const at::Tensor& is_finite, int64_t max_blocks) {
  return {hyper,        read(grad), grad_scale.const_data_ptr<float>(), is_finite.const_data_ptr<bool>(),
          grad.numel(), max_blocks};
}

}  // namespace acco::cuda
