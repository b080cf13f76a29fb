// Copyright (c) the deepspeed_acco authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#ifdef __CUDACC__
#define ACCO_HOST_DEVICE __host__ __device__
#else
#define ACCO_HOST_DEVICE
#endif
