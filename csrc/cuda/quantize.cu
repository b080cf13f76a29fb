// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels of the quantised estimate, without torch. A warp handles a record: twice, each lane four elements.
// Compile with -fmad=false, exact division and subnormals, which are nvcc's defaults: records then have the CPU's bits.
#include "common/quantize.h"

#include "cuda/device.h"
#include "cuda/launch.h"
#include "common/ranges.h"

namespace acco::cuda {
namespace {

constexpr uint32_t kWarp = 32;
constexpr int kTurns = 2;
static_assert(kRecordNumel == kTurns * 4 * kWarp && kThreads % kWarp == 0, "");

// f(first element, its number of elements, its first byte) for every record of this warp.
template <class F>
__device__ void for_records(int64_t numel, int bits, const F& f) {
  const int64_t records = pieces_of(numel, kRecordNumel);
  const int64_t stride = grid_stride(gridDim.x, blockDim.x) / kWarp;
  for (int64_t record = grid_first(blockIdx.x, blockDim.x, threadIdx.x) / kWarp; record < records; record += stride) {
    const int64_t at = record * kRecordNumel;
    f(at, static_cast<int>(record_numel(at, numel)), record * record_bytes(bits));
  }
}

// The first of the lane's four elements in that turn, counted from the record's first.
__device__ int first_of_four(int turn) { return 4 * static_cast<int>(turn * kWarp + threadIdx.x % kWarp); }

// Those of four elements that lie below `count`; the others are 0.
template <class T>
__device__ Four<T> load_up_to_four(const T* block, int first, int count, bool is_aligned) {
  if (is_aligned && first + 4 <= count) {
    return load_four(block + first);
  }
  Four<T> values{};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k < count) {
      values.at[k] = block[first + k];
    }
  }
  return values;
}

template <class T>
__device__ void store_up_to_four(T* block, int first, int count, bool is_aligned, const Four<T>& values) {
  if (is_aligned && first + 4 <= count) {
    store_four(block + first, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k < count) {
      block[first + k] = values.at[k];
    }
  }
}

__device__ int32_t max_over_warp(int32_t value) {
#pragma unroll
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// By all lanes of a warp, each with its elements of the block, which are 0 from `count` on.
__device__ void encode_record(const Four<float> (&values)[kTurns], uint8_t* record, int bits, int count) {
  int32_t largest = 0;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int32_t magnitude = magnitude_of(values[turn].at[k]);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  const uint16_t scale_bits = make_scale(max_over_warp(largest), bits);
  const float scale = value_of_scale(scale_bits);
  const bool is_zero = !has_levels(scale_bits);
  if (threadIdx.x % kWarp == 0) {
    store_scale(record, scale_bits);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int first = first_of_four(turn);
    uint8_t levels[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      levels[k] = is_zero ? uint8_t{0} : make_level(values[turn].at[k], scale);
    }
    uint8_t* packed = record + kScaleBytes + level_bytes(first, bits);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (bits == 8 && first + k < count) {
        packed[k] = levels[k];
      } else if (bits == 4 && k % 2 == 0 && first + k < count) {
        packed[k / 2] = pack_levels(levels[k], levels[k + 1]);
      }
    }
  }
}

// Those of the record's values that begin with `first` and lie below `count`; the others are 0.
__device__ Four<float> decode_four(const uint8_t* record, int bits, int first, int count) {
  const float scale = value_of_scale(load_scale(record));
  const uint8_t* packed = record + kScaleBytes + level_bytes(first, bits);
  Four<float> values{};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k < count) {
      const int8_t level = bits == 8    ? static_cast<int8_t>(packed[k])
                           : k % 2 == 0 ? even_level(packed[k / 2])
                                        : odd_level(packed[k / 2]);
      values.at[k] = static_cast<float>(level) * scale;
    }
  }
  return values;
}

template <class Source>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const typename Source::Storage* values, int64_t numel, bool is_aligned, float scale,
                    uint8_t* records, int bits) {
  for_records(numel, bits, [&](int64_t at, int count, int64_t byte) {
    Four<float> products[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const auto four = load_up_to_four(values + at, first_of_four(turn), count, is_aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // What is not there stays 0, whatever the scale is.
        products[turn].at[k] = first_of_four(turn) + k < count ? Source::load(four.at[k]) * scale : 0.0f;
      }
    }
    encode_record(products, records + byte, bits, count);
  });
}

// So many go to the kernel as arguments; more of them are added by another launch.
constexpr int kMostMessages = 64;

struct Messages {
  const uint8_t* at[kMostMessages];
  int count;
};

__global__ void __launch_bounds__(kThreads)
    dequantize_sum_kernel(Messages messages, float* total, int64_t numel, bool is_aligned, int bits, bool adds) {
  for_records(numel, bits, [&](int64_t at, int count, int64_t byte) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int first = first_of_four(turn);
      Four<float> sum = adds ? load_up_to_four(total + at, first, count, is_aligned)
                             : decode_four(messages.at[0] + byte, bits, first, count);
      for (int message = adds ? 0 : 1; message < messages.count; ++message) {
        const Four<float> values = decode_four(messages.at[message] + byte, bits, first, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum.at[k] += values.at[k];
        }
      }
      store_up_to_four(total + at, first, count, is_aligned, sum);
    }
  });
}

template <class Grad, class Live>
struct ChangeOperands {
  const float* master;
  const float* exp_avg;
  const float* exp_avg_sq;
  const typename Grad::Storage* grad;
  const typename Live::Storage* live;
  int64_t numel;
  bool is_aligned;

  __device__ Four<float> four(const Factors& factors, int64_t at, int first, int count) const {
    const auto p = load_up_to_four(master + at, first, count, is_aligned);
    const auto m = load_up_to_four(exp_avg + at, first, count, is_aligned);
    const auto v = load_up_to_four(exp_avg_sq + at, first, count, is_aligned);
    const auto g = load_up_to_four(grad + at, first, count, is_aligned);
    const auto w = load_up_to_four(live + at, first, count, is_aligned);
    Four<float> change;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Element now = adamw(factors, Element{p.at[k], m.at[k], v.at[k]}, Grad::load(g.at[k]));
      // What is not there stays 0, whatever the factors make of it.
      change.at[k] = first + k < count ? now.master - Live::load(w.at[k]) : 0.0f;
    }
    return change;
  }
};

template <class Grad, class Live>
__global__ void __launch_bounds__(kThreads)
    estimate_change_kernel(ChangeOperands<Grad, Live> operands, Hyper hyper, const float* step,
                           const float* grad_scale, const bool* is_finite, uint8_t* records, int bits) {
  __shared__ Factors shared;
  if (threadIdx.x == 0) {
    shared = make_factors(hyper, *step, *grad_scale);
  }
  __syncthreads();
  const Factors factors = shared;
  const bool is_taken = *is_finite;
  for_records(operands.numel, bits, [&](int64_t at, int count, int64_t byte) {
    Four<float> changes[kTurns]{};
    if (is_taken) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        changes[turn] = operands.four(factors, at, first_of_four(turn), count);
      }
    }
    encode_record(changes, records + byte, bits, count);
  });
}

template <class Live>
__global__ void __launch_bounds__(kThreads)
    add_change_kernel(const uint8_t* records, const bool* is_added, typename Live::Storage* live, int64_t numel,
                      bool is_aligned, int bits) {
  if (!*is_added) {
    return;
  }
  for_records(numel, bits, [&](int64_t at, int count, int64_t byte) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int first = first_of_four(turn);
      auto weights = load_up_to_four(live + at, first, count, is_aligned);
      const Four<float> values = decode_four(records + byte, bits, first, count);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        weights.at[k] = Live::store(Live::load(weights.at[k]) + values.at[k]);
      }
      store_up_to_four(live + at, first, count, is_aligned, weights);
    }
  });
}

// f(blocks) with enough of them for a warp per record.
template <class F>
cudaError_t with_record_grid(int64_t numel, int64_t max_blocks, const F& f) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, max_blocks);
  if (status != cudaSuccess || numel == 0) {
    return status;
  }
  return f(grid_blocks(pieces_of(numel, kRecordNumel), kThreads / kWarp, most));
}

}  // namespace

cudaError_t launch_quantize(Array values, int64_t numel, float scale, uint8_t* records, int bits, cudaStream_t stream) {
  return with_record_grid(numel, 0, [&](uint32_t blocks) {
    return with_format(values.format, [&](auto format) {
      using Source = decltype(format);
      const auto* data = static_cast<const typename Source::Storage*>(values.data);
      quantize_kernel<Source><<<blocks, kThreads, 0, stream>>>(data, numel, is_aligned_for_four(data, 0), scale,
                                                               records, bits);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_dequantize_sum(const uint8_t* const* messages, int64_t message_count, float* total, int64_t numel,
                                  int bits, cudaStream_t stream) {
  return with_record_grid(numel, 0, [&](uint32_t blocks) {
    for (int64_t done = 0; done < message_count; done += kMostMessages) {
      Messages some{};
      const int64_t left = message_count - done;
      some.count = static_cast<int>(left < kMostMessages ? left : kMostMessages);
      for (int i = 0; i < some.count; ++i) {
        some.at[i] = messages[done + i];
      }
      dequantize_sum_kernel<<<blocks, kThreads, 0, stream>>>(some, total, numel, is_aligned_for_four(total, 0), bits,
                                                             done > 0);
      const cudaError_t status = cudaGetLastError();
      if (status != cudaSuccess) {
        return status;
      }
    }
    return cudaSuccess;
  });
}

cudaError_t launch_estimate_change(const float* master, const float* exp_avg, const float* exp_avg_sq,
                                   const float* step, const Inputs& inputs, Array live, uint8_t* records, int bits,
                                   cudaStream_t stream) {
  return with_record_grid(inputs.numel, inputs.max_blocks, [&](uint32_t blocks) {
    return with_format(inputs.grad.format, [&](auto grad_format) {
      return with_format(live.format, [&](auto live_format) {
        using Grad = decltype(grad_format);
        using Live = decltype(live_format);
        ChangeOperands<Grad, Live> operands{master,
                                            exp_avg,
                                            exp_avg_sq,
                                            static_cast<const typename Grad::Storage*>(inputs.grad.data),
                                            static_cast<const typename Live::Storage*>(live.data),
                                            inputs.numel,
                                            false};
        operands.is_aligned = is_aligned_for_four(master, 0) && is_aligned_for_four(exp_avg, 0) &&
                              is_aligned_for_four(exp_avg_sq, 0) && is_aligned_for_four(operands.grad, 0) &&
                              is_aligned_for_four(operands.live, 0);
        estimate_change_kernel<Grad, Live><<<blocks, kThreads, 0, stream>>>(
            operands, inputs.hyper, step, inputs.grad_scale, inputs.is_finite, records, bits);
        return cudaGetLastError();
      });
    });
  });
}

cudaError_t launch_add_change(const uint8_t* records, const bool* is_added, MutableArray live, int64_t numel, int bits,
                              cudaStream_t stream) {
  return with_record_grid(numel, 0, [&](uint32_t blocks) {
    return with_format(live.format, [&](auto format) {
      using Live = decltype(format);
      auto* data = static_cast<typename Live::Storage*>(live.data);
      add_change_kernel<Live><<<blocks, kThreads, 0, stream>>>(records, is_added, data, numel,
                                                               is_aligned_for_four(data, 0), bits);
      return cudaGetLastError();
    });
  });
}

}  // namespace acco::cuda
