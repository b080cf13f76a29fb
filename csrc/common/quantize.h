// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The 4 and 8 bit format of deepspeed_acco/optim/quantization.py, once, for every kernel: blocks of 256 elements, each a
// record of its bf16 scale and its levels, of gradients those of their roots. Compile without contraction and with exact
// division and roots, so that records have the same bits on every device and path. A message begins at an even address.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/ranges.h"

namespace acco {

constexpr int64_t kRecordNumel = 256;
constexpr int64_t kScaleBytes = 2;
constexpr uint16_t kNanScale = 0x7fc0;

ACCO_HOST_DEVICE constexpr int64_t level_bytes(int64_t numel, int bits) { return bits == 8 ? numel : (numel + 1) / 2; }

ACCO_HOST_DEVICE constexpr int64_t record_bytes(int bits) { return kScaleBytes + level_bytes(kRecordNumel, bits); }

// Of a shard: its last record is as short as its block.
ACCO_HOST_DEVICE constexpr int64_t message_bytes(int64_t numel, int bits) {
  const int64_t rest = numel % kRecordNumel;
  return numel / kRecordNumel * record_bytes(bits) + (rest > 0 ? kScaleBytes + level_bytes(rest, bits) : 0);
}

// How many elements the record has that begins with element `begin`.
ACCO_HOST_DEVICE constexpr int64_t record_numel(int64_t begin, int64_t numel) {
  return numel - begin < kRecordNumel ? numel - begin : kRecordNumel;
}

// |value| as an integer: in the order of the values, infinity above every number and NaN above that.
ACCO_HOST_DEVICE inline int32_t magnitude_of(float value) { return static_cast<int32_t>(bits_of(value) & 0x7fffffffu); }

// What a level stands for: itself, or the square of itself with its sign, times the scale.
enum class Levels { kOfValues, kOfRoots };

// The scale of a block with this largest magnitude: the smallest bf16 number not below the quotient.
template <Levels kLevels>
ACCO_HOST_DEVICE inline uint16_t make_scale(int32_t largest, int bits) {
  const float last = bits == 8 ? 127.0f : 7.0f;
  const float quotient = float_of(static_cast<uint32_t>(largest)) / (kLevels == Levels::kOfRoots ? last * last : last);
  return largest >= 0x7f800000 ? kNanScale : static_cast<uint16_t>((bits_of(quotient) + 0xffffu) >> 16);
}

// Without: every level is 0.
ACCO_HOST_DEVICE inline bool has_levels(uint16_t scale) { return scale != 0 && scale != kNanScale; }

ACCO_HOST_DEVICE inline float value_of_scale(uint16_t scale) { return float_of(static_cast<uint32_t>(scale) << 16); }

// quotient, or its root with its sign, rounded to nearest, ties to even, as a byte in two's complement. Next to
// 1.5 * 2^23 there are no fractions: the adder rounds, and the sum's lowest bits are the level.
template <Levels kLevels>
ACCO_HOST_DEVICE inline uint8_t level_of_quotient(float quotient) {
  const float rounded = kLevels == Levels::kOfRoots ? copysignf(sqrtf(fabsf(quotient)), quotient) : quotient;
  return static_cast<uint8_t>(bits_of(rounded + 12582912.0f));
}

template <Levels kLevels>
ACCO_HOST_DEVICE inline uint8_t make_level(float value, float scale) {
  return level_of_quotient<kLevels>(value / scale);
}

// Whether a scale's reciprocal serves for its levels: neither it nor a remainder that matters leaves normal numbers.
ACCO_HOST_DEVICE inline bool has_reciprocal(uint16_t scale) {
  const int exponent = (scale >> 7) & 0xff;  // biased by 127
  return exponent >= 127 - 100 && exponent <= 127 + 100;
}

// The level of make_level(value, scale) without a division, where has_reciprocal; `reciprocal` is 1 / scale, rounded
// once. The remainder is exact, and what it adds to a quotient that is off by a last place gives the rounded quotient
// (Markstein, IBM J. Res. Dev. 34, 1990), but for values so small that their level is 0 anyway.
template <Levels kLevels>
ACCO_HOST_DEVICE inline uint8_t make_level(float value, float scale, float reciprocal) {
  const float near = value * reciprocal;
  const float remainder = fmaf(-near, scale, value);
  return level_of_quotient<kLevels>(fmaf(remainder, reciprocal, near));
}

// What a level stands for, in scales; exact.
template <Levels kLevels>
ACCO_HOST_DEVICE inline float scales_of_level(float level) {
  return kLevels == Levels::kOfRoots ? level * fabsf(level) : level;
}

// Two levels as one byte, and back.
ACCO_HOST_DEVICE inline uint8_t pack_levels(uint8_t even, uint8_t odd) {
  return static_cast<uint8_t>((even & 15) | (odd << 4));
}

ACCO_HOST_DEVICE inline int8_t even_level(uint8_t packed) { return static_cast<int8_t>(((packed & 15) ^ 8) - 8); }

ACCO_HOST_DEVICE inline int8_t odd_level(uint8_t packed) { return static_cast<int8_t>(((packed >> 4) ^ 8) - 8); }

// Level `place` of those that lie one after the other in `packed`, lowest bits first, as a number: its biased form
// becomes the last bits of 2^23 and more, and the difference is exact. 0 is +0.
template <int kBits>
ACCO_HOST_DEVICE inline float value_of_level(uint32_t packed, int place) {
  constexpr uint32_t kBias = 1u << (kBits - 1);
  const uint32_t biased = ((packed >> (kBits * place)) & (2 * kBias - 1)) ^ kBias;
  return float_of(0x4b000000u | biased) - (8388608.0f + static_cast<float>(kBias));
}

ACCO_HOST_DEVICE inline uint16_t load_scale(const uint8_t* record) {
  return static_cast<uint16_t>(record[0] | (record[1] << 8));
}

ACCO_HOST_DEVICE inline void store_scale(uint8_t* record, uint16_t scale) {
  record[0] = static_cast<uint8_t>(scale);
  record[1] = static_cast<uint8_t>(scale >> 8);
}

}  // namespace acco
