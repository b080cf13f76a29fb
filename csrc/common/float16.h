// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit formats on the host, as branch-free integer arithmetic that compilers vectorise on any CPU. Rounds to
// nearest, ties to even; NaN stays NaN. No floating-point operation here makes or reads an fp32 subnormal, so that a
// thread which flushes them to zero converts to the same bits.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace acco {

struct Float32 {
  using Storage = float;
  static float load(Storage value) { return value; }
  static Storage store(float value) { return value; }
  static Storage raw(uint32_t bits) { return float_of(bits); }  // any value that depends on the bits: for benchmarks
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(Storage value) { return float_of(static_cast<uint32_t>(value) << 16); }
  static Storage store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t nan = value != value ? 0xffffffffu : 0u;  // which is not rounded, and made quiet
    const uint32_t rounding = (0x7fffu + ((bits >> 16) & 1u)) & ~nan;
    return static_cast<Storage>(((bits + rounding) | (nan & 0x400000u)) >> 16);
  }
  static Storage raw(uint32_t bits) { return static_cast<Storage>(bits >> 16); }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(Storage value) {
    const uint32_t sign = (value & 0x8000u) << 16;
    const uint32_t moved = (value & 0x7fffu) << 13;
    const uint32_t exponent = moved & 0x0f800000u;
    const uint32_t normal = moved + (112u << 23);
    const uint32_t special = moved + (224u << 23);
    // Subnormal: put the fraction behind an exponent of 2^-14 and take that leading one away again.
    const uint32_t subnormal = bits_of(float_of(moved + (113u << 23)) - float_of(113u << 23));
    const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
    return float_of(sign | magnitude);
  }
  static Storage store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14: adding 0.5 lets the adder round at the subnormal's last place, 2^-24. Tiny values become 0 first.
    const float small = float_of(magnitude < 0x30800000u ? 0u : magnitude);
    const uint32_t subnormal = bits_of(small + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<Storage>(sign | (magnitude >= 0x477ff000u ? infinite : finite));
  }
  static Storage raw(uint32_t bits) { return static_cast<Storage>(bits >> 16); }
};

}  // namespace acco
