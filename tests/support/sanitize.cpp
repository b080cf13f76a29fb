// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops on heap blocks of exactly their size, so that the sanitizers see every element too many. No torch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/quantize.h"

using namespace acco;
using namespace acco::cpu;

// `count` elements that begin `shift` elements into a heap block and end with it.
template <class T>
class Exact {
 public:
  Exact(int64_t count, int64_t shift)
      : block_(static_cast<T*>(std::malloc(static_cast<size_t>(count + shift) * sizeof(T) + (count + shift == 0)))),
        shift_(shift) {
    for (int64_t i = 0; i < count + shift; ++i) {
      block_.get()[i] = T{};
    }
  }
  T* data() { return block_.get() + shift_; }

 private:
  struct Free {
    void operator()(T* block) const { std::free(block); }
  };
  std::unique_ptr<T, Free> block_;
  int64_t shift_;
};

template <class Grad, class Out>
static void run(int64_t count, int64_t shift, bool streams) {
  Exact<float> master(count, shift), exp_avg(count, 2 * shift), exp_avg_sq(count, 0);
  Exact<typename Grad::Storage> grad(count, shift);
  Exact<typename Out::Storage> estimated(count, 3 * shift), committed(count, shift), packed(count, shift);
  const float values[] = {0.5f, -1e-3f, 1e-30f, 3e38f, -0.0f, std::numeric_limits<float>::infinity(), std::nanf("")};
  for (int64_t i = 0; i < count; ++i) {
    master.data()[i] = 0.01f * static_cast<float>(i % 13);
    grad.data()[i] = Grad::store(values[i % 7]);
  }
  const AdamW arithmetic{make_factors(Hyper{1e-3, 0.9, 0.999, 1e-8, 0.01}, 4.0f, 0.5f)};
  const auto both = [&](auto writes_state, auto* out) {
    // In three unequal parts, as threads would have it.
    for (int64_t part = 0; part < 3; ++part) {
      update_range<Grad, Out, decltype(writes_state)::value>(
          arithmetic, master.data(), exp_avg.data(), exp_avg_sq.data(), grad.data(), out, part_begin(count, 3, part),
          part_begin(count, 3, part + 1), streams);
    }
  };
  both(std::false_type{}, estimated.data());
  both(std::true_type{}, committed.data());
  const size_t bytes = static_cast<size_t>(count) * sizeof(*committed.data());
  if (count > 0 && std::memcmp(estimated.data(), committed.data(), bytes)) {
    std::printf("estimate and commit differ at count %lld\n", static_cast<long long>(count));
    std::exit(1);
  }
  update_range<Grad, Out, true>(Traffic{}, master.data(), exp_avg.data(), exp_avg_sq.data(), grad.data(),
                                committed.data(), 0, count, streams);
  double sum = 0.0;
  for (int64_t at = 0; at < count; at += kSumBlock) {
    sum += block_sum_of_squares<Grad>(grad.data() + at, count - at < kSumBlock ? count - at : kSumBlock);
  }
  pack_range<Grad, Out, false>(grad.data(), packed.data(), 0.5f, 0, count, streams);
  pack_range<Grad, Out, true>(grad.data(), packed.data(), 0.5f, 0, count, streams);
  for (int64_t i = 0; i < count; ++i) {
    if (Grad::load(grad.data()[i]) != 0.0f) {
      std::printf("not cleared at %lld of %lld\n", static_cast<long long>(i), static_cast<long long>(count));
      std::exit(1);
    }
  }
}

// f(begin, end) for three unequal parts of the records, as threads would have it.
template <class F>
static void for_three_parts(int64_t count, const F& f) {
  const int64_t records = pieces_of(count, kRecordNumel);
  for (int64_t part = 0; part < 3; ++part) {
    f(part_begin(records, 3, part), part_begin(records, 3, part + 1));
  }
}

template <class Grad, class Live>
static void run_quantized(int64_t count, int64_t shift, int bits, bool streams) {
  const int64_t bytes = message_bytes(count, bits);
  Exact<float> master(count, shift), exp_avg(count, 0), exp_avg_sq(count, shift), weights(count, 0), total(count, shift);
  Exact<typename Grad::Storage> grad(count, shift);
  Exact<typename Live::Storage> live(count, 3 * shift);
  Exact<uint8_t> records(bytes, shift), expected(bytes, 0);
  const float values[] = {0.5f, -1e-3f, 1e-30f, 3e38f, -0.0f, std::numeric_limits<float>::infinity(), std::nanf("")};
  for (int64_t i = 0; i < count; ++i) {
    master.data()[i] = 0.01f * static_cast<float>(i % 13);
    grad.data()[i] = Grad::store(i % 512 < 256 ? 0.01f : values[i % 7]);
  }
  const Factors factors = make_factors(Hyper{1e-3, 0.9, 0.999, 1e-8, 0.01}, 4.0f, 0.5f);
  for_three_parts(count, [&](int64_t begin, int64_t end) {
    adamw_change_range<Grad, false>(AdamW{factors}, master.data(), exp_avg.data(), exp_avg_sq.data(), grad.data(),
                                    RoundedMaster<Live>{master.data()}, records.data(), bits, count, begin, end);
  });
  update_range<Grad, Float32, false>(AdamW{factors}, master.data(), exp_avg.data(), exp_avg_sq.data(), grad.data(),
                                     weights.data(), 0, count, false);
  for (int64_t i = 0; i < count; ++i) {
    weights.data()[i] -= Live::load(Live::store(master.data()[i]));
  }
  Exact<float> zeros(count, 0);
  change_range(weights.data(), GivenWeights<Float32>{zeros.data()}, expected.data(), bits, count, 0,
               pieces_of(count, kRecordNumel));
  if (bytes > 0 && std::memcmp(records.data(), expected.data(), static_cast<size_t>(bytes))) {
    std::printf("the change's records differ at count %lld\n", static_cast<long long>(count));
    std::exit(1);
  }
  // The master that a commit leaves, counted from given weights, has the same records as its change.
  for_three_parts(count, [&](int64_t begin, int64_t end) {
    adamw_change_range<Grad, true>(AdamW{factors}, master.data(), exp_avg.data(), exp_avg_sq.data(), grad.data(),
                                   GivenWeights<Live>{live.data()}, records.data(), bits, count, begin, end);
    change_range(master.data(), GivenWeights<Live>{live.data()}, expected.data(), bits, count, begin, end);
  });
  if (bytes > 0 && std::memcmp(records.data(), expected.data(), static_cast<size_t>(bytes))) {
    std::printf("the commit's records differ at count %lld\n", static_cast<long long>(count));
    std::exit(1);
  }
  const uint8_t* messages[] = {records.data(), expected.data(), records.data()};
  for_three_parts(count, [&](int64_t begin, int64_t end) {
    quantize_range<Grad>(grad.data(), expected.data(), 0.5f, bits, count, begin, end);
    dequantize_sum_range(messages, 3, total.data(), bits, count, begin, end, streams);
    add_change_range<Live>(records.data(), live.data(), bits, count, begin, end);
  });
}

int main() {
  for (const int64_t count : {0, 1, 2, 3, 31, 255, 256, 257, 511, 513, 4099}) {
    for (const int64_t shift : {0, 1, 3}) {
      for (const int bits : {4, 8}) {
        run_quantized<Float32, Float32>(count, shift, bits, false);
        run_quantized<BFloat16, BFloat16>(count, shift, bits, true);
        run_quantized<Float16, Float16>(count, shift, bits, true);
      }
    }
  }
  for (const int64_t count : {0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 1023, 1024, 1025, 4099, 16383, 16385, 40000}) {
    for (const int64_t shift : {0, 1, 3}) {
      for (const bool streams : {false, true}) {
        run<Float32, Float32>(count, shift, streams);
        run<Float32, BFloat16>(count, shift, streams);
        run<BFloat16, BFloat16>(count, shift, streams);
        run<BFloat16, Float16>(count, shift, streams);
        run<Float16, Float16>(count, shift, streams);
        run<Float16, Float32>(count, shift, streams);
      }
    }
  }
  std::puts("sanitize: ok");
}
