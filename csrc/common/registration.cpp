// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The schemas. They say what mutates: ESTIMATE has no alias mark on the state. `max_blocks` bounds the thread blocks of
// a launch on CUDA; 0: as many as are useful.
#include <torch/library.h>

#ifdef ACCO_BUILD
#define ACCO_TEXT(token) #token
#define ACCO_TEXT_OF(macro) ACCO_TEXT(macro)
// What optim/build.py looks for in a library that was built ahead, before it is loaded.
__attribute__((used)) const char acco_build[] = ACCO_TEXT_OF(ACCO_BUILD);
#endif

TORCH_LIBRARY(deepspeed_acco, m) {
  m.def(
      "adamw_estimate(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor grad, Tensor grad_scale, "
      "Tensor is_finite, float lr, float beta1, float beta2, float eps, float weight_decay, Tensor(a!) out, "
      "int max_blocks=0) -> ()");
  m.def(
      "adamw_commit(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor grad, "
      "Tensor grad_scale, Tensor is_finite, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "Tensor(e!) out, int max_blocks=0) -> ()");
  m.def("grad_sumsq(Tensor grad, int max_blocks=0) -> Tensor");
  // Two sums: |stands_at - master|^2, and |(1 - lr weight_decay) step|^2 of the commit that left this state.
  m.def(
      "error_and_step(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, Tensor stands_at, int max_blocks=0) -> Tensor");
  // With `places` (int64) the operands are as many shards: shard r of the first is shard places[r] of the second. Without
  // it is one.
  m.def(
      "pack(Tensor(a!) grads, Tensor(b!) packed, float scale, bool clears, Tensor? places=None, int max_blocks=0) "
      "-> ()");
  m.def("copy_shards(Tensor source, Tensor(a!) target, Tensor places, int max_blocks=0) -> ()");
  m.def("swap_shards(Tensor(a!) one, Tensor(b!) other, Tensor? places=None, int max_blocks=0) -> ()");
  // With `places` the records are as many messages, which begin at every so many bytes.
  m.def(
      "quantize(Tensor values, Tensor(a!) records, int bits, float scale, Tensor? places=None, int max_blocks=0) "
      "-> ()");
  m.def("dequantize_sum(Tensor[] messages, Tensor(a!) total, int bits, int max_blocks=0) -> ()");
  // The change is counted from `base`; without it from the master weights as `live_dtype` has them.
  m.def(
      "adamw_estimate_change(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor grad, "
      "Tensor grad_scale, Tensor is_finite, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "ScalarType live_dtype, Tensor(a!) records, int bits, Tensor? base=None, int max_blocks=0) -> ()");
  m.def(
      "adamw_commit_change(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor grad, "
      "Tensor grad_scale, Tensor is_finite, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "Tensor base, Tensor(e!) records, int bits, int max_blocks=0) -> ()");
  m.def(
      "add_change(Tensor records, Tensor is_added, Tensor(a!) live, int bits, Tensor? places=None, int max_blocks=0) "
      "-> ()");
  m.def(
      "block_roots(Tensor exp_avg_sq, Tensor step, float beta2, float eps, Tensor(a!) roots, int max_blocks=0) -> ()");
  // `live` may be the same tensor as `newest`.
  m.def(
      "predict_locally(Tensor newest, Tensor(a!) before, Tensor grad, Tensor roots, Tensor step, float lr, float beta1, "
      "float beta2, float kept, Tensor grad_scale, Tensor is_finite, Tensor(b!) live, int shard_numel, "
      "int max_blocks=0) -> ()");
  // For `ds_acco kernels` only: the reads and writes of the two rounds, and no arithmetic.
  m.def("traffic_estimate(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor grad, Tensor(a!) out) -> ()");
  m.def(
      "traffic_commit(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor(d!) out) "
      "-> ()");
}
