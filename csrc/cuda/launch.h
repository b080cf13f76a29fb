// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA kernels look like from outside. Every launch goes to the given stream and waits for nothing. It has at
// most `max_blocks` thread blocks, which leaves multiprocessors to others; 0: as many as are useful.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/adamw.h"
#include "common/local_prediction.h"

namespace acco::cuda {

enum class Format { kFloat32, kBFloat16, kFloat16 };

struct Array {
  const void* data;
  Format format;
};

struct MutableArray {
  void* data;
  Format format;
};

// What both rounds read, element by element.
struct Inputs {
  Array grad;
  int64_t numel;
  int64_t max_blocks;
};

// The 0-dim values of an update, which lie on the device, so that the host need not know them, and room on the device
// for what the launch makes of them once for all elements.
struct Prepared {
  Factors factors;
  bool is_taken;
};

struct Scalars {
  Hyper hyper;
  const float* step;
  const float* grad_scale;
  const bool* is_finite;
  Prepared* prepared;
};

cudaError_t launch_estimate(const float* master, const float* exp_avg, const float* exp_avg_sq, const Scalars& scalars,
                            const Inputs& inputs, MutableArray out, cudaStream_t stream);

// `step` is that of `scalars`, to be counted on.
cudaError_t launch_commit(float* master, float* exp_avg, float* exp_avg_sq, float* step, const Scalars& scalars,
                          const Inputs& inputs, MutableArray out, cudaStream_t stream);

// The same reads and writes without arithmetic, for benchmarks.
cudaError_t launch_traffic(float* master, float* exp_avg, float* exp_avg_sq, const Inputs& inputs, MutableArray out,
                           bool writes_state, cudaStream_t stream);

// `sums` has room for sum_chunks(numel) doubles, `total` for one. The order of the additions is fixed.
int64_t sum_chunks(int64_t numel);
cudaError_t launch_sum_of_squares(Array values, int64_t numel, double* sums, double* total, int64_t max_blocks,
                                  cudaStream_t stream);

// The state that a commit left, and where training stood while it ran. `sums` has room for 2 sum_chunks(numel) doubles,
// `totals` for two, `prepared` for what the launch makes of the 0-dim step.
struct Committed {
  const float* master;
  const float* exp_avg;
  const float* exp_avg_sq;
  Array stands_at;
  int64_t numel;
};

cudaError_t launch_error_and_step(const Committed& state, const Hyper& hyper, const float* step, StepFactors* prepared,
                                  double* sums, double* totals, int64_t max_blocks, cudaStream_t stream);

// The shards of two flat operands, `numel` elements each: what is shard r of the one is shard places[r] of the other.
struct Shards {
  const int64_t* places;  // on the device; null: there is one shard
  int64_t count, numel;
};

cudaError_t launch_pack(MutableArray grads, MutableArray packed, const Shards& shards, float scale, bool clears,
                        int64_t max_blocks, cudaStream_t stream);

// Of elements of two or four bytes.
cudaError_t launch_copy_shards(const void* source, void* target, int64_t element_bytes, const Shards& shards,
                               int64_t max_blocks, cudaStream_t stream);

cudaError_t launch_swap_shards(void* one, void* other, int64_t element_bytes, const Shards& shards, int64_t max_blocks,
                               cudaStream_t stream);

// The quantised rounds; `bits` is 4 or 8. The messages of several shards are `stride` bytes apart, in the order of
// their places.
cudaError_t launch_quantize(Array values, const Shards& shards, int64_t stride, float scale, uint8_t* records, int bits,
                            int64_t max_blocks, cudaStream_t stream);

// `messages` lies on the host and may be freed after the call.
cudaError_t launch_dequantize_sum(const uint8_t* const* messages, int64_t message_count, float* total, int64_t numel,
                                  int bits, int64_t max_blocks, cudaStream_t stream);

// The change is counted from `base`; where that has no data, from the master weights as its format has them.
cudaError_t launch_estimate_change(const float* master, const float* exp_avg, const float* exp_avg_sq,
                                   const Scalars& scalars, const Inputs& inputs, Array base, uint8_t* records, int bits,
                                   cudaStream_t stream);

// The change of the master weights as the launch leaves them, counted from `base`; `step` as in launch_commit.
cudaError_t launch_commit_change(float* master, float* exp_avg, float* exp_avg_sq, float* step, const Scalars& scalars,
                                 const Inputs& inputs, Array base, uint8_t* records, int bits, cudaStream_t stream);

cudaError_t launch_add_change(const uint8_t* records, const bool* is_added, MutableArray live, const Shards& shards,
                              int64_t stride, int bits, int64_t max_blocks, cudaStream_t stream);

// The schedule `local`; `numel` elements are whole shards.
cudaError_t launch_block_roots(const float* exp_avg_sq, int64_t numel, const float* step, double beta2, double eps,
                               float* roots, int64_t max_blocks, cudaStream_t stream);

struct Prediction {
  Array newest;
  MutableArray before, live;
  Array grad;
  const float* roots;
  const float* step;
  const float* grad_scale;
  const bool* is_finite;
  int64_t numel, shard_numel, max_blocks;
};

// What a prediction has of its 0-dim values: room for it on the device, which the launch fills.
struct PreparedLocally {
  LocalFactors factors;
  float grad_scale;
  bool has_gradient;
};

cudaError_t launch_predict_locally(const Prediction& operands, const Hyper& hyper, double kept,
                                   PreparedLocally* prepared, cudaStream_t stream);

}  // namespace acco::cuda
