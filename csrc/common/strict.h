// LOWBIT_STRICT: whether picking a general kernel is an error.
#pragma once

#include "common/check.h"

namespace lowbit {

// The environment variable at first use ("" and "0" mean no), or what set_strict said since.
LOWBIT_API bool strict();
LOWBIT_API void set_strict(bool on);

}  // namespace lowbit
