// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// Launches every kernel of csrc/cuda, emulated and under the sanitizers, on operands of random sizes, types, addresses
// and values, and compares every bit of them with loops over the arithmetic of csrc/common. No torch.
//
// program SEED CASES [large]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common/adamw.h"
#include "common/float16.h"
#include "common/local_prediction.h"
#include "cuda/launch.h"
#include "emulation.h"

using namespace acco;
using namespace acco::cuda;

namespace {

std::mt19937 random_source;
std::string in_hand;  // of which case and launch an error speaks
std::map<std::string, int64_t> done;

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s: %s\n", in_hand.c_str(), what.c_str());
  std::exit(1);
}

void require(cudaError_t status) {
  if (status != cudaSuccess) {
    fail("error " + std::to_string(status));
  }
}

int64_t below(int64_t count) { return static_cast<int64_t>(random_source() % static_cast<uint32_t>(count)); }

template <class T>
T one_of(const std::vector<T>& values) {
  return values[static_cast<size_t>(below(static_cast<int64_t>(values.size())))];
}

Format any_format() { return one_of<Format>({Format::kFloat32, Format::kBFloat16, Format::kFloat16}); }

// ---- operands

// Elements of `width` bytes in a heap block that ends with them, `shift` elements behind its begin; and what they must
// be after the launch, which is what they are before it unless it is said.
class Bytes {
 public:
  Bytes(const char* name, size_t width, int64_t count, int64_t shift)
      : name_(name), lead_(static_cast<size_t>(shift) * width), size_(static_cast<size_t>(count) * width) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, lead_ + size_) != 0) {
      fail("no memory");
    }
    block_.reset(static_cast<uint8_t*>(block));
    std::memset(block_.get(), kCanary, lead_ + size_);
    expected.resize(size_, kCanary);
  }

  uint8_t* data() const { return block_.get() + lead_; }

  // What now stands there is what must stand there.
  void keep() { expected.assign(data(), data() + size_); }

  template <class SameBits>
  void check(size_t width, const SameBits& is_same) const {
    for (size_t at = 0; at < lead_; ++at) {
      if (block_.get()[at] != kCanary) {
        fail("wrote before " + name_);
      }
    }
    for (size_t at = 0; at < size_; at += width) {
      if (!is_same(data() + at, expected.data() + at)) {
        fail(name_ + " is wrong at element " + std::to_string(at / width));
      }
    }
  }

  std::vector<uint8_t> expected;

 private:
  static constexpr uint8_t kCanary = 0xa5;
  struct Free {
    void operator()(uint8_t* block) const { std::free(block); }
  };
  std::string name_;
  size_t lead_, size_;
  std::unique_ptr<uint8_t, Free> block_;
};

float load(Format format, const uint8_t* from, int64_t i) {
  if (format == Format::kFloat32) {
    float value;
    std::memcpy(&value, from + 4 * i, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from + 2 * i, sizeof(bits));
  return format == Format::kBFloat16 ? BFloat16::load(bits) : Float16::load(bits);
}

void store(Format format, uint8_t* to, int64_t i, float value) {
  if (format == Format::kFloat32) {
    std::memcpy(to + 4 * i, &value, sizeof(value));
    return;
  }
  const uint16_t bits = format == Format::kBFloat16 ? BFloat16::store(value) : Float16::store(value);
  std::memcpy(to + 2 * i, &bits, sizeof(bits));
}

class Floats {
 public:
  Floats(const char* name, Format format, int64_t count, int64_t shift)
      : format(format), width_(format == Format::kFloat32 ? 4 : 2), count_(count), bytes_(name, width_, count, shift) {}

  // Mostly ordinary numbers; in every fourth block of 256 bits as they come, in every other fourth zeros.
  void fill(float size, bool is_positive = false) {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t kind = (i / 256 + count_) % 4;
      float value = size * (static_cast<float>(below(20001)) - 10000.0f) * 1e-4f;
      value = kind == 1 && below(2) ? float_of(static_cast<uint32_t>(random_source()))
              : kind == 3           ? 0.0f * value
                                    : value;
      set(i, is_positive ? std::fabs(value) : value);
    }
  }
  void set(int64_t i, float value) {
    store(format, bytes_.data(), i, value);
    store(format, bytes_.expected.data(), i, value);
  }
  float operator[](int64_t i) const { return load(format, bytes_.data(), i); }
  void expect(int64_t i, float value) { store(format, bytes_.expected.data(), i, value); }
  void check() const {
    bytes_.check(width_, [&](const uint8_t* is, const uint8_t* should) {
      return std::memcmp(is, should, width_) == 0 ||
             (std::isnan(load(format, is, 0)) && std::isnan(load(format, should, 0)));
    });
  }
  void* data() const { return bytes_.data(); }
  float* fp32() const { return reinterpret_cast<float*>(bytes_.data()); }
  Array read() const { return {bytes_.data(), format}; }
  MutableArray write() const { return {bytes_.data(), format}; }

  const Format format;

 private:
  size_t width_;
  int64_t count_;
  Bytes bytes_;
};

class Records {
 public:
  // With a `stride` of the messages of `shards`, with bytes of nobody behind each.
  Records(const char* name, int64_t numel, int bits, int64_t shift, int64_t shards = 1)
      : stride_(message_numel(numel, bits) + (shards > 1 ? message_numel(numel, bits) % 2 + 2 * below(8) : 0)),
        bytes_(name, 1, shards * stride_, shift) {}

  int64_t stride() const { return stride_; }
  // The records of a shard as deepspeed_acco/optim/quantization.py describes them.
  void expect(const std::vector<float>& values, int bits, int64_t place = 0, bool of_roots = false) {
    uint8_t* record = bytes_.expected.data() + place * stride_;
    for (size_t begin = 0; begin < values.size(); begin += 256) {
      const size_t count = std::min<size_t>(256, values.size() - begin);
      record = encode(values.data() + begin, count, bits, of_roots, record);
    }
  }
  void expect_zeros() { std::fill(bytes_.expected.begin(), bytes_.expected.end(), uint8_t{0}); }
  void fill_at_random() {
    for (size_t at = 0; at < bytes_.expected.size(); ++at) {
      data()[at] = static_cast<uint8_t>(random_source());
    }
    keep();
  }
  void take_expected() { std::copy(bytes_.expected.begin(), bytes_.expected.end(), data()); }
  void keep() { bytes_.keep(); }
  float value(int64_t i, int bits, int64_t place = 0, bool of_roots = false) const {
    const uint8_t* record = data() + place * stride_ + i / 256 * (bits == 8 ? 258 : 130);
    const int64_t at = i % 256;
    const uint8_t byte = record[2 + (bits == 8 ? at : at / 2)];
    const int nibble = at % 2 == 0 ? byte & 15 : byte >> 4;
    const int level = bits == 8 ? static_cast<int8_t>(byte) : nibble < 8 ? nibble : nibble - 16;
    return static_cast<float>(of_roots ? level * std::abs(level) : level) * BFloat16::load(static_cast<uint16_t>(record[0] | record[1] << 8));
  }
  void check() const {
    bytes_.check(1, [](const uint8_t* is, const uint8_t* should) { return *is == *should; });
  }
  uint8_t* data() const { return bytes_.data(); }

 private:
  static int64_t message_numel(int64_t numel, int bits) {
    const int64_t rest = numel % 256;
    return numel / 256 * (bits == 8 ? 258 : 130) + (rest == 0 ? 0 : 2 + (bits == 8 ? rest : (rest + 1) / 2));
  }
  static uint8_t* encode(const float* values, size_t count, int bits, bool of_roots, uint8_t* record) {
    float largest = 0.0f;
    bool is_finite = true;
    for (size_t i = 0; i < count; ++i) {
      largest = std::fmax(largest, std::fabs(values[i]));
      is_finite = is_finite && std::isfinite(values[i]);
    }
    const float last = bits == 8 ? 127.0f : 7.0f;
    const uint32_t quotient = bits_of(largest / (of_roots ? last * last : last));
    const uint32_t scale_bits = is_finite ? (quotient >> 16) + ((quotient & 0xffffu) != 0) : 0x7fc0u;
    const float scale = float_of(scale_bits << 16);
    *record++ = static_cast<uint8_t>(scale_bits);
    *record++ = static_cast<uint8_t>(scale_bits >> 8);
    for (size_t i = 0; i < count; ++i) {
      float level = is_finite && scale > 0.0f ? values[i] / scale : 0.0f;
      level = std::nearbyint(of_roots ? std::copysign(std::sqrt(std::fabs(level)), level) : level);
      const auto byte = static_cast<uint8_t>(static_cast<int>(level));
      if (bits == 8) {
        *record++ = byte;
      } else if (i % 2 == 0) {
        *record = byte & 15;
      } else {
        *record++ |= static_cast<uint8_t>(byte << 4);
      }
    }
    return record + (bits == 4 && count % 2 == 1);
  }

  int64_t stride_;
  Bytes bytes_;
};

// ---- cases

// Where operands begin: all at a vector's address, all the same distance behind one, each at its own, or most of them
// at a vector's.
struct Shifts {
  int kind = static_cast<int>(below(4));
  int64_t same = 1 + below(7);
  int64_t next() const { return kind == 1 ? same : kind == 2 || (kind == 3 && below(4) == 0) ? below(9) : 0; }
};

struct Case {
  int64_t numel;
  Shifts shifts;
  Floats step{"step", Format::kFloat32, 1, 0}, grad_scale{"grad_scale", Format::kFloat32, 1, 0};
  Bytes is_finite{"is_finite", 1, 1, 0};
  Hyper hyper{one_of<double>({1e-3, 0.5, 0.0}), one_of<double>({0.9, 0.0}), one_of<double>({0.999, 0.95}),
              one_of<double>({1e-8, 1e-6}), one_of<double>({0.0, 0.1})};
  bool is_taken = below(4) != 0;
  int64_t max_blocks = one_of<int64_t>({0, 0, 1, 3});

  explicit Case(int64_t numel) : numel(numel) {
    step.set(0, one_of<float>({0.0f, 1.0f, 9.0f, 3e6f}));
    grad_scale.set(0, one_of<float>({1.0f, 0.37f, 1e-5f, NAN}));
    *is_finite.data() = is_taken;
    is_finite.keep();
  }
  const bool* flag() const { return reinterpret_cast<const bool*>(is_finite.data()); }
  Factors factors() const { return make_factors(hyper, step[0], grad_scale[0]); }
  void check() const {
    step.check();
    grad_scale.check();
    is_finite.check(1, [](const uint8_t* is, const uint8_t* should) { return *is == *should; });
  }
  Floats floats(const char* name, Format format, float size, bool is_positive = false) const {
    Floats made(name, format, numel, shifts.next());
    made.fill(size, is_positive);
    return made;
  }
};

// Where the shards of a flat operand lie in another.
struct Order {
  int64_t shard_numel;
  std::vector<int64_t> places;
  Bytes table;
  bool has_table;

  explicit Order(int64_t numel) : Order(numel, one_of<int64_t>({1, 1, 2, 3, 4, 6})) {}
  int64_t numel() const { return static_cast<int64_t>(places.size()) * shard_numel; }
  // Where element i of the one is in the other.
  int64_t operator[](int64_t i) const { return places[static_cast<size_t>(i / shard_numel)] * shard_numel + i % shard_numel; }
  Shards shards() const {
    const auto* on_device = reinterpret_cast<const int64_t*>(table.data());
    return {has_table ? on_device : nullptr, static_cast<int64_t>(places.size()), shard_numel};
  }
  void check() const {
    table.check(8, [](const uint8_t* is, const uint8_t* should) { return std::memcmp(is, should, 8) == 0; });
  }

 private:
  Order(int64_t numel, int64_t count)
      : shard_numel(numel), places(static_cast<size_t>(count)), table("places", 8, count, below(2)),
        has_table(count > 1 || below(2)) {
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random_source);
    std::memcpy(table.data(), places.data(), 8 * places.size());
    table.keep();
    in_hand += " in " + std::to_string(count) + " shards";
  }
};

struct Update : Case {
  Floats master = floats("master", Format::kFloat32, 0.1f), exp_avg = floats("exp_avg", Format::kFloat32, 0.01f);
  Floats exp_avg_sq = floats("exp_avg_sq", Format::kFloat32, 1e-4f, true);
  Floats grad = floats("grad", any_format(), 0.03f), out = floats("out", any_format(), 0.1f);
  Bytes room{"prepared", sizeof(Prepared), 1, 0};
  Scalars scalars{hyper, step.fp32(), grad_scale.fp32(), flag(), reinterpret_cast<Prepared*>(room.data())};
  Inputs inputs{grad.read(), numel, max_blocks};

  using Case::Case;
  Element now(int64_t i) const { return adamw(factors(), {master[i], exp_avg[i], exp_avg_sq[i]}, grad[i]); }
  // The element as a commit leaves it, which is what must be there.
  Element expect_commit(int64_t i) {
    const Element after = is_taken ? now(i) : Element{master[i], exp_avg[i], exp_avg_sq[i]};
    master.expect(i, after.master);
    exp_avg.expect(i, after.exp_avg);
    exp_avg_sq.expect(i, after.exp_avg_sq);
    return after;
  }
  void expect_counted_step() { step.expect(0, step[0] + (is_taken ? 1.0f : 0.0f)); }
  void check() const {
    Case::check();
    for (const Floats* operand : {&master, &exp_avg, &exp_avg_sq, &grad, &out}) {
      operand->check();
    }
  }
};

void begin(const std::string& name, int64_t numel) {
  in_hand = name + " of " + std::to_string(numel);
  emulation::multiprocessors = static_cast<int>(1 + below(3));
  ++done[name];
}

void estimate(int64_t numel) {
  begin("estimate", numel);
  Update on(numel);
  for (int64_t i = 0; i < numel; ++i) {
    on.out.expect(i, on.is_taken ? on.now(i).master : on.master[i]);
  }
  require(launch_estimate(on.master.fp32(), on.exp_avg.fp32(), on.exp_avg_sq.fp32(), on.scalars, on.inputs,
                          on.out.write(), nullptr));
  on.check();
}

void commit(int64_t numel) {
  begin("commit", numel);
  Update on(numel);
  for (int64_t i = 0; i < numel; ++i) {
    on.out.expect(i, on.expect_commit(i).master);
  }
  on.expect_counted_step();
  require(launch_commit(on.master.fp32(), on.exp_avg.fp32(), on.exp_avg_sq.fp32(), on.step.fp32(), on.scalars,
                        on.inputs, on.out.write(), nullptr));
  on.check();
}

// What it writes is nobody's business; where it writes is.
void traffic(int64_t numel) {
  begin("traffic", numel);
  Update on(numel);
  const bool writes_state = below(2);
  require(launch_traffic(on.master.fp32(), on.exp_avg.fp32(), on.exp_avg_sq.fp32(), on.inputs, on.out.write(),
                         writes_state, nullptr));
  on.grad.check();
  for (const Floats* state : {&on.master, &on.exp_avg, &on.exp_avg_sq}) {
    if (!writes_state) {
      state->check();
    }
  }
}

void sum_of_squares(int64_t numel) {
  begin("sum_of_squares", numel);
  const Case on(numel);
  const Format format = any_format();
  double totals[2];
  long double expected = 0.0L;  // of millions of terms a double's last places are wrong
  const uint32_t seed = static_cast<uint32_t>(random_source());
  for (double& total : totals) {  // the same values at another address
    Floats values("values", format, numel, below(9));
    std::mt19937 same(seed);
    for (int64_t i = 0; i < numel; ++i) {
      values.set(i, (static_cast<float>(same() % 2001) - 1000.0f) * 0.01f);
    }
    Bytes sums("sums", sizeof(double), sum_chunks(numel), 0), sum("sum", sizeof(double), 1, 0);
    require(launch_sum_of_squares(values.read(), numel, reinterpret_cast<double*>(sums.data()),
                                  reinterpret_cast<double*>(sum.data()), on.max_blocks, nullptr));
    values.check();
    std::memcpy(&total, sum.data(), sizeof(total));
    expected = 0.0L;
    for (int64_t i = 0; i < numel; ++i) {
      expected += static_cast<long double>(values[i]) * values[i];
    }
  }
  if (!(std::fabs(totals[0] - expected) <= 1e-12L * expected) || totals[0] != totals[1]) {
    fail("the sum is wrong, or another at another address");
  }
}

void error_and_step(int64_t numel) {
  begin("error_and_step", numel);
  Case on(numel);
  on.step.set(0, one_of<float>({1.0f, 9.0f, 3e6f}));
  on.hyper.eps = one_of<double>({1e-8, 0.0});  // 0: what is not there must not be 0 / 0
  const Format format = any_format();
  const StepFactors factors = make_step_factors(on.hyper, on.step[0]);
  const uint32_t seed = static_cast<uint32_t>(random_source());
  double totals[2][2];
  long double expected[2] = {};
  for (int turn = 0; turn < 2; ++turn) {  // the same values at other addresses
    const Shifts shifts;
    Floats master("master", Format::kFloat32, numel, shifts.next()), live("stands_at", format, numel, shifts.next());
    Floats exp_avg("exp_avg", Format::kFloat32, numel, shifts.next());
    Floats exp_avg_sq("exp_avg_sq", Format::kFloat32, numel, shifts.next());
    std::mt19937 same(seed);
    const auto any = [&] { return (static_cast<float>(same() % 2001) - 1000.0f) * 1e-4f; };
    for (int64_t i = 0; i < numel; ++i) {
      master.set(i, any());
      live.set(i, any());
      exp_avg.set(i, any());
      exp_avg_sq.set(i, 1e-3f * std::fabs(any()) + 1e-6f);
    }
    const int64_t chunks = sum_chunks(numel);
    Bytes sums("sums", sizeof(double), 2 * chunks, 0), both("totals", sizeof(double), 2, 0);
    Bytes room("prepared", sizeof(StepFactors), 1, 0);
    require(launch_error_and_step({master.fp32(), exp_avg.fp32(), exp_avg_sq.fp32(), live.read(), numel}, on.hyper,
                                  on.step.fp32(), reinterpret_cast<StepFactors*>(room.data()),
                                  reinterpret_cast<double*>(sums.data()), reinterpret_cast<double*>(both.data()),
                                  on.max_blocks, nullptr));
    std::memcpy(totals[turn], both.data(), sizeof(totals[turn]));
    for (int64_t i = 0; i < numel && turn == 0; ++i) {
      const long double error = live[i] - master[i];
      const long double step = moved(factors, {master[i], exp_avg[i], exp_avg_sq[i]});
      expected[0] += error * error;
      expected[1] += step * step;
    }
    for (const Floats* operand : {&master, &live, &exp_avg, &exp_avg_sq}) {
      operand->check();
    }
  }
  for (int sum = 0; sum < 2; ++sum) {
    if (!(std::fabs(totals[0][sum] - expected[sum]) <= 1e-12L * expected[sum]) || totals[0][sum] != totals[1][sum]) {
      fail("the sum is wrong, or another at another address: " + std::to_string(sum));
    }
  }
  on.check();
}

void pack(int64_t numel) {
  begin("pack", numel);
  const Order order(numel);
  Case on(order.numel());
  Floats grads = on.floats("grads", any_format(), 0.03f), packed = on.floats("packed", any_format(), 1.0f);
  const float scale = one_of<float>({1.0f, 0.5f, 1.0f / 3.0f, 1e30f});
  const bool clears = below(2);
  for (int64_t i = 0; i < on.numel; ++i) {
    packed.expect(order[i], grads[i] * scale);
    if (clears) {
      grads.expect(i, 0.0f);
    }
  }
  require(launch_pack(grads.write(), packed.write(), order.shards(), scale, clears, on.max_blocks, nullptr));
  grads.check();
  packed.check();
  order.check();
}

// Whatever the bits are: a bit more or less of them may be a number.
void move_shards(int64_t numel, bool swaps) {
  begin(swaps ? "swap_shards" : "copy_shards", numel);
  const Order order(numel);
  const Case on(order.numel());
  const size_t width = one_of<size_t>({2, 4});
  Bytes one("one", width, on.numel, on.shifts.next()), other("other", width, on.numel, on.shifts.next());
  for (Bytes* operand : {&one, &other}) {
    std::generate(operand->data(), operand->data() + operand->expected.size(),
                  [] { return static_cast<uint8_t>(random_source()); });
    operand->keep();
  }
  for (int64_t i = 0; i < on.numel; ++i) {
    uint8_t* there = other.expected.data() + static_cast<size_t>(order[i]) * width;
    uint8_t* here = one.expected.data() + static_cast<size_t>(i) * width;
    std::copy_n(one.data() + static_cast<size_t>(i) * width, width, there);
    if (swaps) {
      std::copy_n(other.data() + static_cast<size_t>(order[i]) * width, width, here);
    }
  }
  const auto bytes = static_cast<int64_t>(width);
  require(swaps ? launch_swap_shards(one.data(), other.data(), bytes, order.shards(), on.max_blocks, nullptr)
                : launch_copy_shards(one.data(), other.data(), bytes, order.shards(), on.max_blocks, nullptr));
  for (const Bytes* operand : {&one, &other}) {
    operand->check(width, [&](const uint8_t* is, const uint8_t* should) { return std::memcmp(is, should, width) == 0; });
  }
  order.check();
}

void copy_shards(int64_t numel) { move_shards(numel, false); }
void swap_shards(int64_t numel) { move_shards(numel, true); }

void quantize(int64_t numel) {
  begin("quantize", numel);
  const Order order(numel);
  const auto shards = static_cast<int64_t>(order.places.size());
  Case on(order.numel());
  const int bits = one_of<int>({4, 8});
  const Floats values = on.floats("values", any_format(), 0.03f);
  const float scale = one_of<float>({1.0f, 1.0f / 3.0f, 1e-3f, INFINITY, 0.0f});
  Records records("records", numel, bits, 2 * below(3), shards);
  for (int64_t shard = 0; shard < shards; ++shard) {
    std::vector<float> products;
    for (int64_t i = shard * numel; i < (shard + 1) * numel; ++i) {
      products.push_back(values[i] * scale);
    }
    records.expect(products, bits, order.places[static_cast<size_t>(shard)], true);
  }
  require(launch_quantize(values.read(), order.shards(), records.stride(), scale, records.data(), bits, on.max_blocks,
                          nullptr));
  values.check();
  records.check();
  order.check();
}

// Bytes as they come, or the records of values of that size.
Records any_message(int64_t numel, int bits, bool is_wild, float size, int64_t shards = 1) {
  Records message("message", numel, bits, 2 * below(3), shards);
  if (is_wild) {
    message.fill_at_random();
    return message;
  }
  for (int64_t shard = 0; shard < shards; ++shard) {
    Floats values("values", Format::kFloat32, numel, 0);
    values.fill(size);
    message.expect(std::vector<float>(values.fp32(), values.fp32() + numel), bits, shard);
  }
  message.take_expected();
  return message;
}

float any_size() { return one_of<float>({0.03f, 0.03f, 1e-40f, 3e38f}); }

void dequantize_sum(int64_t numel) {
  const int64_t count = numel < 3000 ? one_of<int64_t>({1, 2, 3, 5, 9, 64, 65, 131}) : 2;
  begin("dequantize_sum", numel);
  in_hand += " with " + std::to_string(count) + " messages";
  Case on(numel);
  const int bits = one_of<int>({4, 8});
  Floats total = on.floats("total", Format::kFloat32, 1.0f);
  const float size = any_size();  // of all: a sum of many that are large is not a number, whatever else is in it
  const bool is_wild = below(4) == 0;
  std::vector<Records> messages;
  std::vector<const uint8_t*> addresses;
  for (int64_t number = 0; number < count; ++number) {
    messages.push_back(any_message(numel, bits, is_wild, size));
    addresses.push_back(messages.back().data());
  }
  for (int64_t i = 0; i < numel; ++i) {
    float sum = messages[0].value(i, bits, 0, true);
    for (size_t number = 1; number < messages.size(); ++number) {
      sum += messages[number].value(i, bits, 0, true);
    }
    total.expect(i, sum);
  }
  require(launch_dequantize_sum(addresses.data(), count, total.fp32(), numel, bits, on.max_blocks, nullptr));
  total.check();
  for (const Records& message : messages) {
    message.check();
  }
}

void estimate_change(int64_t numel) {
  begin("estimate_change", numel);
  Update on(numel);
  const int bits = one_of<int>({4, 8});
  const bool has_base = below(2);
  Floats live("live", any_format(), numel, has_base ? on.shifts.next() : 0);
  live.fill(0.1f);
  std::vector<float> changes;
  for (int64_t i = 0; i < numel; ++i) {
    if (!has_base) {
      live.set(i, on.master[i]);
    }
    changes.push_back(on.now(i).master - live[i]);
  }
  Records records("records", numel, bits, 2 * below(3));
  on.is_taken ? records.expect(changes, bits) : records.expect_zeros();
  require(launch_estimate_change(on.master.fp32(), on.exp_avg.fp32(), on.exp_avg_sq.fp32(), on.scalars, on.inputs,
                                 has_base ? live.read() : Array{nullptr, live.format}, records.data(), bits, nullptr));
  on.check();
  live.check();
  records.check();
}

void commit_change(int64_t numel) {
  begin("commit_change", numel);
  Update on(numel);
  const int bits = one_of<int>({4, 8});
  const Floats base = on.floats("base", any_format(), 0.1f);
  std::vector<float> changes;
  for (int64_t i = 0; i < numel; ++i) {
    changes.push_back(on.expect_commit(i).master - base[i]);
  }
  on.expect_counted_step();
  Records records("records", numel, bits, 2 * below(3));
  records.expect(changes, bits);
  require(launch_commit_change(on.master.fp32(), on.exp_avg.fp32(), on.exp_avg_sq.fp32(), on.step.fp32(), on.scalars,
                               on.inputs, base.read(), records.data(), bits, nullptr));
  on.check();
  base.check();
  records.check();
}

void add_change(int64_t numel) {
  begin("add_change", numel);
  const Order order(numel);
  Case on(order.numel());
  const int bits = one_of<int>({4, 8});
  const auto shards = static_cast<int64_t>(order.places.size());
  const Records records = any_message(numel, bits, below(3) == 0, any_size(), shards);
  Floats live = on.floats("live", any_format(), 0.1f);
  for (int64_t i = 0; i < on.numel && on.is_taken; ++i) {
    live.expect(i, live[i] + records.value(i % numel, bits, order.places[static_cast<size_t>(i / numel)]));
  }
  require(launch_add_change(records.data(), on.flag(), live.write(), order.shards(), records.stride(), bits,
                            on.max_blocks, nullptr));
  live.check();
  records.check();
  order.check();
  on.check();
}

void block_roots(int64_t numel) {
  begin("block_roots", numel);
  Case on(numel);
  const int64_t blocks = (numel + 255) / 256;
  Floats squares("exp_avg_sq", Format::kFloat32, numel, on.shifts.next());
  for (int64_t i = 0; i < numel; ++i) {
    squares.set(i, static_cast<float>(below(1000)) * one_of<float>({1e-9f, 0.0f, 1e-41f, 1e30f}));
  }
  Floats roots("roots", Format::kFloat32, blocks, on.shifts.next());
  require(launch_block_roots(squares.fp32(), numel, on.step.fp32(), on.hyper.beta2, on.hyper.eps, roots.fp32(),
                             on.max_blocks, nullptr));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = std::min(numel, 256 * block + 256);
    double sum = 0.0;
    for (int64_t i = 256 * block; i < end; ++i) {
      sum += squares[i];
    }
    const float root = root_of(sum / static_cast<double>(end - 256 * block),
                               root_correction(on.hyper.beta2, on.step[0]), on.hyper.eps);
    if (!(std::fabs(roots[block] - root) <= 2e-7f * root)) {
      fail("the root of block " + std::to_string(block) + " is wrong");
    }
    roots.expect(block, roots[block]);
  }
  roots.check();
  squares.check();
  on.check();
}

void predict_locally(int64_t shard_numel) {
  begin("predict_locally", shard_numel);
  const int64_t shards = one_of<int64_t>({1, 2, 3}), blocks = (shard_numel + 255) / 256;
  in_hand += " in " + std::to_string(shards) + " shards";
  Case on(shards * shard_numel);
  const Format weight = any_format();
  Floats newest = on.floats("newest", weight, 0.1f), before = on.floats("before", weight, 0.1f);
  Floats live = on.floats("live", weight, 0.1f), grad = on.floats("grad", any_format(), 0.03f);
  Floats roots("roots", Format::kFloat32, shards * blocks, 0);
  for (int64_t block = 0; block < shards * blocks; ++block) {
    roots.set(block, one_of<float>({0.02f, 1.2e-38f, 1e-5f}));
  }
  const double kept = one_of<double>({0.0, 0.25, 1.0});
  const bool is_in_place = below(2);
  Floats& written = is_in_place ? newest : live;
  const LocalFactors factors = make_local_factors(on.hyper, kept, on.step[0]);
  for (int64_t i = 0; i < on.numel; ++i) {
    const float root = roots[i / shard_numel * blocks + i % shard_numel / 256];
    const float factor = on.is_taken ? block_factor(factors, on.grad_scale[0], root) : 0.0f;
    written.expect(i, predict(factors, newest[i], before[i], written[i], on.is_taken ? grad[i] : 0.0f, factor));
    before.expect(i, newest[i]);
  }
  const Prediction operands{newest.read(), before.write(), written.write(),      grad.read(),
                            roots.fp32(),  on.step.fp32(), on.grad_scale.fp32(), on.flag(),
                            on.numel,      shard_numel,    on.max_blocks};
  Bytes room("prepared", sizeof(PreparedLocally), 1, 0);
  require(launch_predict_locally(operands, on.hyper, kept, reinterpret_cast<PreparedLocally*>(room.data()), nullptr));
  for (const Floats* operand : {&newest, &before, &live, &grad, &roots}) {
    operand->check();
  }
  on.check();
}

using Check = void (*)(int64_t);
const Check kChecks[] = {estimate,       commit,          traffic,    sum_of_squares, pack,           quantize,
                         dequantize_sum, estimate_change, add_change, block_roots,    predict_locally,
                         copy_shards,    swap_shards,     error_and_step, commit_change};

// Around vectors, blocks, warps and chunks of the sum, and more than a grid does in one go.
const std::vector<int64_t> kSizes = {0,   1,   2,   3,   4,   5,   7,    31,   33,   127,  128,  129,   255,
                                     256, 257, 259, 511, 512, 513, 1023, 1025, 2049, 4095, 4097, 16384, 33001};
// From here on the sum has larger chunks.
constexpr int64_t kLarge = (int64_t{1} << 24) + 1;

}  // namespace

int main(int count, char** words) {
  const auto seed = static_cast<uint32_t>(std::atoi(words[1]));
  const int64_t cases = std::atoll(words[2]);
  random_source.seed(seed);
  emulation::set_seed(seed);
  for (int64_t number = 0; number < cases; ++number) {
    const int64_t numel = below(10) < 9 ? kSizes[static_cast<size_t>(number) % kSizes.size()] : below(3000);
    for (const Check check : kChecks) {
      check(numel);
    }
  }
  if (count > 3) {
    sum_of_squares(kLarge);
  }
  for (const auto& [name, number] : done) {
    std::printf("%s: %lld cases\n", name.c_str(), static_cast<long long>(number));
  }
  std::printf("%lld launches, nothing wrong\n", static_cast<long long>(emulation::launch_count()));
}
