// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels of the quantised rounds, without torch. A warp handles a record: twice, each lane four elements.
// Compile with -fmad=false, exact division and subnormals, which are nvcc's defaults: records then have the CPU's bits.
#include "common/quantize.h"

#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "common/ranges.h"

namespace acco::cuda {
namespace {

constexpr int kTurns = 2;
static_assert(kRecordNumel == kTurns * 4 * kWarp && kThreads % kWarp == 0, "");

// f(first element, its number of elements, its first byte) for every record of this warp; the number as in with_count.
template <int kBits, class F>
__device__ void for_records(int64_t numel, const F& f) {
  const int64_t records = pieces_of(numel, kRecordNumel);
  const int64_t stride = grid_stride(gridDim.x, blockDim.x) / kWarp;
  for (int64_t record = grid_first(blockIdx.x, blockDim.x, threadIdx.x) / kWarp; record < records; record += stride) {
    const int64_t at = record * kRecordNumel;
    with_count<kRecordNumel>(static_cast<int>(record_numel(at, numel)),
                             [&](auto count) { f(at, count, record * record_bytes(kBits)); });
  }
}

// The same for the records of several shards; f is also told where the elements lie, and which byte of all messages is
// the record's first.
template <int kBits, class F>
__device__ void for_records_of_shards(const Shards& shards, int64_t stride, const F& f) {
  const int64_t first = grid_first(blockIdx.x, blockDim.x, threadIdx.x) / kWarp;
  const int64_t warps = grid_stride(gridDim.x, blockDim.x) / kWarp;
  const int64_t records = pieces_of(shards.numel, kRecordNumel);
  for_pieces_of_shards(shards.count, records, first, warps, [&](int64_t shard, int64_t record) {
    const int64_t in_shard = record * kRecordNumel;
    const int64_t byte = place_of(shards, shard) * stride + record * record_bytes(kBits);
    with_count<kRecordNumel>(static_cast<int>(record_numel(in_shard, shards.numel)),
                             [&](auto count) { f(shard * shards.numel + in_shard, count, byte); });
  });
}

// The first of the lane's four elements in that turn, counted from the record's first.
__device__ int first_of_four(int turn) { return 4 * static_cast<int>(turn * kWarp + threadIdx.x % kWarp); }

// Four levels, the first in the lowest bits. A record begins at an even address, and so do four of its levels.
template <int kBits>
__device__ uint32_t load_levels(const uint8_t* record, int first, int count) {
  const uint8_t* packed = record + kScaleBytes + level_bytes(first, kBits);
  if (first + 4 <= count) {
    const auto* halves = reinterpret_cast<const uint16_t*>(packed);
    return kBits == 4 ? halves[0] : halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
  uint32_t levels = 0;
#pragma unroll
  for (int k = 0; k < kBits / 2; ++k) {
    if (first + k * (8 / kBits) < count) {
      levels |= static_cast<uint32_t>(packed[k]) << (8 * k);
    }
  }
  return levels;
}

template <int kBits>
__device__ void store_levels(uint8_t* record, int first, int count, uint32_t levels) {
  uint8_t* packed = record + kScaleBytes + level_bytes(first, kBits);
  if (first + 4 <= count) {
    auto* halves = reinterpret_cast<uint16_t*>(packed);
    halves[0] = static_cast<uint16_t>(levels);
    if (kBits == 8) {
      halves[1] = static_cast<uint16_t>(levels >> 16);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kBits / 2; ++k) {
    if (first + k * (8 / kBits) < count) {
      packed[k] = static_cast<uint8_t>(levels >> (8 * k));
    }
  }
}

__device__ float load_scale_value(const uint8_t* record) {
  return value_of_scale(*reinterpret_cast<const uint16_t*>(record));
}

__device__ int32_t max_over_warp(int32_t value) {
#pragma unroll
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The levels of the lane's elements, make(element) each, as they lie in the record.
template <int kBits, class F>
__device__ void store_all_levels(uint8_t* record, int count, const F& make) {
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    uint32_t levels = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t level = make(turn, k);
      levels |= (level & ((1u << kBits) - 1)) << (kBits * k);
    }
    store_levels<kBits>(record, first_of_four(turn), count, levels);
  }
}

// By all lanes of a warp, each with its elements of the block, which are 0 from `count` on.
template <int kBits, Levels kLevels>
__device__ void encode_record(const Four<float> (&values)[kTurns], uint8_t* record, int count) {
  int32_t largest = 0;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int32_t magnitude = magnitude_of(values[turn].at[k]);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  const uint16_t scale_bits = make_scale<kLevels>(max_over_warp(largest), kBits);
  const float scale = value_of_scale(scale_bits);
  if (threadIdx.x % kWarp == 0) {
    *reinterpret_cast<uint16_t*>(record) = scale_bits;
  }
  // The same way for all lanes.
  if (has_reciprocal(scale_bits)) {
    const float reciprocal = 1.0f / scale;
    store_all_levels<kBits>(record, count, [&](int turn, int k) {
      return make_level<kLevels>(values[turn].at[k], scale, reciprocal);
    });
  } else if (has_levels(scale_bits)) {
    store_all_levels<kBits>(record, count,
                            [&](int turn, int k) { return make_level<kLevels>(values[turn].at[k], scale); });
  } else {
    store_all_levels<kBits>(record, count, [](int, int) { return uint8_t{0}; });
  }
}

template <bool kIsWide, class Source, int kBits>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const typename Source::Storage* values, Shards shards, int64_t stride, float scale,
                    uint8_t* records) {
  for_records_of_shards<kBits>(shards, stride, [&](int64_t at, auto count, int64_t byte) {
    const int width = width_of<kIsWide>(width_at(values + at));
    Four<float> products[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const auto four = load_up_to_four(values + at, first_of_four(turn), count, width);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // What is not there stays 0, whatever the scale is.
        products[turn].at[k] = first_of_four(turn) + k < count ? Source::load(four.at[k]) * scale : 0.0f;
      }
    }
    encode_record<kBits, Levels::kOfRoots>(products, records + byte, count);
  });
}

// So many go to the kernel as arguments; more of them are added by another launch.
constexpr int kMostMessages = 64;

struct Messages {
  const uint8_t* at[kMostMessages];
  int count;
};

// sum <- sum + what the lane has of the record that begins with byte `byte`, in the order of the messages. What it has
// of `kAtOnce` of them is loaded before any of it is used.
template <int kBits, int kAtOnce>
__device__ void add_records(Four<float> (&sum)[kTurns], const Messages& messages, int64_t byte, int count) {
  for (int begin = 0; begin < messages.count; begin += kAtOnce) {
    float scales[kAtOnce];
    uint32_t levels[kAtOnce][kTurns];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i < messages.count) {
        const uint8_t* record = messages.at[begin + i] + byte;
        scales[i] = load_scale_value(record);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          levels[i][turn] = load_levels<kBits>(record, first_of_four(turn), count);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i < messages.count) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float level = value_of_level<kBits>(levels[i][turn], k);
            sum[turn].at[k] += scales_of_level<Levels::kOfRoots>(level) * scales[i];
          }
        }
      }
    }
  }
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_sum_kernel(Messages messages, float* total, int64_t numel, int width, bool adds) {
  for_records<kBits>(numel, [&](int64_t at, auto count, int64_t byte) {
    Four<float> sum[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      // -0 and a value is that value, the sign of a zero included.
      sum[turn] = adds ? load_up_to_four(total + at, first_of_four(turn), count, width)
                       : Four<float>{-0.0f, -0.0f, -0.0f, -0.0f};
    }
    add_records<kBits, std::is_same<decltype(count), int>::value ? 1 : 4>(sum, messages, byte, count);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      store_up_to_four(total + at, first_of_four(turn), count, width, sum[turn]);
    }
  });
}

// What changes are counted from: the master weights before the step as Live has them,
template <class Live>
struct RoundedMaster {
  bool is_aligned() const { return true; }

  template <bool kIsWide>
  __device__ Four<float> four(const Four<float>& master, int64_t, int, int) const {
    Four<float> rounded;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      rounded.at[k] = Live::load(Live::store(master.at[k]));
    }
    return rounded;
  }
};

// or weights that are given.
template <class Base>
struct GivenWeights {
  const typename Base::Storage* weights;
  int width;

  bool is_aligned() const { return width == 4; }

  template <bool kIsWide>
  __device__ Four<float> four(const Four<float>&, int64_t at, int first, int count) const {
    const auto stored = load_up_to_four(weights + at, first, count, width_of<kIsWide>(width));
    Four<float> loaded;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      loaded.at[k] = Base::load(stored.at[k]);
    }
    return loaded;
  }
};

// ESTIMATE's state comes through here without const; without kWritesState nothing is written to it.
template <class Grad, class Base, bool kWritesState>
struct ChangeOperands {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const typename Grad::Storage* grad;
  Base base;
  int64_t numel;
  struct {
    int master, exp_avg, exp_avg_sq, grad;
  } width;

  bool are_aligned_alike() const {
    return width.master == 4 && width.exp_avg == 4 && width.exp_avg_sq == 4 && width.grad == 4 && base.is_aligned();
  }

  // The changes of four elements by a step; where none is there it is 0, whatever the factors make of it.
  template <bool kIsWide>
  __device__ Four<float> four(const Factors& factors, int64_t at, int first, int count) const {
    auto p = load_up_to_four(master + at, first, count, width_of<kIsWide>(width.master));
    auto m = load_up_to_four(exp_avg + at, first, count, width_of<kIsWide>(width.exp_avg));
    auto v = load_up_to_four(exp_avg_sq + at, first, count, width_of<kIsWide>(width.exp_avg_sq));
    const auto g = load_up_to_four(grad + at, first, count, width_of<kIsWide>(width.grad));
    const auto from = base.template four<kIsWide>(p, at, first, count);
    Four<float> change;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Element now = adamw(factors, Element{p.at[k], m.at[k], v.at[k]}, Grad::load(g.at[k]));
      change.at[k] = first + k < count ? now.master - from.at[k] : 0.0f;
      if (kWritesState) {
        p.at[k] = now.master;
        m.at[k] = now.exp_avg;
        v.at[k] = now.exp_avg_sq;
      }
    }
    if (kWritesState) {
      store_up_to_four(master + at, first, count, width_of<kIsWide>(width.master), p);
      store_up_to_four(exp_avg + at, first, count, width_of<kIsWide>(width.exp_avg), m);
      store_up_to_four(exp_avg_sq + at, first, count, width_of<kIsWide>(width.exp_avg_sq), v);
    }
    return change;
  }

  // The same without a step; what is not there is 0 on both sides.
  template <bool kIsWide>
  __device__ Four<float> four_without_step(int64_t at, int first, int count) const {
    auto change = load_up_to_four(master + at, first, count, width_of<kIsWide>(width.master));
    const auto from = base.template four<kIsWide>(change, at, first, count);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      change.at[k] -= from.at[k];
    }
    return change;
  }
};

template <bool kIsWide, class Grad, class Base, bool kWritesState, int kBits>
__global__ void __launch_bounds__(kThreads)
    adamw_change_kernel(ChangeOperands<Grad, Base, kWritesState> operands, const Prepared* prepared, uint8_t* records) {
  const Factors factors = prepared->factors;
  const bool is_taken = prepared->is_taken;
  for_records<kBits>(operands.numel, [&](int64_t at, auto count, int64_t byte) {
    Four<float> changes[kTurns]{};
    if (is_taken) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        changes[turn] = operands.template four<kIsWide>(factors, at, first_of_four(turn), count);
      }
    } else if (kWritesState) {  // an estimate that is skipped leaves the weights as they are: 0
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        changes[turn] = operands.template four_without_step<kIsWide>(at, first_of_four(turn), count);
      }
    }
    encode_record<kBits, Levels::kOfValues>(changes, records + byte, count);
  });
}

template <bool kIsWide, class Live, int kBits>
__global__ void __launch_bounds__(kThreads)
    add_change_kernel(const uint8_t* records, const bool* is_added, typename Live::Storage* live, Shards shards,
                      int64_t stride) {
  if (!*is_added) {
    return;
  }
  for_records_of_shards<kBits>(shards, stride, [&](int64_t at, auto count, int64_t byte) {
    const int width = width_of<kIsWide>(width_at(live + at));
    const float scale = load_scale_value(records + byte);
    uint32_t levels[kTurns];
    Four<typename Live::Storage> weights[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      levels[turn] = load_levels<kBits>(records + byte, first_of_four(turn), count);
      weights[turn] = load_up_to_four(live + at, first_of_four(turn), count, width);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        typename Live::Storage& weight = weights[turn].at[k];
        weight = Live::store(Live::load(weight) + value_of_level<kBits>(levels[turn], k) * scale);
      }
      store_up_to_four(live + at, first_of_four(turn), count, width, weights[turn]);
    }
  });
}

// f(an integral constant): the number of bits becomes a part of the type.
template <class F>
cudaError_t with_bits(int bits, const F& f) {
  return bits == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 4>{});
}

// f(blocks) with enough of them for a warp per record.
template <class F>
cudaError_t with_record_grid(int64_t shards, int64_t numel, int64_t max_blocks, const F& f) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, max_blocks);
  if (status != cudaSuccess || shards == 0 || numel == 0) {
    return status;
  }
  return f(grid_blocks(shards * pieces_of(numel, kRecordNumel), kThreads / kWarp, most));
}

template <bool kWritesState>
cudaError_t launch_adamw_change(float* master, float* exp_avg, float* exp_avg_sq, float* next_step,
                                const Scalars& scalars, const Inputs& inputs, Array base, uint8_t* records, int bits,
                                cudaStream_t stream) {
  const cudaError_t status = prepare(scalars, next_step, stream);
  if (status != cudaSuccess) {
    return status;
  }
  return with_record_grid(1, inputs.numel, inputs.max_blocks, [&](uint32_t blocks) {
    return with_format(inputs.grad.format, [&](auto grad_format) {
      return with_format(base.format, [&](auto base_format) {
        return with_bits(bits, [&](auto of_level) {
          using Grad = decltype(grad_format);
          using Format = decltype(base_format);
          constexpr int kBits = decltype(of_level)::value;
          const auto launch = [&](auto counted_from) {
            using Base = decltype(counted_from);
            const auto* grad = static_cast<const typename Grad::Storage*>(inputs.grad.data);
            const ChangeOperands<Grad, Base, kWritesState> operands{
                master,
                exp_avg,
                exp_avg_sq,
                grad,
                counted_from,
                inputs.numel,
                {width_at(master), width_at(exp_avg), width_at(exp_avg_sq), width_at(grad)}};
            return with_bool(operands.are_aligned_alike(), [&](auto is_wide) {
              constexpr bool kIsWide = decltype(is_wide)::value;
              adamw_change_kernel<kIsWide, Grad, Base, kWritesState, kBits><<<blocks, kThreads, 0, stream>>>(
                  operands, scalars.prepared, records);
              return cudaGetLastError();
            });
          };
          const auto* weights = static_cast<const typename Format::Storage*>(base.data);
          if constexpr (!kWritesState) {
            if (weights == nullptr) {
              return launch(RoundedMaster<Format>{});
            }
          }
          return launch(GivenWeights<Format>{weights, width_at(weights)});
        });
      });
    });
  });
}

}  // namespace

cudaError_t launch_quantize(Array values, const Shards& shards, int64_t stride, float scale, uint8_t* records, int bits,
                            int64_t max_blocks, cudaStream_t stream) {
  return with_record_grid(shards.count, shards.numel, max_blocks, [&](uint32_t blocks) {
    return with_format(values.format, [&](auto format) {
      return with_bits(bits, [&](auto of_level) {
        using Source = decltype(format);
        constexpr int kBits = decltype(of_level)::value;
        const auto* data = static_cast<const typename Source::Storage*>(values.data);
        return with_bool(width_of_shards(data, shards) == 4, [&](auto is_wide) {
          quantize_kernel<decltype(is_wide)::value, Source, kBits><<<blocks, kThreads, 0, stream>>>(data, shards, stride,
                                                                                                    scale, records);
          return cudaGetLastError();
        });
      });
    });
  });
}

cudaError_t launch_dequantize_sum(const uint8_t* const* messages, int64_t message_count, float* total, int64_t numel,
                                  int bits, int64_t max_blocks, cudaStream_t stream) {
  return with_record_grid(1, numel, max_blocks, [&](uint32_t blocks) {
    return with_bits(bits, [&](auto of_level) {
      constexpr int kBits = decltype(of_level)::value;
      for (int64_t done = 0; done < message_count; done += kMostMessages) {
        Messages some{};
        const int64_t left = message_count - done;
        some.count = static_cast<int>(left < kMostMessages ? left : kMostMessages);
        for (int i = 0; i < some.count; ++i) {
          some.at[i] = messages[done + i];
        }
        dequantize_sum_kernel<kBits><<<blocks, kThreads, 0, stream>>>(some, total, numel, width_at(total), done > 0);
        const cudaError_t status = cudaGetLastError();
        if (status != cudaSuccess) {
          return status;
        }
      }
      return cudaSuccess;
    });
  });
}

cudaError_t launch_estimate_change(const float* master, const float* exp_avg, const float* exp_avg_sq,
                                   const Scalars& scalars, const Inputs& inputs, Array base, uint8_t* records, int bits,
                                   cudaStream_t stream) {
  return launch_adamw_change<false>(const_cast<float*>(master), const_cast<float*>(exp_avg),
                                    const_cast<float*>(exp_avg_sq), nullptr, scalars, inputs, base, records, bits,
                                    stream);
}

cudaError_t launch_commit_change(float* master, float* exp_avg, float* exp_avg_sq, float* step, const Scalars& scalars,
                                 const Inputs& inputs, Array base, uint8_t* records, int bits, cudaStream_t stream) {
  return launch_adamw_change<true>(master, exp_avg, exp_avg_sq, step, scalars, inputs, base, records, bits, stream);
}

cudaError_t launch_add_change(const uint8_t* records, const bool* is_added, MutableArray live, const Shards& shards,
                              int64_t stride, int bits, int64_t max_blocks, cudaStream_t stream) {
  return with_record_grid(shards.count, shards.numel, max_blocks, [&](uint32_t blocks) {
    return with_format(live.format, [&](auto format) {
      return with_bits(bits, [&](auto of_level) {
        using Live = decltype(format);
        constexpr int kBits = decltype(of_level)::value;
        auto* data = static_cast<typename Live::Storage*>(live.data);
        return with_bool(width_of_shards(data, shards) == 4, [&](auto is_wide) {
          add_change_kernel<decltype(is_wide)::value, Live, kBits><<<blocks, kThreads, 0, stream>>>(
              records, is_added, data, shards, stride);
          return cudaGetLastError();
        });
      });
    });
  });
}

}  // namespace acco::cuda
