// What a block's matrix units have in flight, and shared memory as they and the copy engine see it.
#pragma once

#include <cstdint>
#include <memory>

namespace lowbit::emulator {

struct Block;
struct MatrixUnits;

// At a block's start, and at its end, where nothing may be in flight: leaves what went wrong in the block's error.
void begin_matrix_units(Block& block);
void end_matrix_units(Block& block);

// Ordinary stores are seen by the asynchronous proxy (wgmma's operands in shared memory) after a fence only. What the copy
// engine writes, it sees at once.
void async_wrote(Block& block, const void* to, int64_t bytes);
void publish_to_async_proxy(Block& block);

}  // namespace lowbit::emulator
