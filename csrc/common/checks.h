// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the ops require of their arguments, the same on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/local_prediction.h"
#include "common/quantize.h"

namespace acco {

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_dtype(at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(is_supported(dtype), "deepspeed_acco: ", name, " has dtype ", dtype,
                    "; allowed: float32, bfloat16, float16");
}

inline void check_flat(const at::Tensor& tensor, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.is_contiguous(), "deepspeed_acco: ", name,
                    " must be 1-D and contiguous, got sizes ", tensor.sizes(), " and strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.numel() == like.numel(), "deepspeed_acco: ", name, " has ", tensor.numel(),
                    " elements, expected ", like.numel());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "deepspeed_acco: ", name, " is on ", tensor.device(),
                    ", expected ", like.device());
  check_dtype(tensor.scalar_type(), name);
}

inline void check_scalar(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 0 && tensor.scalar_type() == dtype, "deepspeed_acco: ", name,
                    " must be 0-dim of dtype ", dtype, ", got sizes ", tensor.sizes(), " of ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "deepspeed_acco: ", name, " is on ", tensor.device(),
                    ", expected ", like.device());
}

inline void check_state(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                        const at::Tensor& grad, const char* grad_name = "grad") {
  check_flat(master, master, "master");
  check_flat(exp_avg, master, "exp_avg");
  check_flat(exp_avg_sq, master, "exp_avg_sq");
  for (const auto& state : {master, exp_avg, exp_avg_sq}) {
    TORCH_CHECK_VALUE(state.scalar_type() == at::kFloat, "deepspeed_acco: the state must be float32, got ",
                      state.scalar_type());
  }
  check_flat(grad, master, grad_name);
}

inline void check_update(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                         const at::Tensor& step, const at::Tensor& grad, const at::Tensor& grad_scale,
                         const at::Tensor& is_finite) {
  check_state(master, exp_avg, exp_avg_sq, grad);
  check_scalar(step, master, at::kFloat, "step");
  check_scalar(grad_scale, master, at::kFloat, "grad_scale");
  check_scalar(is_finite, master, at::kBool, "is_finite");
}

// Returns how many shards of the elements of `like` have a place; without places it is one.
inline int64_t check_places(const std::optional<at::Tensor>& places, const at::Tensor& like) {
  if (!places) {
    return 1;
  }
  TORCH_CHECK_VALUE(places->dim() == 1 && places->is_contiguous() && places->scalar_type() == at::kLong,
                    "deepspeed_acco: places must be 1-D, contiguous and int64, got sizes ", places->sizes(), " of ",
                    places->scalar_type());
  TORCH_CHECK_VALUE(places->device() == like.device(), "deepspeed_acco: places is on ", places->device(), ", expected ",
                    like.device());
  TORCH_CHECK_VALUE(places->numel() > 0 && like.numel() % places->numel() == 0, "deepspeed_acco: ", like.numel(),
                    " elements are not ", places->numel(), " equal shards");
  return places->numel();
}

// `records` are those of the elements of `like`: one message, or, with places, a message of each shard at equal
// distances. Returns the bytes from one to the next.
inline int64_t check_records(const at::Tensor& records, const at::Tensor& like, int64_t bits, const char* name,
                             const std::optional<at::Tensor>& places = std::nullopt) {
  const int64_t count = check_places(places, like);
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "deepspeed_acco: bits is ", bits, "; allowed: 4, 8");
  TORCH_CHECK_VALUE(records.dim() == 1 && records.is_contiguous(), "deepspeed_acco: ", name,
                    " must be 1-D and contiguous, got sizes ", records.sizes(), " and strides ", records.strides());
  TORCH_CHECK_VALUE(records.scalar_type() == at::kByte, "deepspeed_acco: ", name, " must be uint8, got ",
                    records.scalar_type());
  const int64_t numel = like.numel() / count, stride = records.numel() / count;
  const int64_t bytes = message_bytes(numel, static_cast<int>(bits));
  if (!places) {
    TORCH_CHECK_VALUE(stride == bytes, "deepspeed_acco: ", name, " has ", stride, " bytes, expected ", bytes, ": ",
                      numel, " elements in ", bits, " bits");
  } else {
    TORCH_CHECK_VALUE(records.numel() % count == 0 && stride % 2 == 0 && stride >= bytes, "deepspeed_acco: ", name,
                      " has ", records.numel(), " bytes, expected an even number for each of ", count,
                      " shards and at least ", bytes, ": ", numel, " elements in ", bits, " bits");
  }
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(records.const_data_ptr()) % 2 == 0, "deepspeed_acco: ", name,
                    " must begin at an even address: their scales take two bytes");
  TORCH_CHECK_VALUE(records.device() == like.device(), "deepspeed_acco: ", name, " is on ", records.device(),
                    ", expected ", like.device());
  return stride;
}

// What an estimate's changes are counted from: given weights, or the master ones as `live_dtype` has them.
inline void check_base(const std::optional<at::Tensor>& base, at::ScalarType live_dtype, const at::Tensor& master) {
  if (base) {
    check_flat(*base, master, "base");
  } else {
    check_dtype(live_dtype, "live");
  }
}

inline void check_same_dtype(const at::Tensor& one, const at::Tensor& other) {
  TORCH_CHECK_VALUE(one.scalar_type() == other.scalar_type(), "deepspeed_acco: both must have one dtype, got ",
                    one.scalar_type(), " and ", other.scalar_type());
}

inline void check_messages(at::ArrayRef<at::Tensor> messages, const at::Tensor& total, int64_t bits) {
  check_flat(total, total, "total");
  TORCH_CHECK_VALUE(total.scalar_type() == at::kFloat, "deepspeed_acco: total must be float32, got ",
                    total.scalar_type());
  TORCH_CHECK_VALUE(!messages.empty(), "deepspeed_acco: there must be at least one message");
  for (const at::Tensor& message : messages) {
    check_records(message, total, bits, "a message");
  }
}

// `roots` are those of the blocks of the elements of `like`, in shards of `shard_numel`.
inline void check_roots(const at::Tensor& roots, const at::Tensor& like, int64_t shard_numel) {
  check_flat(like, like, "exp_avg_sq or newest");
  TORCH_CHECK_VALUE(shard_numel > 0 ? like.numel() % shard_numel == 0 : like.numel() == 0, "deepspeed_acco: ",
                    like.numel(), " elements are not whole shards of ", shard_numel);
  const int64_t shards = shard_numel > 0 ? like.numel() / shard_numel : 0;
  const int64_t blocks = shards * pieces_of(shard_numel, kRootNumel);
  check_flat(roots, roots, "roots");
  TORCH_CHECK_VALUE(roots.numel() == blocks, "deepspeed_acco: roots has ", roots.numel(), " elements, expected ",
                    blocks, ", one for each block of ", kRootNumel);
  TORCH_CHECK_VALUE(roots.scalar_type() == at::kFloat, "deepspeed_acco: roots must be float32, got ",
                    roots.scalar_type());
  TORCH_CHECK_VALUE(roots.device() == like.device(), "deepspeed_acco: roots is on ", roots.device(), ", expected ",
                    like.device());
}

inline void check_exp_avg_sq(const at::Tensor& exp_avg_sq) {
  TORCH_CHECK_VALUE(exp_avg_sq.scalar_type() == at::kFloat, "deepspeed_acco: the state must be float32, got ",
                    exp_avg_sq.scalar_type());
}

inline void check_prediction(const at::Tensor& newest, const at::Tensor& before, const at::Tensor& grad,
                             const at::Tensor& roots, const at::Tensor& step, const at::Tensor& grad_scale,
                             const at::Tensor& is_finite, const at::Tensor& live, int64_t shard_numel) {
  check_roots(roots, newest, shard_numel);
  check_flat(before, newest, "before");
  check_flat(grad, newest, "grad");
  check_flat(live, newest, "live");
  TORCH_CHECK_VALUE(before.scalar_type() == newest.scalar_type() && live.scalar_type() == newest.scalar_type(),
                    "deepspeed_acco: newest, before and live must have one dtype, got ", newest.scalar_type(), ", ",
                    before.scalar_type(), " and ", live.scalar_type());
  check_scalar(step, newest, at::kFloat, "step");
  check_scalar(grad_scale, newest, at::kFloat, "grad_scale");
  check_scalar(is_finite, newest, at::kBool, "is_finite");
}

}  // namespace acco
