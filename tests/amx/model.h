// A software model of AMX's tile instructions, under the names of the intrinsics: kernels that are compiled with
// `-include amx/model.h` run on CPUs that have no AMX (build.py). What hardware answers with a fault is an error here,
// kept for the test to see (model.cpp), and does nothing.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace amx_model {
__attribute__((visibility("hidden"))) void load_config(const void* config);
__attribute__((visibility("hidden"))) void release();
__attribute__((visibility("hidden"))) void load(int tile, const void* base, int64_t stride);
__attribute__((visibility("hidden"))) void store(int tile, void* base, int64_t stride);
__attribute__((visibility("hidden"))) void zero(int tile);
__attribute__((visibility("hidden"))) void dpbf16ps(int sums, int a, int b);
__attribute__((visibility("hidden"))) void dpbsud(int sums, int a, int b);
}  // namespace amx_model

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) ::amx_model::load_config(config)
#define _tile_release() ::amx_model::release()
#define _tile_loadd(tile, base, stride) ::amx_model::load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx_model::store(tile, base, stride)
#define _tile_zero(tile) ::amx_model::zero(tile)
#define _tile_dpbf16ps(sums, a, b) ::amx_model::dpbf16ps(sums, a, b)
#define _tile_dpbsud(sums, a, b) ::amx_model::dpbsud(sums, a, b)
