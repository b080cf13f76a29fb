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

constexpr uint32_t kWarps = kThreads / kWarp;

__global__ void __launch_bounds__(kThreads)
    roots_kernel(const float* exp_avg_sq, int64_t numel, const float* step, double beta2, double eps, float* roots) {
  __shared__ double correction;
  if (threadIdx.x == 0) {
    correction = root_correction(beta2, *step);
  }
  __syncthreads();
  const uint32_t lane = threadIdx.x % kWarp;
  const int64_t blocks = pieces_of(numel, kRootNumel);
  for (int64_t block = grid_first(blockIdx.x, kWarps, threadIdx.x / kWarp); block < blocks;
       block += grid_stride(gridDim.x, kWarps)) {
    const RootBlock at = root_block(block, numel);
    double sum = 0.0;
    for (int64_t i = lane; i < at.count; i += kWarp) {
      sum += exp_avg_sq[at.begin + i];
    }
    for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, half);
    }
    if (lane == 0) {
      roots[block] = root_of(sum / static_cast<double>(at.count), correction, eps);
    }
  }
}

// `newest` and `live` may be the same, so neither is __restrict__.
template <class Weight, class Grad>
struct Arrays {
  const typename Weight::Storage* newest;
  typename Weight::Storage* before;
  typename Weight::Storage* live;
  const typename Grad::Storage* grad;
  struct {
    int newest, before, live, grad;  // of an access to fours, which begin at every fourth element of a shard
  } width;

  bool are_aligned_alike() const {
    return width.newest == 4 && width.before == 4 && width.live == 4 && width.grad == 4;
  }
};

template <bool kIsWide, class Weight, class Grad>
__global__ void __launch_bounds__(kThreads)
    predict_kernel(Arrays<Weight, Grad> arrays, const float* roots, int64_t blocks, int64_t shard_numel,
                   const PreparedLocally* prepared) {
  const LocalFactors factors = prepared->factors;
  const float grad_scale = prepared->grad_scale;
  const bool has_gradient = prepared->has_gradient;
  const uint32_t lane = threadIdx.x % kWarp;
  for (int64_t block = grid_first(blockIdx.x, kWarps, threadIdx.x / kWarp); block < blocks;
       block += grid_stride(gridDim.x, kWarps)) {
    const RootBlock at = root_block(block, shard_numel);
    const float factor = has_gradient ? block_factor(factors, grad_scale, roots[block]) : 0.0f;
    const auto one = [&](typename Weight::Storage newest_one, typename Weight::Storage before_one,
                         typename Weight::Storage live_one, typename Grad::Storage grad_one) {
      const float own = has_gradient ? Grad::load(grad_one) : 0.0f;
      return Weight::store(
          predict(factors, Weight::load(newest_one), Weight::load(before_one), Weight::load(live_one), own, factor));
    };
    if (at.count == kRootNumel) {
#pragma unroll
      for (int64_t part = 0; part < kRootNumel / (4 * kWarp); ++part) {
        const int64_t i = at.begin + 4 * (part * kWarp + lane);
        const auto kept = load_four(arrays.newest + i, width_of<kIsWide>(arrays.width.newest));
        const auto old = load_four(arrays.before + i, width_of<kIsWide>(arrays.width.before));
        const auto stood = load_four(arrays.live + i, width_of<kIsWide>(arrays.width.live));
        const auto own = load_four(arrays.grad + i, width_of<kIsWide>(arrays.width.grad));
        Four<typename Weight::Storage> out;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          out.at[k] = one(kept.at[k], old.at[k], stood.at[k], own.at[k]);
        }
        store_four(arrays.live + i, width_of<kIsWide>(arrays.width.live), out);
        store_four(arrays.before + i, width_of<kIsWide>(arrays.width.before), kept);
      }
    } else {
      for (int64_t i = at.begin + lane; i < at.begin + at.count; i += kWarp) {
        const typename Weight::Storage kept = arrays.newest[i];
        arrays.live[i] = one(kept, arrays.before[i], arrays.live[i], arrays.grad[i]);
        arrays.before[i] = kept;
      }
    }
  }
}

// What is the same for all elements, once for the launch behind this one.
__global__ void prepare_kernel(Hyper hyper, double kept, const float* step, const float* grad_scale,
                               const bool* is_finite, PreparedLocally* prepared) {
  *prepared = {make_local_factors(hyper, kept, *step), *grad_scale, *is_finite};
}

}  // namespace

cudaError_t launch_block_roots(const float* exp_avg_sq, int64_t numel, const float* step, double beta2, double eps,
                               float* roots, int64_t max_blocks, cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, max_blocks);
  if (status != cudaSuccess || numel == 0) {
    return status;
  }
  const uint32_t grid = grid_blocks(pieces_of(numel, kRootNumel), kWarps, most);
  roots_kernel<<<grid, kThreads, 0, stream>>>(exp_avg_sq, numel, step, beta2, eps, roots);
  return cudaGetLastError();
}

cudaError_t launch_predict_locally(const Prediction& operands, const Hyper& hyper, double kept,
                                   PreparedLocally* prepared, cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, operands.max_blocks);
  if (status != cudaSuccess || operands.numel == 0) {
    return status;
  }
  prepare_kernel<<<1, 1, 0, stream>>>(hyper, kept, operands.step, operands.grad_scale, operands.is_finite, prepared);
  return with_format(operands.newest.format, [&](auto weight_format) {
    return with_format(operands.grad.format, [&](auto grad_format) {
      using Weight = decltype(weight_format);
      using Grad = decltype(grad_format);
      const auto* newest = static_cast<const typename Weight::Storage*>(operands.newest.data);
      auto* before = static_cast<typename Weight::Storage*>(operands.before.data);
      auto* live = static_cast<typename Weight::Storage*>(operands.live.data);
      const auto* grad = static_cast<const typename Grad::Storage*>(operands.grad.data);
      const int64_t shard_numel = operands.shard_numel;
      const Arrays<Weight, Grad> arrays{newest,
                                        before,
                                        live,
                                        grad,
                                        {width_of_rows(newest, shard_numel), width_of_rows(before, shard_numel),
                                         width_of_rows(live, shard_numel), width_of_rows(grad, shard_numel)}};
      const int64_t blocks = operands.numel / shard_numel * pieces_of(shard_numel, kRootNumel);
      const uint32_t grid = grid_blocks(blocks, kWarps, most);
      return with_bool(arrays.are_aligned_alike(), [&](auto is_wide) {
        predict_kernel<decltype(is_wide)::value><<<grid, kThreads, 0, stream>>>(arrays, operands.roots, blocks,
                                                                                shard_numel, prepared);
        return cudaGetLastError();
      });
    });
  });
}

}  // namespace acco::cuda
