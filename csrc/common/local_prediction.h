// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of the schedule `local`, once, for every kernel (deepspeed_acco/optim/local_prediction.py says what it
// computes). Compile without contraction, as adamw.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/adamw.h"
#include "common/host_device.h"
#include "common/ranges.h"

namespace acco {

constexpr int64_t kRootNumel = 256;  // elements of a block

// What is the same for all elements, each value rounded once from float64. `step` counts the commits.
struct LocalFactors {
  float momentum, of_distance, coefficient, most;
};

ACCO_HOST_DEVICE inline LocalFactors make_local_factors(const Hyper& hyper, double kept, float step) {
  const double taken = static_cast<double>(step);
  const double share = 1.0 / (1.0 - pow(hyper.beta1, taken + 1.0));
  const double coefficient = hyper.lr * (1.0 - hyper.beta1) * share;
  const double first = sqrt((1.0 - pow(hyper.beta2, taken + 1.0)) / (1.0 - hyper.beta2));
  const double momentum = hyper.beta1 * (1.0 - pow(hyper.beta1, taken)) * share;
  return {static_cast<float>(momentum), static_cast<float>(kept * momentum), static_cast<float>(coefficient),
          static_cast<float>(coefficient * first)};
}

// What a block's gradients are multiplied by; finite, so that a gradient of 0 stays 0.
ACCO_HOST_DEVICE inline float block_factor(const LocalFactors& f, float grad_scale, float root) {
  const float factor = f.coefficient * grad_scale / root;
  return factor < FLT_MAX ? factor : FLT_MAX;
}

// The weight that is predicted of a true one, that one commit earlier, and where the rank stands.
ACCO_HOST_DEVICE inline float predict(const LocalFactors& f, float newest, float before, float live, float grad,
                                      float factor) {
  const float own = grad * factor;
  const float above = own > -f.most ? own : -f.most;
  const float moved = above < f.most ? above : f.most;
  const float distance = live - newest;
  const float kept = distance >= -FLT_MAX && distance <= FLT_MAX ? distance : 0.0f;
  return newest + (newest - before) * f.momentum + kept * f.of_distance - moved;
}

ACCO_HOST_DEVICE inline float root_of(double mean_square, double correction, double eps) {
  const double root = sqrt(mean_square / correction) + eps;
  return static_cast<float>(root > static_cast<double>(FLT_MIN) ? root : static_cast<double>(FLT_MIN));
}

ACCO_HOST_DEVICE inline double root_correction(double beta2, float step) {
  return step > 0.0f ? 1.0 - pow(beta2, static_cast<double>(step)) : 1.0;
}

// Where block `index` of consecutive shards lies.
struct RootBlock {
  int64_t begin, count;
};

ACCO_HOST_DEVICE inline RootBlock root_block(int64_t index, int64_t shard_numel) {
  const int64_t blocks = pieces_of(shard_numel, kRootNumel);
  const int64_t in_shard = index % blocks * kRootNumel;
  const int64_t rest = shard_numel - in_shard;
  return {index / blocks * shard_numel + in_shard, rest < kRootNumel ? rest : kRootNumel};
}

}  // namespace acco
