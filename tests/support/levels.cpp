// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The levels of common/quantize.h made with a reciprocal against those made with a division: all 128 fractions that a
// scale may have, at the ends and in the middle of the exponents that serve, and values from a 16th of the scale to 127
// times it, of roots to 127 times 127 times it: all within 3 places of where a level begins or ends, and every 1009th.
// With the argument 1 it is all of them at one exponent; other exponents differ by powers of two.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "common/quantize.h"

using namespace acco;

template <Levels kLevels>
static void compare(uint32_t begin, uint32_t end, uint32_t stride, float scale, float reciprocal) {
  int64_t differing = 0;
  for (uint32_t bits = begin; bits < end; bits += stride) {
    const float value = float_of(bits);
    differing += make_level<kLevels>(value, scale, reciprocal) != make_level<kLevels>(value, scale);
    differing += make_level<kLevels>(-value, scale, reciprocal) != make_level<kLevels>(-value, scale);
  }
  if (differing > 0) {
    std::printf("%lld levels differ at scale %a\n", static_cast<long long>(differing), scale);
    std::exit(1);
  }
}

template <Levels kLevels>
static void compare_all(uint32_t exponent, uint32_t fraction, uint32_t stride) {
  const bool are_roots = kLevels == Levels::kOfRoots;
  const auto scale_bits = static_cast<uint16_t>(exponent << 7 | fraction);
  const float scale = value_of_scale(scale_bits), reciprocal = 1.0f / scale;
  const uint32_t begin = bits_of(scale / 16), end = bits_of(scale * (are_roots ? 127.0f * 127.0f : 127.0f)) + 1;
  for (int half = 1; half <= 253; half += 2) {
    const float level = static_cast<float>(half) / 2;
    const uint32_t tie = bits_of(scale * (are_roots ? level * level : level));
    compare<kLevels>(tie - 3, std::min(tie + 4, end), 1, scale, reciprocal);
  }
  if (exponent == 127 || stride > 1) {
    compare<kLevels>(begin, end, stride, scale, reciprocal);
  }
  for (float tiny = scale / 16; tiny > 0; tiny /= 2) {
    if (make_level<kLevels>(tiny, scale, reciprocal) != 0 || make_level<kLevels>(-tiny, scale, reciprocal) != 0) {
      std::printf("%a at scale %a has a level\n", tiny, scale);
      std::exit(1);
    }
  }
}

int main(int argument_count, char** arguments) {
  const uint32_t stride = argument_count > 1 ? static_cast<uint32_t>(std::atoi(arguments[1])) : 1009;
  int served = 0;
  for (uint32_t scale_bits = 1; scale_bits < kNanScale; ++scale_bits) {
    served += has_reciprocal(static_cast<uint16_t>(scale_bits));
  }
  if (served != 201 * 128) {
    std::printf("a reciprocal serves for %d scales\n", served);
    return 1;
  }
  for (const uint32_t exponent : {127u - 100, 127u, 127u + 100}) {
    for (uint32_t fraction = 0; fraction < 128; ++fraction) {
      compare_all<Levels::kOfValues>(exponent, fraction, stride);
      compare_all<Levels::kOfRoots>(exponent, fraction, stride);
    }
  }
  std::puts("levels: ok");
}
