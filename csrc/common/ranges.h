// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// Which elements a thread handles. A shard may have more than 2^31 elements, so every index is 64-bit, and the products
// of 32-bit grid variables are widened before they are multiplied.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace acco {

// Grid-stride loops: for (i = grid_first(...); i < count; i += grid_stride(...)).
ACCO_HOST_DEVICE constexpr int64_t grid_first(uint32_t block, uint32_t threads_per_block, uint32_t thread) {
  return static_cast<int64_t>(block) * threads_per_block + thread;
}

ACCO_HOST_DEVICE constexpr int64_t grid_stride(uint32_t blocks, uint32_t threads_per_block) {
  return static_cast<int64_t>(blocks) * threads_per_block;
}

ACCO_HOST_DEVICE constexpr int64_t pieces_of(int64_t numel, int64_t piece) {
  return numel / piece + (numel % piece != 0);
}

// Enough blocks for `items` work items, at most `most`, at least one.
ACCO_HOST_DEVICE constexpr uint32_t grid_blocks(int64_t items, uint32_t threads_per_block, int64_t most) {
  const int64_t wanted = pieces_of(items, threads_per_block);
  const int64_t capped = wanted < most ? wanted : most;
  return static_cast<uint32_t>(capped < 1 ? 1 : capped);
}

// Part `index` of `numel` elements in `parts` nearly equal consecutive parts begins here, and ends where the next begins.
constexpr int64_t part_begin(int64_t numel, int64_t parts, int64_t index) {
  const int64_t rest = numel % parts;
  return numel / parts * index + (index < rest ? index : rest);
}

// numel = head + 4 * fours + tail, where four elements from `head` on may be accessed at once.
struct FourSplit {
  int64_t head, fours, tail;
};

ACCO_HOST_DEVICE constexpr FourSplit split_in_fours(uintptr_t address, int64_t element_bytes, int64_t numel) {
  const int64_t misaligned = static_cast<int64_t>(address) / element_bytes % 4;
  int64_t head = (4 - misaligned) % 4;
  head = head < numel ? head : numel;
  return {head, (numel - head) / 4, (numel - head) % 4};
}

}  // namespace acco
