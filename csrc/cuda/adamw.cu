// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels, without torch. Compile with -fmad=false: ESTIMATE and COMMIT then give the same bits.
#include <type_traits>

#include "common/ranges.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace acco::cuda {
namespace {

struct AdamW {
  Prepared prepared;

  template <class Grad, class Out, bool kWritesState>
  __device__ void operator()(float& master, float& exp_avg, float& exp_avg_sq, typename Grad::Storage grad,
                             typename Out::Storage& out) const {
    if (prepared.is_taken) {
      const Element now = adamw(prepared.factors, Element{master, exp_avg, exp_avg_sq}, Grad::load(grad));
      master = now.master;
      exp_avg = now.exp_avg;
      exp_avg_sq = now.exp_avg_sq;
    }
    out = Out::store(master);
  }
};

struct Traffic {
  template <class Grad, class Out, bool kWritesState>
  __device__ void operator()(float& master, float& exp_avg, float& exp_avg_sq, typename Grad::Storage grad,
                             typename Out::Storage& out) const {
    const uint32_t bits[] = {__float_as_uint(master), __float_as_uint(exp_avg), __float_as_uint(exp_avg_sq),
                             __float_as_uint(Grad::load(grad))};
    master = __uint_as_float(bits[1]);
    exp_avg = __uint_as_float(bits[2]);
    exp_avg_sq = __uint_as_float(bits[0]);
    out = Out::raw(kWritesState ? bits[3] : bits[0] ^ bits[1] ^ bits[2] ^ bits[3]);
  }
};

// ESTIMATE's state comes through here without const; without kWritesState nothing is written to it.
template <class Grad, class Out, bool kWritesState>
struct Operands {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const typename Grad::Storage* grad;
  typename Out::Storage* out;
  FourSplit split;
  struct {
    int master, exp_avg, exp_avg_sq, grad, out;  // of an access to fours
  } width;

  bool are_aligned_alike() const {
    return width.exp_avg == 4 && width.exp_avg_sq == 4 && width.grad == 4 && width.out == 4;
  }

  template <class Arithmetic>
  __device__ void one(const Arithmetic& arithmetic, int64_t i) const {
    float p = master[i], m = exp_avg[i], v = exp_avg_sq[i];
    typename Out::Storage weight;
    arithmetic.template operator()<Grad, Out, kWritesState>(p, m, v, grad[i], weight);
    if (kWritesState) {
      master[i] = p;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
    }
    out[i] = weight;
  }

  template <bool kIsWide, class Arithmetic>
  __device__ void four(const Arithmetic& arithmetic, int64_t i) const {
    Four<float> p = load_four(master + i, width_of<kIsWide>(width.master));
    Four<float> m = load_four(exp_avg + i, width_of<kIsWide>(width.exp_avg));
    Four<float> v = load_four(exp_avg_sq + i, width_of<kIsWide>(width.exp_avg_sq));
    const auto g = load_four(grad + i, width_of<kIsWide>(width.grad));
    Four<typename Out::Storage> weight;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      arithmetic.template operator()<Grad, Out, kWritesState>(p.at[k], m.at[k], v.at[k], g.at[k], weight.at[k]);
    }
    if (kWritesState) {
      store_four(master + i, width_of<kIsWide>(width.master), p);
      store_four(exp_avg + i, width_of<kIsWide>(width.exp_avg), m);
      store_four(exp_avg_sq + i, width_of<kIsWide>(width.exp_avg_sq), v);
    }
    store_four(out + i, width_of<kIsWide>(width.out), weight);
  }

  // Fours by all threads, then head and tail one by one.
  template <bool kIsWide, class Arithmetic>
  __device__ void all(const Arithmetic& arithmetic) const {
    const int64_t first = grid_first(blockIdx.x, blockDim.x, threadIdx.x);
    const int64_t stride = grid_stride(gridDim.x, blockDim.x);
    for (int64_t i = first; i < split.fours; i += stride) {
      four<kIsWide>(arithmetic, split.head + 4 * i);
    }
    for (int64_t i = first; i < split.head + split.tail; i += stride) {
      one(arithmetic, i < split.head ? i : i + 4 * split.fours);
    }
  }
};

__global__ void prepare_kernel(Scalars scalars, float* next_step) {
  const bool is_taken = *scalars.is_finite;
  *scalars.prepared = {make_factors(scalars.hyper, *scalars.step, *scalars.grad_scale), is_taken};
  if (next_step != nullptr && is_taken) {
    *next_step = *scalars.step + 1.0f;
  }
}

// Where operands are not aligned alike, nvcc takes fewer registers than it may and spills for sm_80, unless it is told
// that four blocks of a multiprocessor are enough.
template <bool kIsWide, class Grad, class Out, bool kWritesState>
__global__ void __launch_bounds__(kThreads, kIsWide ? 0 : 4)
    adamw_kernel(Operands<Grad, Out, kWritesState> operands, const Prepared* prepared) {
  const AdamW arithmetic{*prepared};
  operands.template all<kIsWide>(arithmetic);
}

template <bool kIsWide, class Grad, class Out, bool kWritesState>
__global__ void __launch_bounds__(kThreads) traffic_kernel(Operands<Grad, Out, kWritesState> operands) {
  operands.template all<kIsWide>(Traffic{});
}

// f(operands, whether all are aligned alike, as a type, blocks) with the dtypes as types.
template <bool kWritesState, class F>
cudaError_t with_operands(float* master, float* exp_avg, float* exp_avg_sq, const Inputs& inputs, MutableArray out,
                          const F& f) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, inputs.max_blocks);
  if (status != cudaSuccess || inputs.numel == 0) {
    return status;
  }
  return with_format(inputs.grad.format, [&](auto grad_format) {
    return with_format(out.format, [&](auto out_format) {
      using Grad = decltype(grad_format);
      using Out = decltype(out_format);
      const auto* grad = static_cast<const typename Grad::Storage*>(inputs.grad.data);
      auto* weights = static_cast<typename Out::Storage*>(out.data);
      const FourSplit split = split_at(master, inputs.numel);
      const int64_t head = split.head;
      const Operands<Grad, Out, kWritesState> operands{
          master, exp_avg, exp_avg_sq, grad, weights, split,
          {width_at(master + head), width_at(exp_avg + head), width_at(exp_avg_sq + head), width_at(grad + head),
           width_at(weights + head)}};
      return with_bool(operands.are_aligned_alike(), [&](auto is_wide) {
        f(operands, is_wide, grid_blocks(split.fours, kThreads, most));
        return cudaGetLastError();
      });
    });
  });
}

template <bool kWritesState>
cudaError_t launch_adamw(float* master, float* exp_avg, float* exp_avg_sq, float* next_step, const Scalars& scalars,
                         const Inputs& inputs, MutableArray out, cudaStream_t stream) {
  const cudaError_t status = prepare(scalars, next_step, stream);
  if (status != cudaSuccess) {
    return status;
  }
  return with_operands<kWritesState>(
      master, exp_avg, exp_avg_sq, inputs, out, [&](const auto& operands, auto is_wide, uint32_t blocks) {
        adamw_kernel<decltype(is_wide)::value><<<blocks, kThreads, 0, stream>>>(operands, scalars.prepared);
      });
}

// Tiles, threads and fours are fixed, and the tiles of a chunk by the number of elements alone: so is the order of the
// additions, whatever the alignment, the grid and the device.
constexpr int kTurns = 4;
constexpr int kTile = kTurns * 4 * kThreads;
constexpr int kSumsOfThread = 16;
constexpr int64_t kMostChunks = kSumsOfThread * kThreads;

int64_t chunk_numel(int64_t numel) {
  const int64_t tiles = pieces_of(pieces_of(numel, kTile), kMostChunks);
  return (tiles > 1 ? tiles : 1) * kTile;
}

// The sum, in the first thread.
__device__ double sum_over_block(double value) {
  __shared__ double of_warps[kThreads / kWarp];
#pragma unroll
  for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, half);
  }
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (const double of_warp : of_warps) {
      total += of_warp;
    }
  }
  __syncthreads();  // before the next chunk overwrites them
  return total;
}

template <bool kIsWide, class Source>
__global__ void __launch_bounds__(kThreads)
    square_kernel(const typename Source::Storage* values, int64_t numel, int64_t chunk_numel, int width, double* sums) {
  const int64_t chunks = pieces_of(numel, chunk_numel);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t end = chunk + 1 < chunks ? (chunk + 1) * chunk_numel : numel;
    double sum[4] = {};
    for (int64_t tile = chunk * chunk_numel; tile < end; tile += kTile) {
      const int count = static_cast<int>(end - tile < kTile ? end - tile : kTile);
      Four<typename Source::Storage> fours[kTurns];
      const auto load = [&](auto numel_here) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          const int first = 4 * static_cast<int>(turn * kThreads + threadIdx.x);
          fours[turn] = load_up_to_four(values + tile, first, numel_here, width_of<kIsWide>(width));
        }
      };
      with_count<kTile>(count, load);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const double value = Source::load(fours[turn].at[k]);
          sum[k] = fma(value, value, sum[k]);  // the square is exact
        }
      }
    }
    const double of_chunk = sum_over_block((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (threadIdx.x == 0) {
      sums[chunk] = of_chunk;
    }
  }
}

__global__ void prepare_step_kernel(Hyper hyper, const float* step, StepFactors* prepared) {
  *prepared = make_step_factors(hyper, *step);
}

template <class Live>
struct ErrorOperands {
  const float* master;
  const float* exp_avg;
  const float* exp_avg_sq;
  const typename Live::Storage* stands_at;
  struct {
    int master, exp_avg, exp_avg_sq, stands_at;
  } width;

  bool are_aligned_alike() const {
    return width.master == 4 && width.exp_avg == 4 && width.exp_avg_sq == 4 && width.stands_at == 4;
  }
};

// The sums of the errors' squares, and behind those of all chunks those of the steps'.
template <bool kIsWide, class Live>
__global__ void __launch_bounds__(kThreads)
    error_kernel(ErrorOperands<Live> on, int64_t numel, int64_t chunk_numel, const StepFactors* prepared,
                 double* sums) {
  const StepFactors factors = *prepared;
  const int64_t chunks = pieces_of(numel, chunk_numel);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t end = chunk + 1 < chunks ? (chunk + 1) * chunk_numel : numel;
    double error = 0.0, step = 0.0;
    for (int64_t tile = chunk * chunk_numel; tile < end; tile += kTile) {
      const int count = static_cast<int>(end - tile < kTile ? end - tile : kTile);
      const auto add = [&](auto numel_here) {
#pragma unroll 2
        for (int turn = 0; turn < kTurns; ++turn) {
          const int first = 4 * static_cast<int>(turn * kThreads + threadIdx.x);
          const auto p = load_up_to_four(on.master + tile, first, numel_here, width_of<kIsWide>(on.width.master));
          const auto m = load_up_to_four(on.exp_avg + tile, first, numel_here, width_of<kIsWide>(on.width.exp_avg));
          const auto v =
              load_up_to_four(on.exp_avg_sq + tile, first, numel_here, width_of<kIsWide>(on.width.exp_avg_sq));
          const auto w =
              load_up_to_four(on.stands_at + tile, first, numel_here, width_of<kIsWide>(on.width.stands_at));
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const bool is_there = first + k < numel_here;  // with eps 0 what is not there would be 0 / 0
            const double off = Live::load(w.at[k]) - p.at[k];
            const double on_way = is_there ? moved(factors, Element{p.at[k], m.at[k], v.at[k]}) : 0.0f;
            error = fma(off, off, error);  // the square is exact
            step = fma(on_way, on_way, step);
          }
        }
      };
      with_count<kTile>(count, add);
    }
    const double error_of_chunk = sum_over_block(error), step_of_chunk = sum_over_block(step);
    if (threadIdx.x == 0) {
      sums[chunk] = error_of_chunk;
      sums[chunks + chunk] = step_of_chunk;
    }
  }
}

// Block k adds up the k-th `count` of the sums.
__global__ void __launch_bounds__(kThreads) total_kernel(const double* all_sums, int count, double* totals) {
  const double* sums = all_sums + static_cast<int64_t>(blockIdx.x) * count;
  double of_thread[kSumsOfThread];
#pragma unroll
  for (int i = 0; i < kSumsOfThread; ++i) {
    const int at = i * static_cast<int>(kThreads) + static_cast<int>(threadIdx.x);
    of_thread[i] = at < count ? sums[at] : 0.0;
  }
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kSumsOfThread; ++i) {
    sum += of_thread[i];
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) {
    totals[blockIdx.x] = sum;
  }
}

}  // namespace

cudaError_t prepare(const Scalars& scalars, float* next_step, cudaStream_t stream) {
  prepare_kernel<<<1, 1, 0, stream>>>(scalars, next_step);
  return cudaGetLastError();
}

cudaError_t launch_estimate(const float* master, const float* exp_avg, const float* exp_avg_sq, const Scalars& scalars,
                            const Inputs& inputs, MutableArray out, cudaStream_t stream) {
  return launch_adamw<false>(const_cast<float*>(master), const_cast<float*>(exp_avg), const_cast<float*>(exp_avg_sq),
                             nullptr, scalars, inputs, out, stream);
}

cudaError_t launch_commit(float* master, float* exp_avg, float* exp_avg_sq, float* step, const Scalars& scalars,
                          const Inputs& inputs, MutableArray out, cudaStream_t stream) {
  return launch_adamw<true>(master, exp_avg, exp_avg_sq, step, scalars, inputs, out, stream);
}

cudaError_t launch_traffic(float* master, float* exp_avg, float* exp_avg_sq, const Inputs& inputs, MutableArray out,
                           bool writes_state, cudaStream_t stream) {
  const auto launch = [&](const auto& operands, auto is_wide, uint32_t blocks) {
    traffic_kernel<decltype(is_wide)::value><<<blocks, kThreads, 0, stream>>>(operands);
  };
  return writes_state ? with_operands<true>(master, exp_avg, exp_avg_sq, inputs, out, launch)
                      : with_operands<false>(master, exp_avg, exp_avg_sq, inputs, out, launch);
}

int64_t sum_chunks(int64_t numel) { return pieces_of(numel, chunk_numel(numel)); }

cudaError_t launch_sum_of_squares(Array values, int64_t numel, double* sums, double* total, int64_t max_blocks,
                                  cudaStream_t stream) {
  int64_t most = 0;
  cudaError_t status = useful_blocks(&most, max_blocks);
  const int64_t chunks = sum_chunks(numel);
  if (status == cudaSuccess && chunks > 0) {
    status = with_format(values.format, [&](auto format) {
      using Source = decltype(format);
      const auto* data = static_cast<const typename Source::Storage*>(values.data);
      const int width = width_at(data);
      return with_bool(width == 4, [&](auto is_wide) {
        square_kernel<decltype(is_wide)::value, Source><<<grid_blocks(chunks, 1, most), kThreads, 0, stream>>>(
            data, numel, chunk_numel(numel), width, chunks == 1 ? total : sums);
        return cudaGetLastError();
      });
    });
  }
  if (status != cudaSuccess || chunks == 1) {
    return status;
  }
  total_kernel<<<1, kThreads, 0, stream>>>(sums, static_cast<int>(chunks), total);
  return cudaGetLastError();
}

cudaError_t launch_error_and_step(const Committed& state, const Hyper& hyper, const float* step, StepFactors* prepared,
                                  double* sums, double* totals, int64_t max_blocks, cudaStream_t stream) {
  int64_t most = 0;
  cudaError_t status = useful_blocks(&most, max_blocks);
  const int64_t chunks = sum_chunks(state.numel);
  if (status == cudaSuccess && chunks > 0) {
    prepare_step_kernel<<<1, 1, 0, stream>>>(hyper, step, prepared);
    status = with_format(state.stands_at.format, [&](auto format) {
      using Live = decltype(format);
      const auto* stands_at = static_cast<const typename Live::Storage*>(state.stands_at.data);
      const ErrorOperands<Live> operands{
          state.master,
          state.exp_avg,
          state.exp_avg_sq,
          stands_at,
          {width_at(state.master), width_at(state.exp_avg), width_at(state.exp_avg_sq), width_at(stands_at)}};
      return with_bool(operands.are_aligned_alike(), [&](auto is_wide) {
        error_kernel<decltype(is_wide)::value><<<grid_blocks(chunks, 1, most), kThreads, 0, stream>>>(
            operands, state.numel, chunk_numel(state.numel), prepared, chunks == 1 ? totals : sums);
        return cudaGetLastError();
      });
    });
  }
  if (status != cudaSuccess || chunks == 1) {
    return status;
  }
  total_kernel<<<2, kThreads, 0, stream>>>(sums, static_cast<int>(chunks), totals);
  return cudaGetLastError();
}

}  // namespace acco::cuda
