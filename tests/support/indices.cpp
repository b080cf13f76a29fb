// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The index arithmetic of csrc/ranges.h beyond 2^31 elements and beyond 2^31 grid positions, without the memory.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "common/ranges.h"

using namespace acco;

#define REQUIRE(condition)                                       \
  do {                                                           \
    if (!(condition)) {                                          \
      std::printf("line %d: %s\n", __LINE__, #condition);        \
      std::exit(1);                                              \
    }                                                            \
  } while (0)

// The last grid of CUDA: 2^31 - 1 blocks of 1024 threads.
static_assert(grid_first(2147483646u, 1024u, 1023u) == 2147483646ll * 1024 + 1023, "");
static_assert(grid_stride(2147483647u, 1024u) == 2147483647ll * 1024, "");

// Adds up, in closed form, what every thread's grid-stride loop visits: sum and count say that each index comes once.
static void check_grid(int64_t count, uint32_t blocks, uint32_t threads) {
  const int64_t stride = grid_stride(blocks, threads);
  REQUIRE(stride == static_cast<int64_t>(blocks) * threads);
  int64_t visited = 0, last = -1;
  int64_t expected_first = 0;
  for (uint32_t block = 0; block < blocks; ++block) {
    for (uint32_t thread = 0; thread < threads; ++thread) {
      const int64_t first = grid_first(block, threads, thread);
      REQUIRE(first == expected_first++);
      if (first < count) {
        const int64_t turns = (count - 1 - first) / stride + 1;
        visited += turns;
        const int64_t end = first + (turns - 1) * stride;
        last = end > last ? end : last;
      }
    }
  }
  REQUIRE(visited == count && last == count - 1);
}

int main() {
  const int64_t big = int64_t{1} << 31;
  for (const int64_t count : {big - 1, big, big + 1, 3 * big + 7, (int64_t{1} << 40) + 13}) {
    check_grid(count, 1056, 256);
    REQUIRE(grid_blocks(count, 256, 1056) == 1056);
    REQUIRE(pieces_of(count, 1 << 15) == (count + (1 << 15) - 1) >> 15);
    for (const int64_t parts : {1, 2, 3, 7, 64}) {
      REQUIRE(part_begin(count, parts, 0) == 0 && part_begin(count, parts, parts) == count);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t length = part_begin(count, parts, i + 1) - part_begin(count, parts, i);
        REQUIRE(length == count / parts || length == count / parts + 1);
      }
    }
    for (const int64_t bytes : {2, 4}) {
      for (uintptr_t address = 4096; address < 4096 + 64; address += static_cast<uintptr_t>(bytes)) {
        const FourSplit split = split_in_fours(address, bytes, count);
        REQUIRE(split.head >= 0 && split.head < 4 && split.tail >= 0 && split.tail < 4);
        REQUIRE(split.head + 4 * split.fours + split.tail == count);
        REQUIRE((static_cast<int64_t>(address) + bytes * split.head) % (4 * bytes) == 0);
        // The last element of the last four, and the first of the tail, as the kernel computes them.
        REQUIRE(split.head + 4 * (split.fours - 1) + 3 == count - split.tail - 1);
        REQUIRE(split.head + 4 * split.fours == count - split.tail);
      }
    }
  }
  for (int64_t count = 0; count < 9; ++count) {
    for (uintptr_t address = 4096; address < 4096 + 16; address += 4) {
      const FourSplit split = split_in_fours(address, 4, count);
      REQUIRE(split.head + 4 * split.fours + split.tail == count && split.fours >= 0 && split.head <= count);
    }
  }
  REQUIRE(grid_blocks(0, 256, 100) == 1 && grid_blocks(257, 256, 100) == 2 && grid_blocks(1, 256, 1) == 1);
  std::puts("indices: ok");
}
