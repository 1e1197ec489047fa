// Included in front of every kernel file of a mutated build (mutants.py): all mutants are compiled at once, and one of them is
// switched on at run time.
#pragma once

#include <cstdint>

namespace lowbit::emulator {

inline constexpr int kMaxMutants = 4096;
extern int active_mutant;                     // -1: none
extern uint8_t mutants_reached[kMaxMutants];  // which places in the source were executed

// Whether the barrier, wait, commit or fence at this place is left out, or the predicate taken for true.
inline bool mutant(int place) {
  mutants_reached[place] = 1;
  return place == active_mutant;
}

}  // namespace lowbit::emulator
