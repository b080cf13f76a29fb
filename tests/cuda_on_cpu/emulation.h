// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of csrc/cuda use of CUDA, for a host's compiler. A block's threads are fibers of one thread of the
// system, which take turns at barriers and shuffles alone, in random order. The 16-bit types are the toolkit's own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __global__
#define __launch_bounds__(...)
// In a section of its own, which is filled with poison before every block.
#define __shared__ __attribute__((section("emulated_shared"))) static

namespace emulation {

struct Index {
  uint32_t x;
};

extern Index thread_index, block_index, block_size, grid_size;
extern int multiprocessors;  // what the device is said to have

// Every order from here on follows from the seed.
void set_seed(uint32_t seed);
int64_t launch_count();

// Runs body(kernel) on every thread. Not a std::function, which is slow to compile.
void run(const char* name, uint32_t blocks, uint32_t threads, void (*body)(const void*), const void* kernel);
void wait_at_barrier(int line);
// The value that thread `source` of this warp has brought.
uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source);

// name<<<blocks, threads, shared_bytes, stream>>>(arguments...) as build.py writes it. Ends when the kernel has.
template <class Kernel, class... Arguments>
void launch(const char* name, uint32_t blocks, uint32_t threads, size_t, cudaStream_t, const Kernel& kernel,
            const Arguments&... arguments) {
  const auto bound = [&] { kernel(arguments...); };
  run(name, blocks, threads, [](const void* it) { (*static_cast<decltype(bound)*>(it))(); }, &bound);
}

template <class T>
T exchange(uint32_t mask, T value, uint32_t source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size
#define __syncthreads() ::emulation::wait_at_barrier(__LINE__)

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t distance) {
  return ::emulation::exchange(mask, value, threadIdx.x % 32 ^ distance);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t distance) {
  const uint32_t lane = threadIdx.x % 32;
  return ::emulation::exchange(mask, value, lane + distance < 32 ? lane + distance : lane);
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
