// Bad addresses: says which kernel, block and thread.
#pragma once

namespace lowbit::emulator {

// Once per CPU thread that runs blocks.
void watch_faults();

}  // namespace lowbit::emulator
