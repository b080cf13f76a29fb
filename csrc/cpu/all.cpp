// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// The schemas and all CPU ops as one translation unit: reading torch's headers takes most of the time, once this way.
#include "common/registration.cpp"
#include "cpu/adamw_cpu.cpp"
#include "cpu/local_prediction_cpu.cpp"
#include "cpu/quantize_cpu.cpp"
#include "cpu/shards_cpu.cpp"
