// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops of the quantised estimate, without torch. Each works on the records [begin, end) of its operands, which
// have `numel` elements; a record's bits depend on its elements alone, so that any division over threads gives the same
// result.
#pragma once

#include <cstdint>
#include <cstring>

#include "adamw.h"
#include "cpu_kernels.h"
#include "float16.h"
#include "quantize.h"

namespace acco::cpu {

// The record of `count` values whose largest magnitude is given.
inline void encode_record(const float* __restrict values, int32_t largest, uint8_t* __restrict record, int bits,
                          int64_t count) {
  const uint16_t scale_bits = make_scale(largest, bits);
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
      packed[i] = make_level(values[i], scale);
    }
    return;
  }
  alignas(64) uint8_t levels[kRecordNumel];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    levels[i] = make_level(values[i], scale);
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

// f(first element, its number of elements, its first byte) for every record.
template <class F>
void for_records(int64_t numel, int bits, int64_t begin, int64_t end, const F& f) {
  for (int64_t record = begin; record < end; ++record) {
    const int64_t at = record * kRecordNumel;
    f(at, record_numel(at, numel), record * record_bytes(bits));
  }
}

// records <- values * scale, each product rounded once.
template <class Source>
void quantize_range(const typename Source::Storage* values, uint8_t* records, float scale, int bits, int64_t numel,
                    int64_t begin, int64_t end) {
  alignas(64) float products[kRecordNumel];
  for_records(numel, bits, begin, end, [&](int64_t at, int64_t count, int64_t byte) {
    const auto* __restrict from = values + at;
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
      products[i] = Source::load(from[i]) * scale;
      const int32_t magnitude = magnitude_of(products[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    encode_record(products, largest, records + byte, bits, count);
  });
}

// records <- the weights after AdamW's step, in fp32, minus those that stand.
template <class Grad, class Live>
void estimate_change_range(const Factors& factors, const float* master, const float* exp_avg, const float* exp_avg_sq,
                           const typename Grad::Storage* grad, const typename Live::Storage* live, uint8_t* records,
                           int bits, int64_t numel, int64_t begin, int64_t end) {
  alignas(64) float change[kRecordNumel];
  for_records(numel, bits, begin, end, [&](int64_t at, int64_t count, int64_t byte) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
      const Element old{master[at + i], exp_avg[at + i], exp_avg_sq[at + i]};
      change[i] = adamw(factors, old, Grad::load(grad[at + i])).master - Live::load(live[at + i]);
      const int32_t magnitude = magnitude_of(change[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    encode_record(change, largest, records + byte, bits, count);
  });
}

// total <- the sum of the messages' values, in their order.
inline void dequantize_sum_range(const uint8_t* const* messages, int64_t message_count, float* total, int bits,
                                 int64_t numel, int64_t begin, int64_t end, bool streams) {
  alignas(64) float local[kRecordNumel];
  alignas(64) int8_t room[kRecordNumel];
  for_records(numel, bits, begin, end, [&](int64_t at, int64_t count, int64_t byte) {
    float* __restrict sum = streams ? local : total + at;
    for (int64_t message = 0; message < message_count; ++message) {
      const uint8_t* record = messages[message] + byte;
      const float scale = value_of_scale(load_scale(record));
      const int8_t* __restrict levels = decode_levels(record, bits, count, room);
      if (message == 0) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          sum[i] = static_cast<float>(levels[i]) * scale;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          sum[i] += static_cast<float>(levels[i]) * scale;
        }
      }
    }
    if (streams) {
      copy_past_cache(total + at, local, count * static_cast<int64_t>(sizeof(float)));
    }
  });
  if (streams) {
    end_streaming();
  }
}

// live <- live + the record's values, added in fp32 and rounded once.
template <class Live>
void add_change_range(const uint8_t* records, typename Live::Storage* live, int bits, int64_t numel, int64_t begin,
                      int64_t end) {
  alignas(64) int8_t room[kRecordNumel];
  for_records(numel, bits, begin, end, [&](int64_t at, int64_t count, int64_t byte) {
    const float scale = value_of_scale(load_scale(records + byte));
    const int8_t* __restrict levels = decode_levels(records + byte, bits, count, room);
    auto* __restrict weights = live + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = Live::store(Live::load(weights[i]) + static_cast<float>(levels[i]) * scale);
    }
  });
}

}  // namespace acco::cpu
