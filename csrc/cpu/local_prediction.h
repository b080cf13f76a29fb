// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops of the schedule `local`, without torch. Each works on blocks [begin, end); an element's bits depend on
// its block alone, so that any division over threads gives the same result.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/local_prediction.h"

namespace acco::cpu {

// Roots of one shard's blocks.
inline void roots_range(const float* exp_avg_sq, int64_t numel, double correction, double eps, float* roots,
                        int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 8;
  for (int64_t block = begin; block < end; ++block) {
    const RootBlock at = root_block(block, numel);
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < at.count; ++i) {
      lanes[i % kLanes] += exp_avg_sq[at.begin + i];
    }
    double sum = 0.0;
    for (const double lane : lanes) {
      sum += lane;
    }
    roots[block] = root_of(sum / static_cast<double>(at.count), correction, eps);
  }
}

// `newest` and `live` may be the same.
template <class Weight, class Grad>
void predict_range(const LocalFactors& factors, bool has_gradient, float grad_scale,
                   const typename Weight::Storage* newest, typename Weight::Storage* before,
                   const typename Grad::Storage* grad, const float* roots, typename Weight::Storage* live,
                   int64_t shard_numel, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const RootBlock at = root_block(block, shard_numel);
    const float factor = has_gradient ? block_factor(factors, grad_scale, roots[block]) : 0.0f;
#pragma omp simd
    for (int64_t i = at.begin; i < at.begin + at.count; ++i) {
      const typename Weight::Storage kept = newest[i];
      // What is not finite has no part in it, not even times 0.
      const float own = has_gradient ? Grad::load(grad[i]) : 0.0f;
      live[i] = Weight::store(
          predict(factors, Weight::load(kept), Weight::load(before[i]), Weight::load(live[i]), own, factor));
      before[i] = kept;
    }
  }
}

}  // namespace acco::cpu
