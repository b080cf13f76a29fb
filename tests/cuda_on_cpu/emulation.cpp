// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

extern "C" char __start_emulated_shared[], __stop_emulated_shared[];  // by the linker

namespace emulation {

Index thread_index, block_index, block_size, grid_size;
int multiprocessors = 2;

namespace {

constexpr size_t kStackBytes = size_t{1} << 17;  // the sanitizers' frames are large
constexpr uint32_t kWarp = 32, kMostThreads = 1024;
constexpr int kPoison = 0xff;  // NaN in every format

enum class State { kReady, kAtBarrier, kInShuffle, kEnded };

struct Fiber {
  void* registers[5];  // as __builtin_setjmp wants it
  std::unique_ptr<char[]> stack;
  ucontext_t begin;
  State state = State::kEnded;
  int line;                  // of the barrier
  uint32_t mask, source;     // of the shuffle
  uint64_t brought, gotten;  // likewise
};

std::mutex one_launch;
std::mt19937 random_source(1);
std::vector<std::unique_ptr<Fiber>> fibers;
void* scheduler[5];
Fiber* current;
const char* kernel_name;
void (*kernel_body)(const void*);
const void* kernel;
int64_t launches;
cudaError_t last_error = cudaSuccess;

[[noreturn]] void fail(uint32_t thread, const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s, block %u of %u, thread %u: %s\n", kernel_name, block_index.x, grid_size.x,
               thread, what);
  std::abort();
}

// Compile without sanitizers: they take a jump for the end of all frames that it leaves. noipa: who calls does not know
// which registers another fiber leaves alone.
[[noreturn]] __attribute__((noipa)) void jump(void** registers) { __builtin_longjmp(registers, 1); }

__attribute__((noipa)) void leave(Fiber& fiber) {
  if (__builtin_setjmp(fiber.registers) == 0) {
    jump(scheduler);
  }
}

__attribute__((noipa)) void enter(Fiber& fiber) {
  if (__builtin_setjmp(scheduler) == 0) {
    if (fiber.stack == nullptr) {
      fiber.stack.reset(new char[kStackBytes]);
      fiber.begin.uc_stack.ss_sp = fiber.stack.get();
      fiber.begin.uc_stack.ss_size = kStackBytes;
      makecontext(
          &fiber.begin,
          [] {
            for (;;) {
              kernel_body(kernel);
              current->state = State::kEnded;
              leave(*current);
            }
          },
          0);
      setcontext(&fiber.begin);
    }
    jump(fiber.registers);
  }
}

void make_fibers(uint32_t count) {
  while (fibers.size() < count) {
    fibers.push_back(std::make_unique<Fiber>());
    getcontext(&fibers.back()->begin);
  }
}

// Gives the lanes of a warp that wait in a shuffle what they wait for. Whether there are any.
bool end_shuffle(uint32_t warp, uint32_t end) {
  bool is_any = false;
  for (uint32_t thread = warp; thread < end; ++thread) {
    Fiber& fiber = *fibers[thread];
    if (fiber.state != State::kInShuffle) {
      continue;
    }
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      const Fiber* other = warp + lane < end ? fibers[warp + lane].get() : nullptr;
      const bool is_there = other != nullptr && other->state == State::kInShuffle && other->mask == fiber.mask;
      if ((fiber.mask >> lane & 1) != 0 && !is_there) {
        fail(warp + lane, "is not in a shuffle that names it");
      }
    }
    if ((fiber.mask >> (thread - warp) & 1) == 0 || (fiber.mask >> fiber.source & 1) == 0) {
      fail(thread, "is in a shuffle that does not name it, or not its source");
    }
    fiber.gotten = fibers[warp + fiber.source]->brought;
    is_any = true;
  }
  for (uint32_t thread = warp; thread < end; ++thread) {
    if (fibers[thread]->state == State::kInShuffle) {
      fibers[thread]->state = State::kReady;
    }
  }
  return is_any;
}

// Whether there was one.
bool end_barrier(uint32_t threads) {
  const auto is_waiting = [](const auto& fiber) { return fiber->state == State::kAtBarrier; };
  if (std::none_of(fibers.begin(), fibers.begin() + threads, is_waiting)) {
    return false;
  }
  for (uint32_t thread = 0; thread < threads; ++thread) {
    if (!is_waiting(fibers[thread]) || fibers[thread]->line != fibers[0]->line) {
      fail(thread, "is not at the barrier where others wait");
    }
    fibers[thread]->state = State::kReady;
  }
  return true;
}

// A warp goes on for a random number of shuffles. Whether it can go further.
bool run_warp(uint32_t warp, uint32_t end) {
  uint32_t order[kWarp];
  std::iota(order, order + (end - warp), warp);
  bool may_go_on = true;
  for (bool goes_on = true; may_go_on && goes_on; goes_on = random_source() % 8 != 0) {
    std::shuffle(order, order + (end - warp), random_source);
    for (const uint32_t* thread = order; thread < order + (end - warp); ++thread) {
      if (fibers[*thread]->state == State::kReady) {
        current = fibers[*thread].get();
        thread_index.x = *thread;
        enter(*current);
      }
    }
    may_go_on = end_shuffle(warp, end);
  }
  return may_go_on;
}

void run_block(uint32_t threads) {
  std::memset(__start_emulated_shared, kPoison, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
  for (uint32_t thread = 0; thread < threads; ++thread) {
    fibers[thread]->state = State::kReady;
  }
  std::vector<uint32_t> ready;
  do {
    for (uint32_t warp = 0; warp < threads; warp += kWarp) {
      ready.push_back(warp);
    }
    while (!ready.empty()) {
      std::swap(ready[random_source() % ready.size()], ready.back());
      if (!run_warp(ready.back(), std::min(threads, ready.back() + kWarp))) {
        ready.pop_back();
      }
    }
  } while (end_barrier(threads));
}

}  // namespace

void set_seed(uint32_t seed) { random_source.seed(seed); }

int64_t launch_count() { return launches; }

void run(const char* name, uint32_t blocks, uint32_t threads, void (*body)(const void*), const void* bound) {
  const std::lock_guard<std::mutex> guard(one_launch);
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > kMostThreads) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++launches;
  kernel_name = name;
  kernel_body = body;
  kernel = bound;
  grid_size.x = blocks;
  block_size.x = threads;
  make_fibers(threads);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_source);
  for (const uint32_t block : order) {
    block_index.x = block;
    run_block(threads);
  }
}

void wait_at_barrier(int line) {
  Fiber& fiber = *current;
  fiber.line = line;
  fiber.state = State::kAtBarrier;
  leave(fiber);
}

uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source) {
  Fiber& fiber = *current;
  fiber.mask = mask;
  fiber.source = source;
  fiber.brought = value;
  fiber.state = State::kInShuffle;
  leave(fiber);
  return fiber.gotten;
}

}  // namespace emulation

extern "C" {

int64_t emulated_launches() { return emulation::launch_count(); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
}
