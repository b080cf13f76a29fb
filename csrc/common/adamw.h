// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The AdamW arithmetic, once, for every kernel: that of torch.optim.AdamW (decoupled decay, bias correction, eps
// outside the root) in fp32. Compile without contraction (-ffp-contract=off, -fmad=false): the same element must give
// the same bits in a vector body, in a scalar tail, in ESTIMATE and in COMMIT.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace acco {

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay;
};

// What is the same for all elements, each value rounded once from float64.
struct Factors {
  float grad_scale;
  float grad_weight;    // 1 - beta1
  float square_keep;    // beta2
  float square_weight;  // 1 - beta2
  float decay;          // 1 - lr * weight_decay
  float step_size;      // lr / (1 - beta1^step)
  float inverse_root;   // 1 / sqrt(1 - beta2^step)
  float eps;
};

// `step` counts the steps taken before this one.
ACCO_HOST_DEVICE inline Factors make_factors(const Hyper& hyper, float step, float grad_scale) {
  const double this_step = static_cast<double>(step) + 1.0;
  Factors f;
  f.grad_scale = grad_scale;
  f.grad_weight = static_cast<float>(1.0 - hyper.beta1);
  f.square_keep = static_cast<float>(hyper.beta2);
  f.square_weight = static_cast<float>(1.0 - hyper.beta2);
  f.decay = static_cast<float>(1.0 - hyper.lr * hyper.weight_decay);
  f.step_size = static_cast<float>(hyper.lr / (1.0 - pow(hyper.beta1, this_step)));
  f.inverse_root = static_cast<float>(1.0 / sqrt(1.0 - pow(hyper.beta2, this_step)));
  f.eps = static_cast<float>(hyper.eps);
  return f;
}

struct Moments {
  float exp_avg, exp_avg_sq;
};

struct Element {
  float master, exp_avg, exp_avg_sq;
};

// The moments after one step with the unscaled gradient `grad`.
ACCO_HOST_DEVICE inline Moments next_moments(const Factors& f, Moments old, float grad) {
  const float g = grad * f.grad_scale;
  return {old.exp_avg + (g - old.exp_avg) * f.grad_weight, old.exp_avg_sq * f.square_keep + g * g * f.square_weight};
}

// By what the new first moment is divided.
ACCO_HOST_DEVICE inline float denominator_of(const Factors& f, float exp_avg_sq) {
  return sqrtf(exp_avg_sq) * f.inverse_root + f.eps;
}

ACCO_HOST_DEVICE inline float next_master(const Factors& f, float master, float exp_avg, float denominator) {
  return master * f.decay - exp_avg / denominator * f.step_size;
}

// The element after one step.
ACCO_HOST_DEVICE inline Element adamw(const Factors& f, Element old, float grad) {
  const Moments now = next_moments(f, Moments{old.exp_avg, old.exp_avg_sq}, grad);
  return {next_master(f, old.master, now.exp_avg, denominator_of(f, now.exp_avg_sq)), now.exp_avg, now.exp_avg_sq};
}

// How a commit moved the weights, to be found of what it left (deepspeed_acco/optim/adamw.py): `decay` is lr *
// weight_decay, and what moved() gives is (1 - decay) times the step, its sign turned.
struct StepFactors {
  Factors factors;
  float decay;
};

// `step` counts the commits, the one in question among them.
ACCO_HOST_DEVICE inline StepFactors make_step_factors(const Hyper& hyper, float step) {
  return {make_factors(hyper, step - 1.0f, 1.0f), static_cast<float>(hyper.lr * hyper.weight_decay)};
}

ACCO_HOST_DEVICE inline float moved(const StepFactors& f, Element now) {
  return now.exp_avg / denominator_of(f.factors, now.exp_avg_sq) * f.factors.step_size + now.master * f.decay;
}

}  // namespace acco
