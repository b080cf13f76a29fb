// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels of the schedule `local`, without torch. A warp has a block of 256 elements, so that what is the same
// for the block is computed once a lane, and an index is divided once a block.
#include "common/local_prediction.h"
#include "common/ranges.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace acco::cuda {
namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kWarps = kThreads / kLanes;

__global__ void __launch_bounds__(kThreads)
    roots_kernel(const float* exp_avg_sq, int64_t numel, const float* step, double beta2, double eps, float* roots) {
  __shared__ double correction;
  if (threadIdx.x == 0) {
    correction = root_correction(beta2, *step);
  }
  __syncthreads();
  const uint32_t lane = threadIdx.x % kLanes;
  const int64_t blocks = pieces_of(numel, kRootNumel);
  for (int64_t block = grid_first(blockIdx.x, kWarps, threadIdx.x / kLanes); block < blocks;
       block += grid_stride(gridDim.x, kWarps)) {
    const RootBlock at = root_block(block, numel);
    double sum = 0.0;
    for (int64_t i = lane; i < at.count; i += kLanes) {
      sum += exp_avg_sq[at.begin + i];
    }
    for (uint32_t half = kLanes / 2; half > 0; half /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, half);
    }
    if (lane == 0) {
      roots[block] = root_of(sum / static_cast<double>(at.count), correction, eps);
    }
  }
}

struct Shared {
  LocalFactors factors;
  float grad_scale;
  bool has_gradient;
};

// `newest` and `live` may be the same, so neither is __restrict__.
template <class Weight, class Grad>
__global__ void __launch_bounds__(kThreads)
    predict_kernel(const typename Weight::Storage* newest, typename Weight::Storage* before,
                   typename Weight::Storage* live, const typename Grad::Storage* grad, const float* roots,
                   int64_t blocks, int64_t shard_numel, bool is_aligned, Hyper hyper, const float* step,
                   const float* grad_scale, const bool* is_finite) {
  __shared__ Shared shared;
  if (threadIdx.x == 0) {
    shared = {make_local_factors(hyper, *step), *grad_scale, *is_finite};
  }
  __syncthreads();
  const LocalFactors factors = shared.factors;
  const bool has_gradient = shared.has_gradient;
  const uint32_t lane = threadIdx.x % kLanes;
  for (int64_t block = grid_first(blockIdx.x, kWarps, threadIdx.x / kLanes); block < blocks;
       block += grid_stride(gridDim.x, kWarps)) {
    const RootBlock at = root_block(block, shard_numel);
    const float factor = has_gradient ? block_factor(factors, shared.grad_scale, roots[block]) : 0.0f;
    const auto one = [&](typename Weight::Storage newest_one, typename Weight::Storage before_one,
                         typename Grad::Storage grad_one) {
      const float own = has_gradient ? Grad::load(grad_one) : 0.0f;
      return Weight::store(predict(factors, Weight::load(newest_one), Weight::load(before_one), own, factor));
    };
    if (is_aligned && at.count == kRootNumel) {
#pragma unroll
      for (int64_t part = 0; part < kRootNumel / (4 * kLanes); ++part) {
        const int64_t i = at.begin + 4 * (part * kLanes + lane);
        const auto kept = load_four(newest + i), old = load_four(before + i);
        const auto own = load_four(grad + i);
        Four<typename Weight::Storage> out;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          out.at[k] = one(kept.at[k], old.at[k], own.at[k]);
        }
        store_four(live + i, out);
        store_four(before + i, kept);
      }
    } else {
      for (int64_t i = at.begin + lane; i < at.begin + at.count; i += kLanes) {
        const typename Weight::Storage kept = newest[i];
        live[i] = one(kept, before[i], grad[i]);
        before[i] = kept;
      }
    }
  }
}

}  // namespace

cudaError_t launch_block_roots(const float* exp_avg_sq, int64_t numel, const float* step, double beta2, double eps,
                               float* roots, cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most);
  if (status != cudaSuccess || numel == 0) {
    return status;
  }
  const uint32_t grid = grid_blocks(pieces_of(numel, kRootNumel), kWarps, most);
  roots_kernel<<<grid, kThreads, 0, stream>>>(exp_avg_sq, numel, step, beta2, eps, roots);
  return cudaGetLastError();
}

cudaError_t launch_predict_locally(const Prediction& operands, const Hyper& hyper, cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most);
  if (status != cudaSuccess || operands.numel == 0) {
    return status;
  }
  return with_format(operands.newest.format, [&](auto weight_format) {
    return with_format(operands.grad.format, [&](auto grad_format) {
      using Weight = decltype(weight_format);
      using Grad = decltype(grad_format);
      const auto* newest = static_cast<const typename Weight::Storage*>(operands.newest.data);
      auto* before = static_cast<typename Weight::Storage*>(operands.before.data);
      auto* live = static_cast<typename Weight::Storage*>(operands.live.data);
      const auto* grad = static_cast<const typename Grad::Storage*>(operands.grad.data);
      const int64_t blocks = operands.numel / operands.shard_numel * pieces_of(operands.shard_numel, kRootNumel);
      const bool is_aligned = operands.shard_numel % 4 == 0 && is_aligned_for_four(newest, 0) &&
                              is_aligned_for_four(before, 0) && is_aligned_for_four(live, 0) &&
                              is_aligned_for_four(grad, 0);
      predict_kernel<Weight, Grad><<<grid_blocks(blocks, kWarps, most), kThreads, 0, stream>>>(
          newest, before, live, grad, operands.roots, blocks, operands.shard_numel, is_aligned, hyper, operands.step,
          operands.grad_scale, operands.is_finite);
      return cudaGetLastError();
    });
  });
}

}  // namespace acco::cuda
