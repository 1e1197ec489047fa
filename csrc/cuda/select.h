// Which kernel serves a problem on a CUDA device, and how its work is cut. Pure functions of the problem and a device's
// numbers, part of liblowbit_ops: they answer for any device, on machines without CUDA too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"
#include "cuda/box_stages.h"
#include "cuda/hopper_plan.h"
#include "cuda/params.h"
#include "cuda/runtime.h"
#include "cuda/tiles.h"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

// "sm_90", "sm_90:114" (114 multiprocessors), either with "cuda:" before it; "cuda" and "cuda:0" are kDefaultModel.
// Throws Error for other text, and for devices that no kernel runs on (below sm_80).
LOWBIT_API DeviceInfo device_model(const std::string& name);
inline constexpr const char* kDefaultModel = "sm_90:132";

// The largest model of each compute capability.
std::vector<DeviceInfo> known_devices();

// Throws Error, with the op's name, for a device below sm_80.
LOWBIT_API void check_capability(const char* op, const DeviceInfo& device);

// One kernel in one tile shape, for one op.
struct KernelRow {
  Op op;
  int tile;        // index in kTiles
  int capability;  // the least that it runs on
  bool general;    // takes everything; LOWBIT_STRICT=1 refuses to run it
  bool hopper;     // runs on that capability only, and is in builds that have code for 90a
  const char* takes;
  // Whether the kernel cannot run the problem at all; fills in why.
  bool (*refuse)(const Problem& problem, const CudaTile64& weight, const Why& why);

  const Tile& shape() const { return kTiles[tile]; }
  const char* name() const { return kTiles[tile].name; }
};

// In order of preference for each op; the last of an op never refuses.
const std::vector<KernelRow>& kernel_table();

// A workspace begins with counters, at the same place for every problem, so that calls of all shapes can share one: each
// leaves them zero, and none writes anything else there. More tiles than this are never shared among blocks, and have no
// need to be: they fill any device.
inline constexpr int64_t kMaxShared = 4096;
inline constexpr int64_t kCounterBytes = kMaxShared * 4;

// What runs. Pointers in `schedule` are still null. Behind the counters, the pieces of the workspace stand in this order,
// each 256-byte aligned.
struct Config {
  const KernelRow* row;
  Schedule schedule;
  bool shares_tiles;      // some tile is summed by several blocks: counters and partials are needed
  bool prepares;          // rows of x are copied into the workspace first
  HopperPlan hopper;      // of the row's kind; else empty
  BoxCluster boxes;       // of kernels of warpgroups, as `tokens`
  int tokens;             // of a tile
  int stages;             // of a block's ring in shared memory
  int64_t shared_bytes;   // of a block
  int64_t partial_bytes;  // sums of shared tiles
  int64_t prepared_bytes;    // rows of x, gathered and aligned
  int64_t unordered_bytes;   // gemm_grad_input: dx before its columns are put in order
  int64_t workspace_bytes;   // all of them and the counters; 0 where there are none
  int64_t prepared_columns;  // of a prepared row, in elements
  double efficiency;  // steps, over those that all block slots of the device could do meanwhile
};
LOWBIT_API std::string to_string(const Config& config);

// For M >= 1. Throws Error where a forced kernel refuses.
LOWBIT_API Config select(const Problem& problem, const CudaTile64& weight,
                         const DeviceInfo& device);

// Restricts selection to the row of this name in every op that has one, until called with "". Rows that merely stand
// aside for a faster one then run; those that cannot still refuse. LOWBIT_KERNEL in the environment does the same. The
// kernels for Hopper take a plan behind their name: "hopper_stream_m8:2x4" has 2 strips, and clusters of 4 blocks;
// "hopper_a8_fp8_m128:2x1" has clusters of 2 blocks that share x, and of 1 that share weights.
LOWBIT_API void force_kernel(const std::string& name);
LOWBIT_API std::string forced_kernel();

// For common/explain.h.
std::vector<KernelInfo> kernels();
std::vector<Verdict> explain(const Problem& problem, const DeviceInfo& device);

// Bytes of workspace, whatever the dtype, the alignment and the flags are; with no device (or "cuda", which is any), enough
// for all known ones and their smaller relatives.
// A tensor need not start on a 256-byte boundary, the pieces do: hence the slack.
inline constexpr int64_t kWorkspaceSlack = 255;
int64_t workspace_size(Op op, int64_t M, int64_t N, int64_t K, const Desc& desc,
                       const std::string& device);

}  // namespace lowbit::cuda
