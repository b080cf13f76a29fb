// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels, without torch. Compile with -fmad=false: ESTIMATE and COMMIT then give the same bits.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "common/ranges.h"

namespace acco::cuda {
namespace {

struct AdamW {
  Factors factors;
  bool is_taken;

  template <class Grad, class Out, bool kWritesState>
  __device__ void operator()(float& master, float& exp_avg, float& exp_avg_sq, typename Grad::Storage grad,
                             typename Out::Storage& out) const {
    if (is_taken) {
      const Element now = adamw(factors, Element{master, exp_avg, exp_avg_sq}, Grad::load(grad));
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

  template <class Arithmetic>
  __device__ void four(const Arithmetic& arithmetic, int64_t i) const {
    Four<float> p = load_four(master + i), m = load_four(exp_avg + i), v = load_four(exp_avg_sq + i);
    const auto g = load_four(grad + i);
    Four<typename Out::Storage> weight;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      arithmetic.template operator()<Grad, Out, kWritesState>(p.at[k], m.at[k], v.at[k], g.at[k], weight.at[k]);
    }
    if (kWritesState) {
      store_four(master + i, p);
      store_four(exp_avg + i, m);
      store_four(exp_avg_sq + i, v);
    }
    store_four(out + i, weight);
  }

  // Fours by all threads, then head and tail (all of it where nothing is aligned) one by one.
  template <class Arithmetic>
  __device__ void all(const Arithmetic& arithmetic) const {
    const int64_t first = grid_first(blockIdx.x, blockDim.x, threadIdx.x);
    const int64_t stride = grid_stride(gridDim.x, blockDim.x);
    for (int64_t i = first; i < split.fours; i += stride) {
      four(arithmetic, split.head + 4 * i);
    }
    for (int64_t i = first; i < split.head + split.tail; i += stride) {
      one(arithmetic, i < split.head ? i : i + 4 * split.fours);
    }
  }
};

template <class Grad, class Out, bool kWritesState>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(Operands<Grad, Out, kWritesState> operands, Hyper hyper, const float* step, const float* grad_scale,
                 const bool* is_finite) {
  __shared__ AdamW shared;
  if (threadIdx.x == 0) {
    shared.factors = make_factors(hyper, *step, *grad_scale);
    shared.is_taken = *is_finite;
  }
  __syncthreads();
  const AdamW arithmetic = shared;
  operands.all(arithmetic);
}

template <class Grad, class Out, bool kWritesState>
__global__ void __launch_bounds__(kThreads) traffic_kernel(Operands<Grad, Out, kWritesState> operands) {
  operands.all(Traffic{});
}

// After the kernel whose every block reads the old value.
__global__ void increment_step(float* step, const bool* is_finite) {
  if (*is_finite) {
    *step += 1.0f;
  }
}

// f(operands, blocks) with the dtypes as types.
template <bool kWritesState, class F>
cudaError_t with_operands(float* master, float* exp_avg, float* exp_avg_sq, const Inputs& inputs, MutableArray out,
                          const F& f) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, inputs.max_blocks);
  if (status != cudaSuccess) {
    return status;
  }
  return with_format(inputs.grad.format, [&](auto grad_format) {
    return with_format(out.format, [&](auto out_format) {
      using Grad = decltype(grad_format);
      using Out = decltype(out_format);
      Operands<Grad, Out, kWritesState> operands{master,
                                                 exp_avg,
                                                 exp_avg_sq,
                                                 static_cast<const typename Grad::Storage*>(inputs.grad.data),
                                                 static_cast<typename Out::Storage*>(out.data),
                                                 split_in_fours(reinterpret_cast<uintptr_t>(master), inputs.numel)};
      const int64_t head = operands.split.head;
      const bool is_aligned = is_aligned_for_four(exp_avg, head) && is_aligned_for_four(exp_avg_sq, head) &&
                              is_aligned_for_four(operands.grad, head) && is_aligned_for_four(operands.out, head);
      if (!is_aligned) {
        operands.split = {0, 0, inputs.numel};
      }
      const int64_t items = is_aligned ? operands.split.fours : inputs.numel;
      f(operands, grid_blocks(items, kThreads, most));
      return cudaGetLastError();
    });
  });
}

template <bool kWritesState>
cudaError_t launch_adamw(float* master, float* exp_avg, float* exp_avg_sq, const float* step, const Inputs& inputs,
                         MutableArray out, cudaStream_t stream) {
  if (inputs.numel == 0) {
    return cudaSuccess;
  }
  return with_operands<kWritesState>(
      master, exp_avg, exp_avg_sq, inputs, out, [&](auto operands, uint32_t blocks) {
        adamw_kernel<<<blocks, kThreads, 0, stream>>>(operands, inputs.hyper, step, inputs.grad_scale,
                                                      inputs.is_finite);
      });
}

// Chunks, threads and fours are fixed, so the order of the additions is too, whatever the alignment and the device.
constexpr int64_t kChunk = int64_t{1} << 15;

__device__ double sum_over_block(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      values[threadIdx.x] += values[threadIdx.x + half];
    }
    __syncthreads();
  }
  const double total = values[0];
  __syncthreads();  // before the next chunk overwrites them
  return total;
}

template <class Source>
__global__ void __launch_bounds__(kThreads)
    square_kernel(const typename Source::Storage* values, int64_t numel, bool is_aligned, double* sums) {
  const int64_t chunks = pieces_of(numel, kChunk);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = numel - begin < kChunk ? numel : begin + kChunk;
    double sum = 0.0;
    for (int64_t i = begin + 4 * static_cast<int64_t>(threadIdx.x); i < end; i += 4 * kThreads) {
      if (is_aligned && i + 4 <= end) {
        const auto four = load_four(values + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const double value = Source::load(four.at[k]);
          sum += value * value;
        }
      } else {
        for (int64_t k = i; k < end && k < i + 4; ++k) {
          const double value = Source::load(values[k]);
          sum += value * value;
        }
      }
    }
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) {
      sums[chunk] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* sums, int64_t count, double* total) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += sums[i];
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) {
    *total = sum;
  }
}

template <class Source, class Target>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(typename Source::Storage* source, typename Target::Storage* target, int64_t numel, int64_t fours,
                float scale, bool clears) {
  const int64_t first = grid_first(blockIdx.x, blockDim.x, threadIdx.x);
  const int64_t stride = grid_stride(gridDim.x, blockDim.x);
  for (int64_t i = first; i < fours; i += stride) {
    const auto from = load_four(source + 4 * i);
    Four<typename Target::Storage> to;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to.at[k] = Target::store(Source::load(from.at[k]) * scale);
    }
    store_four(target + 4 * i, to);
    if (clears) {
      store_four(source + 4 * i, Four<typename Source::Storage>{});
    }
  }
  for (int64_t i = 4 * fours + first; i < numel; i += stride) {
    target[i] = Target::store(Source::load(source[i]) * scale);
    if (clears) {
      source[i] = 0;
    }
  }
}

}  // namespace

cudaError_t launch_estimate(const float* master, const float* exp_avg, const float* exp_avg_sq, const float* step,
                            const Inputs& inputs, MutableArray out, cudaStream_t stream) {
  return launch_adamw<false>(const_cast<float*>(master), const_cast<float*>(exp_avg), const_cast<float*>(exp_avg_sq),
                             step, inputs, out, stream);
}

cudaError_t launch_commit(float* master, float* exp_avg, float* exp_avg_sq, float* step, const Inputs& inputs,
                          MutableArray out, cudaStream_t stream) {
  const cudaError_t status = launch_adamw<true>(master, exp_avg, exp_avg_sq, step, inputs, out, stream);
  if (status != cudaSuccess) {
    return status;
  }
  increment_step<<<1, 1, 0, stream>>>(step, inputs.is_finite);
  return cudaGetLastError();
}

cudaError_t launch_traffic(float* master, float* exp_avg, float* exp_avg_sq, const Inputs& inputs, MutableArray out,
                           bool writes_state, cudaStream_t stream) {
  if (inputs.numel == 0) {
    return cudaSuccess;
  }
  const auto launch = [&](auto operands, uint32_t blocks) {
    traffic_kernel<<<blocks, kThreads, 0, stream>>>(operands);
  };
  return writes_state ? with_operands<true>(master, exp_avg, exp_avg_sq, inputs, out, launch)
                      : with_operands<false>(master, exp_avg, exp_avg_sq, inputs, out, launch);
}

int64_t sum_blocks(int64_t numel) { return pieces_of(numel, kChunk); }

cudaError_t launch_sum_of_squares(Array values, int64_t numel, double* sums, double* total, cudaStream_t stream) {
  int64_t most = 0;
  cudaError_t status = useful_blocks(&most);
  const int64_t chunks = sum_blocks(numel);
  if (status == cudaSuccess && chunks > 0) {
    status = with_format(values.format, [&](auto format) {
      using Source = decltype(format);
      const auto* data = static_cast<const typename Source::Storage*>(values.data);
      square_kernel<Source><<<grid_blocks(chunks, 1, most), kThreads, 0, stream>>>(
          data, numel, is_aligned_for_four(data, 0), sums);
      return cudaGetLastError();
    });
  }
  if (status != cudaSuccess) {
    return status;
  }
  total_kernel<<<1, kThreads, 0, stream>>>(sums, chunks, total);
  return cudaGetLastError();
}

cudaError_t launch_pack(MutableArray grads, MutableArray packed, int64_t numel, float scale, bool clears,
                        cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most);
  if (status != cudaSuccess || numel == 0) {
    return status;
  }
  return with_format(grads.format, [&](auto source_format) {
    return with_format(packed.format, [&](auto target_format) {
      using Source = decltype(source_format);
      using Target = decltype(target_format);
      auto* source = static_cast<typename Source::Storage*>(grads.data);
      auto* target = static_cast<typename Target::Storage*>(packed.data);
      const bool is_aligned = is_aligned_for_four(source, 0) && is_aligned_for_four(target, 0);
      const int64_t fours = is_aligned ? numel / 4 : 0;
      pack_kernel<Source, Target><<<grid_blocks(is_aligned ? fours : numel, kThreads, most), kThreads, 0, stream>>>(
          source, target, numel, fours, scale, clears);
      return cudaGetLastError();
    });
  });
}

}  // namespace acco::cuda
