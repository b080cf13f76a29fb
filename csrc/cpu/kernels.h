// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops, without torch. Each works on elements [begin, end) of its operands; apart from the sums, which have
// fixed blocks, an element's bits depend on that element alone, so that any division over threads gives the same result.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/adamw.h"
#include "common/float16.h"
#include "common/ranges.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace acco::cpu {

// A block's outputs are made in the L1 cache and leave it in one go.
constexpr int64_t kBlock = 1024;
// From here on the output does not fit a cache that anybody reads it from soon: it goes to memory past the cache, which
// saves reading the lines that are about to be overwritten.
constexpr int64_t kStreamingBytes = int64_t{1} << 22;

inline void copy_past_cache(void* target, const void* source, int64_t bytes) {
#ifdef __SSE2__
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64);
  int64_t head = misaligned == 0 ? 0 : 64 - misaligned;
  head = head < bytes ? head : bytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) {
    for (int64_t part = 0; part < 64; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + part), value);
    }
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
#else
  std::memcpy(target, source, static_cast<size_t>(bytes));
#endif
}

// Streamed stores are ordered before whatever another thread does after it was told that this range is complete.
inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// What the loops below do to a block of at most kBlock elements. Two loops, with a root in one and a quotient in the
// other, have more elements under way at once than one loop with both, whose chain is twice as long.
constexpr int64_t kPart = 256;

struct AdamW {
  Factors factors;

  template <class Grad, class Out, bool kWritesState>
  void block(float* __restrict master, float* __restrict exp_avg, float* __restrict exp_avg_sq,
             const typename Grad::Storage* __restrict grad, typename Out::Storage* __restrict out,
             int64_t count) const {
    for (int64_t at = 0; at < count; at += kPart) {
      part<Grad, Out, kWritesState>(master + at, exp_avg + at, exp_avg_sq + at, grad + at, out + at,
                                    count - at < kPart ? count - at : kPart);
    }
  }

 private:
  template <class Grad, class Out, bool kWritesState>
  void part(float* __restrict master, float* __restrict exp_avg, float* __restrict exp_avg_sq,
            const typename Grad::Storage* __restrict grad, typename Out::Storage* __restrict out,
            int64_t count) const {
    alignas(64) float moments[kPart], denominators[kPart];
    const Factors f = factors;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Moments now = next_moments(f, Moments{exp_avg[i], exp_avg_sq[i]}, Grad::load(grad[i]));
      if (kWritesState) {
        exp_avg[i] = now.exp_avg;
        exp_avg_sq[i] = now.exp_avg_sq;
      }
      moments[i] = now.exp_avg;
      denominators[i] = denominator_of(f, now.exp_avg_sq);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float now = next_master(f, master[i], moments[i], denominators[i]);
      if (kWritesState) {
        master[i] = now;
      }
      out[i] = Out::store(now);
    }
  }
};

// For benchmarks: every operand is read and, where the round writes it, written; the bits only change places.
struct Traffic {
  template <class Grad, class Out, bool kWritesState>
  void block(float* __restrict master, float* __restrict exp_avg, float* __restrict exp_avg_sq,
             const typename Grad::Storage* __restrict grad, typename Out::Storage* __restrict out,
             int64_t count) const {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits[] = {bits_of(master[i]), bits_of(exp_avg[i]), bits_of(exp_avg_sq[i]),
                               bits_of(Grad::load(grad[i]))};
      if (kWritesState) {
        master[i] = float_of(bits[1]);
        exp_avg[i] = float_of(bits[2]);
        exp_avg_sq[i] = float_of(bits[0]);
        out[i] = Out::raw(bits[3]);
      } else {
        out[i] = Out::raw(bits[0] ^ bits[1] ^ bits[2] ^ bits[3]);
      }
    }
  }
};

// ESTIMATE passes its const state through here; without kWritesState nothing is written to it.
template <class Grad, class Out, bool kWritesState, class Arithmetic>
void update_range(const Arithmetic& arithmetic, float* master, float* exp_avg, float* exp_avg_sq,
                  const typename Grad::Storage* grad, typename Out::Storage* out, int64_t begin, int64_t end,
                  bool streams) {
  alignas(64) typename Out::Storage local[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    auto* block_out = streams ? local : out + at;
    arithmetic.template block<Grad, Out, kWritesState>(master + at, exp_avg + at, exp_avg_sq + at, grad + at, block_out,
                                                       count);
    if (streams) {
      copy_past_cache(out + at, local, count * static_cast<int64_t>(sizeof(local[0])));
    }
  }
  if (streams) {
    end_streaming();
  }
}

// target <- source * scale, each product rounded once; then source <- 0 if kClears.
template <class Source, class Target, bool kClears>
void pack_range(typename Source::Storage* __restrict source, typename Target::Storage* __restrict target, float scale,
                int64_t begin, int64_t end, bool streams) {
  alignas(64) typename Target::Storage local[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    auto* __restrict from = source + at;
    auto* __restrict to = streams ? local : target + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      to[i] = Target::store(Source::load(from[i]) * scale);
      if (kClears) {
        from[i] = 0;
      }
    }
    if (streams) {
      copy_past_cache(target + at, local, count * static_cast<int64_t>(sizeof(local[0])));
    }
  }
  if (streams) {
    end_streaming();
  }
}

// The sum of all squares is the sum, in order, of the sums of these blocks.
constexpr int64_t kSumBlock = int64_t{1} << 14;
constexpr int64_t kSumLanes = 32;

inline double sum_of_lanes(double (&lanes)[kSumLanes]) {
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

template <class Source>
double block_sum_of_squares(const typename Source::Storage* values, int64_t count) {
  double lanes[kSumLanes] = {};
  int64_t at = 0;
  for (; at + kSumLanes <= count; at += kSumLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      const double value = Source::load(values[at + lane]);
      lanes[lane] += value * value;
    }
  }
  for (int64_t lane = 0; at < count; ++at, ++lane) {
    const double value = Source::load(values[at]);
    lanes[lane] += value * value;
  }
  return sum_of_lanes(lanes);
}

// What is measured of a commit, as two sums of squares.
struct ErrorAndStep {
  double error, step;
};

template <class Live>
ErrorAndStep block_error_and_step(const StepFactors& factors, const float* master, const float* exp_avg,
                                  const float* exp_avg_sq, const typename Live::Storage* stands_at, int64_t count) {
  double errors[kSumLanes] = {}, steps[kSumLanes] = {};
  for (int64_t at = 0; at < count; at += kSumLanes) {
    const int64_t lanes = count - at < kSumLanes ? count - at : kSumLanes;
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t i = at + lane;
      const double error = Live::load(stands_at[i]) - master[i];
      const double step = moved(factors, Element{master[i], exp_avg[i], exp_avg_sq[i]});
      errors[lane] += error * error;
      steps[lane] += step * step;
    }
  }
  return {sum_of_lanes(errors), sum_of_lanes(steps)};
}

}  // namespace acco::cpu
