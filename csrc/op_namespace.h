// The namespace of the ops in torch.ops. A macro, so that a build for a kernel hub can rename it.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef LOWBIT_OP_NAMESPACE
#define LOWBIT_OP_NAMESPACE lowbit
#endif

// One more expansion than STABLE_TORCH_LIBRARY itself has, so that the macro above is replaced first.
#define LOWBIT_LIBRARY_(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define LOWBIT_LIBRARY(m) LOWBIT_LIBRARY_(LOWBIT_OP_NAMESPACE, m)
#define LOWBIT_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define LOWBIT_IMPL(key, m) LOWBIT_IMPL_(LOWBIT_OP_NAMESPACE, key, m)
