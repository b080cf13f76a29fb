// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
//
// In the place of PyTorch's header, which calls the CUDA runtime.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                               \
  do {                                                                                     \
    const cudaError_t status = (call);                                                     \
    TORCH_CHECK(status == cudaSuccess, "emulated CUDA: error ", static_cast<int>(status)); \
  } while (0)
