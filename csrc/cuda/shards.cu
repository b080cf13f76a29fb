// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels that move all shards of a flat operand to their places in another, without torch: one launch however
// many there are. A block has a tile of one shard at a time, so that where that shard lies is found once a tile.
#include <cstdint>
#include <type_traits>

#include "common/ranges.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace acco::cuda {
namespace {

constexpr int kTurns = 2;
constexpr int kTile = kTurns * 4 * kThreads;

// f(where a tile begins in the one operand, where in the other, its number of elements) for the tiles of this block; the
// number as in with_count.
template <class F>
__device__ void for_tiles(const Shards& shards, const F& f) {
  const int64_t tiles = pieces_of(shards.numel, kTile);
  for_pieces_of_shards(shards.count, tiles, blockIdx.x, gridDim.x, [&](int64_t shard, int64_t tile) {
    const int64_t begin = tile * kTile;
    const int64_t rest = shards.numel - begin;
    with_count<kTile>(static_cast<int>(rest < kTile ? rest : kTile), [&](auto count) {
      f(shard * shards.numel + begin, place_of(shards, shard) * shards.numel + begin, count);
    });
  });
}

// The first of the thread's four elements in that turn, counted from the tile's first.
__device__ int first_of_four(int turn) { return 4 * static_cast<int>(turn * kThreads + threadIdx.x); }

template <bool kIsWide, class Source, class Target>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(typename Source::Storage* source, typename Target::Storage* target, Shards shards, float scale,
                bool clears) {
  for_tiles(shards, [&](int64_t from, int64_t to, auto count) {
    const int source_width = width_of<kIsWide>(width_at(source + from));
    const int target_width = width_of<kIsWide>(width_at(target + to));
    Four<typename Source::Storage> values[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      values[turn] = load_up_to_four(source + from, first_of_four(turn), count, source_width);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      Four<typename Target::Storage> products;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        products.at[k] = Target::store(Source::load(values[turn].at[k]) * scale);
      }
      store_up_to_four(target + to, first_of_four(turn), count, target_width, products);
      if (clears) {
        store_up_to_four(source + from, first_of_four(turn), count, source_width, Four<typename Source::Storage>{});
      }
    }
  });
}

// other <- one; and one <- other where kSwaps.
template <bool kIsWide, bool kSwaps, class Word>
__global__ void __launch_bounds__(kThreads) move_kernel(Word* one, Word* other, Shards shards) {
  for_tiles(shards, [&](int64_t from, int64_t to, auto count) {
    const int one_width = width_of<kIsWide>(width_at(one + from));
    const int other_width = width_of<kIsWide>(width_at(other + to));
    Four<Word> ones[kTurns], others[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      ones[turn] = load_up_to_four(one + from, first_of_four(turn), count, one_width);
      if (kSwaps) {
        others[turn] = load_up_to_four(other + to, first_of_four(turn), count, other_width);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      store_up_to_four(other + to, first_of_four(turn), count, other_width, ones[turn]);
      if (kSwaps) {
        store_up_to_four(one + from, first_of_four(turn), count, one_width, others[turn]);
      }
    }
  });
}

// f(blocks) with enough of them for a block per tile.
template <class F>
cudaError_t with_tile_grid(const Shards& shards, int64_t max_blocks, const F& f) {
  int64_t most = 0;
  const cudaError_t status = useful_blocks(&most, max_blocks);
  if (status != cudaSuccess || shards.count == 0 || shards.numel == 0) {
    return status;
  }
  return f(grid_blocks(shards.count * pieces_of(shards.numel, kTile), 1, most));
}

template <bool kSwaps, class Word>
cudaError_t launch_move_of(void* one, void* other, const Shards& shards, int64_t max_blocks, cudaStream_t stream) {
  auto* ones = static_cast<Word*>(one);
  auto* others = static_cast<Word*>(other);
  const bool is_aligned = width_of_shards(ones, shards) == 4 && width_of_shards(others, shards) == 4;
  return with_tile_grid(shards, max_blocks, [&](uint32_t blocks) {
    return with_bool(is_aligned, [&](auto is_wide) {
      move_kernel<decltype(is_wide)::value, kSwaps><<<blocks, kThreads, 0, stream>>>(ones, others, shards);
      return cudaGetLastError();
    });
  });
}

// In words of four bytes where all shards are whole ones, else of two, which every element has.
template <bool kSwaps>
cudaError_t launch_move(void* one, void* other, int64_t element_bytes, const Shards& shards, int64_t max_blocks,
                        cudaStream_t stream) {
  const int64_t bytes = shards.numel * element_bytes;
  const auto addresses = reinterpret_cast<uintptr_t>(one) | reinterpret_cast<uintptr_t>(other);
  const bool is_of_four = bytes % 4 == 0 && addresses % 4 == 0;
  const Shards words{shards.places, shards.count, bytes / (is_of_four ? 4 : 2)};
  return is_of_four ? launch_move_of<kSwaps, uint32_t>(one, other, words, max_blocks, stream)
                    : launch_move_of<kSwaps, uint16_t>(one, other, words, max_blocks, stream);
}

}  // namespace

cudaError_t launch_pack(MutableArray grads, MutableArray packed, const Shards& shards, float scale, bool clears,
                        int64_t max_blocks, cudaStream_t stream) {
  return with_tile_grid(shards, max_blocks, [&](uint32_t blocks) {
    return with_format(grads.format, [&](auto source_format) {
      return with_format(packed.format, [&](auto target_format) {
        using Source = decltype(source_format);
        using Target = decltype(target_format);
        auto* source = static_cast<typename Source::Storage*>(grads.data);
        auto* target = static_cast<typename Target::Storage*>(packed.data);
        const bool is_aligned = width_of_shards(source, shards) == 4 && width_of_shards(target, shards) == 4;
        return with_bool(is_aligned, [&](auto is_wide) {
          pack_kernel<decltype(is_wide)::value, Source, Target><<<blocks, kThreads, 0, stream>>>(source, target, shards,
                                                                                                 scale, clears);
          return cudaGetLastError();
        });
      });
    });
  });
}

cudaError_t launch_copy_shards(const void* source, void* target, int64_t element_bytes, const Shards& shards,
                               int64_t max_blocks, cudaStream_t stream) {
  return launch_move<false>(const_cast<void*>(source), target, element_bytes, shards, max_blocks, stream);
}

cudaError_t launch_swap_shards(void* one, void* other, int64_t element_bytes, const Shards& shards, int64_t max_blocks,
                               cudaStream_t stream) {
  return launch_move<true>(one, other, element_bytes, shards, max_blocks, stream);
}

}  // namespace acco::cuda
