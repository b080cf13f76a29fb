// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the files of CUDA kernels share: formats, four elements at a time, grids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"
#include "common/ranges.h"
#include "cuda/launch.h"

namespace acco::cuda {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarp = 32;
constexpr int64_t kBlocksPerMultiprocessor = 8;  // 2048 resident threads

struct Float32 {
  using Storage = float;
  static __device__ float load(Storage value) { return value; }
  static __device__ Storage store(float value) { return value; }
  static __device__ Storage raw(uint32_t bits) { return __uint_as_float(bits); }
};

struct BFloat16 {
  using Storage = unsigned short;
  static __device__ float load(Storage value) { return __bfloat162float(__ushort_as_bfloat16(value)); }
  static __device__ Storage store(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static __device__ Storage raw(uint32_t bits) { return static_cast<Storage>(bits >> 16); }
};

struct Float16 {
  using Storage = unsigned short;
  static __device__ float load(Storage value) { return __half2float(__ushort_as_half(value)); }
  static __device__ Storage store(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ Storage raw(uint32_t bits) { return static_cast<Storage>(bits >> 16); }
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T at[2];
};

template <class T>
__device__ Four<T> load_four(const T* address) {
  return *reinterpret_cast<const Four<T>*>(address);
}

template <class T>
__device__ void store_four(T* address, const Four<T>& values) {
  *reinterpret_cast<Four<T>*>(address) = values;
}

// How many neighbors one access may take at this address: 4, 2 or 1.
template <class T>
ACCO_HOST_DEVICE int width_at(const T* address) {
  const uintptr_t elements = reinterpret_cast<uintptr_t>(address) / sizeof(T);
  return elements % 4 == 0 ? 4 : elements % 2 == 0 ? 2 : 1;
}

// The same where `address` and every `numel`-th element behind it are such addresses.
template <class T>
int width_of_rows(const T* address, int64_t numel) {
  const int rows = numel % 4 == 0 ? 4 : numel % 2 == 0 ? 2 : 1;
  const int first = width_at(address);
  return rows < first ? rows : first;
}

// The same where all shards begin.
template <class T>
int width_of_shards(const T* address, const Shards& shards) {
  return shards.count > 1 ? width_of_rows(address, shards.numel) : width_at(address);
}

__device__ inline int64_t place_of(const Shards& shards, int64_t shard) {
  return shards.places == nullptr ? shard : shards.places[shard];
}

// f(shard, piece) for every `stride`-th piece from `first` on, where each of `count` shards has `per_shard` of them.
template <class F>
__device__ void for_pieces_of_shards(int64_t count, int64_t per_shard, int64_t first, int64_t stride, const F& f) {
  const int64_t shards_on = stride / per_shard, pieces_on = stride % per_shard;
  int64_t shard = first / per_shard, piece = first % per_shard;
  while (shard < count) {
    f(shard, piece);
    shard += shards_on;
    piece += pieces_on;
    if (piece >= per_shard) {
      piece -= per_shard;
      ++shard;
    }
  }
}

// Kernels come twice: for operands that all have width 4, so that no branch stands between loads, and for any widths.
template <bool kIsWide>
__device__ int width_of(int any) {
  return kIsWide ? 4 : any;
}

// Four neighbors in accesses of that width.
template <class T>
__device__ Four<T> load_four(const T* address, int width) {
  if (width == 4) {
    return load_four(address);
  }
  if (width == 2) {
    const auto* twos = reinterpret_cast<const Two<T>*>(address);
    const Two<T> low = twos[0], high = twos[1];
    return {low.at[0], low.at[1], high.at[0], high.at[1]};
  }
  return {address[0], address[1], address[2], address[3]};
}

template <class T>
__device__ void store_four(T* address, int width, const Four<T>& values) {
  if (width == 4) {
    store_four(address, values);
  } else if (width == 2) {
    auto* twos = reinterpret_cast<Two<T>*>(address);
    twos[0] = {values.at[0], values.at[1]};
    twos[1] = {values.at[2], values.at[3]};
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      address[k] = values.at[k];
    }
  }
}

// f(count), with a count of kWhole as a part of the type: what is whole needs no comparisons.
template <int kWhole, class F>
__device__ void with_count(int count, const F& f) {
  if (count == kWhole) {
    f(std::integral_constant<int, kWhole>{});
  } else {
    f(count);
  }
}

// Those of four elements that lie below `count`; the others are 0.
template <class T>
__device__ Four<T> load_up_to_four(const T* block, int first, int count, int width) {
  if (first + 4 <= count) {
    return load_four(block + first, width);
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
__device__ void store_up_to_four(T* block, int first, int count, int width, const Four<T>& values) {
  if (first + 4 <= count) {
    store_four(block + first, width, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k < count) {
      block[first + k] = values.at[k];
    }
  }
}

// How `numel` elements split where fours begin at this address.
template <class T>
FourSplit split_at(const T* address, int64_t numel) {
  return split_in_fours(reinterpret_cast<uintptr_t>(address), sizeof(T), numel);
}

// How many thread blocks a kernel is given at most: those that are resident at once, or the caller's cap above 0.
inline cudaError_t useful_blocks(int64_t* blocks, int64_t cap) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *blocks = cap > 0 ? cap : multiprocessors * kBlocksPerMultiprocessor;
  return status;
}

// Fills `scalars.prepared`; where `next_step` is not null, the step is taken there, which may be in place.
cudaError_t prepare(const Scalars& scalars, float* next_step, cudaStream_t stream);

// f(std::true_type{}) or f(std::false_type{}).
template <class F>
cudaError_t with_bool(bool value, const F& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
cudaError_t with_format(Format format, const F& f) {
  switch (format) {
    case Format::kFloat32:
      return f(Float32{});
    case Format::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

}  // namespace acco::cuda
