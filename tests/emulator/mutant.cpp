#include "emulator/mutant.h"

#include <cstring>

#include "emulator/settings.h"

namespace lowbit::emulator {

int active_mutant = -1;
uint8_t mutants_reached[kMaxMutants];

}  // namespace lowbit::emulator

using namespace lowbit::emulator;

void lowbit_emulator_set_mutant(int place) {
  active_mutant = place;
  std::memset(mutants_reached, 0, sizeof mutants_reached);
}
int lowbit_emulator_reached(int place) { return mutants_reached[place]; }
