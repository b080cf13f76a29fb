// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops of the quantised rounds, without torch. Each works on the records [begin, end) of its operands, which
// have `numel` elements; a record's bits depend on its elements alone, so that any division over threads gives the same
// result.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/adamw.h"
#include "cpu/kernels.h"
#include "common/float16.h"
#include "common/quantize.h"

namespace acco::cpu {

// The record of `count` values whose largest magnitude is given.
template <Levels kLevels>
void encode_record(const float* __restrict values, int32_t largest, uint8_t* __restrict record, int bits,
                          int64_t count) {
  const uint16_t scale_bits = make_scale<kLevels>(largest, bits);
  store_scale(record, scale_bits);
  uint8_t* __restrict packed = record + kScaleBytes;
  if (!has_levels(scale_bits)) {
    std::memset(packed, 0, static_cast<size_t>(level_bytes(count, bits)));
    return;
  }
  const float scale = value_of_scale(scale_bits);
  if (bits == 8) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      packed[i] = make_level<kLevels>(values[i], scale);
    }
    return;
  }
  alignas(64) uint8_t levels[kRecordNumel];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    levels[i] = make_level<kLevels>(values[i], scale);
  }
#pragma omp simd
  for (int64_t i = 0; i < count / 2; ++i) {
    packed[i] = pack_levels(levels[2 * i], levels[2 * i + 1]);
  }
  if (count % 2 != 0) {
    packed[count / 2] = pack_levels(levels[count - 1], 0);
  }
}

// The levels of a record: where they lie when a level is a byte, else unpacked into `room`.
inline const int8_t* decode_levels(const uint8_t* __restrict record, int bits, int64_t count,
                                   int8_t* __restrict room) {
  const uint8_t* __restrict packed = record + kScaleBytes;
  if (bits == 8) {
    return reinterpret_cast<const int8_t*>(packed);
  }
#pragma omp simd
  for (int64_t i = 0; i < count / 2; ++i) {
    room[2 * i] = even_level(packed[i]);
    room[2 * i + 1] = odd_level(packed[i]);
  }
  if (count % 2 != 0) {
    room[count - 1] = even_level(packed[count / 2]);
  }
  return room;
}

// products <- values * scale, each rounded once. Returns the largest magnitude.
template <class Source>
int32_t scale_block(const typename Source::Storage* __restrict values, float scale, float* __restrict products,
                    int64_t count) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const float product = Source::load(values[i]) * scale;
    const int32_t magnitude = magnitude_of(product);
    largest = magnitude > largest ? magnitude : largest;
    products[i] = product;
  }
  return largest;
}

// What changes are counted from: the master weights as Live has them,
template <class Live>
struct RoundedMaster {
  const float* master;
  RoundedMaster from(int64_t at) const { return {master + at}; }
  float operator[](int64_t i) const { return Live::load(Live::store(master[i])); }
};

// or weights that are given.
template <class Base>
struct GivenWeights {
  const typename Base::Storage* weights;
  GivenWeights from(int64_t at) const { return {weights + at}; }
  float operator[](int64_t i) const { return Base::load(weights[i]); }
};

// changes <- weights - base. Returns the largest magnitude.
template <class Base>
int32_t subtract_block(const float* __restrict weights, const Base base, float* __restrict changes, int64_t count) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const float change = weights[i] - base[i];
    const int32_t magnitude = magnitude_of(change);
    largest = magnitude > largest ? magnitude : largest;
    changes[i] = change;
  }
  return largest;
}

template <bool kIsFirst>
void sum_block(const int8_t* __restrict levels, float scale, float* __restrict sum, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = scales_of_level<Levels::kOfRoots>(static_cast<float>(levels[i])) * scale;
    sum[i] = kIsFirst ? value : sum[i] + value;
  }
}

template <class Live>
void add_block(const int8_t* __restrict levels, float scale, typename Live::Storage* __restrict live, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    live[i] = Live::store(Live::load(live[i]) + static_cast<float>(levels[i]) * scale);
  }
}

// records <- values * scale.
template <class Source>
void quantize_range(const typename Source::Storage* values, uint8_t* records, float scale, int bits, int64_t numel,
                    int64_t begin, int64_t end) {
  alignas(64) float products[kRecordNumel];
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    const int64_t count = record_numel(at, numel);
    const int32_t largest = scale_block<Source>(values + at, scale, products, count);
    encode_record<Levels::kOfRoots>(products, largest, records + record * record_bytes(bits), bits, count);
  }
}

// records <- how far AdamW's step goes from the base. With kWritesState the base is weights that are given: the master is
// overwritten.
template <class Grad, bool kWritesState, class Base>
void adamw_change_range(const AdamW& arithmetic, float* master, float* exp_avg, float* exp_avg_sq,
                        const typename Grad::Storage* grad, const Base& base, uint8_t* records, int bits, int64_t numel,
                        int64_t begin, int64_t end) {
  alignas(64) float weights[kRecordNumel], changes[kRecordNumel];
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    const int64_t count = record_numel(at, numel);
    arithmetic.block<Grad, Float32, kWritesState>(master + at, exp_avg + at, exp_avg_sq + at, grad + at, weights,
                                                  count);
    const int32_t largest = subtract_block(weights, base.from(at), changes, count);
    encode_record<Levels::kOfValues>(changes, largest, records + record * record_bytes(bits), bits, count);
  }
}

// records <- master - base.
template <class Base>
void change_range(const float* master, const Base& base, uint8_t* records, int bits, int64_t numel, int64_t begin,
                  int64_t end) {
  alignas(64) float changes[kRecordNumel];
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    const int64_t count = record_numel(at, numel);
    const int32_t largest = subtract_block(master + at, base.from(at), changes, count);
    encode_record<Levels::kOfValues>(changes, largest, records + record * record_bytes(bits), bits, count);
  }
}

// total <- the sum of the messages' values, in their order.
inline void dequantize_sum_range(const uint8_t* const* messages, int64_t message_count, float* total, int bits,
                                 int64_t numel, int64_t begin, int64_t end, bool streams) {
  alignas(64) float local[kRecordNumel];
  alignas(64) int8_t room[kRecordNumel];
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    const int64_t count = record_numel(at, numel);
    float* sum = streams ? local : total + at;
    for (int64_t message = 0; message < message_count; ++message) {
      const uint8_t* bytes = messages[message] + record * record_bytes(bits);
      const auto run = message == 0 ? sum_block<true> : sum_block<false>;
      run(decode_levels(bytes, bits, count, room), value_of_scale(load_scale(bytes)), sum, count);
    }
    if (streams) {
      copy_past_cache(total + at, local, count * static_cast<int64_t>(sizeof(float)));
    }
  }
  if (streams) {
    end_streaming();
  }
}

// live <- live + the records' values, added in fp32 and rounded once.
template <class Live>
void add_change_range(const uint8_t* records, typename Live::Storage* live, int bits, int64_t numel, int64_t begin,
                      int64_t end) {
  alignas(64) int8_t room[kRecordNumel];
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    const int64_t count = record_numel(at, numel);
    const uint8_t* bytes = records + record * record_bytes(bits);
    add_block<Live>(decode_levels(bytes, bits, count, room), value_of_scale(load_scale(bytes)), live + at, count);
  }
}

}  // namespace acco::cpu
