// The micro-kernel on tile registers: up to 2 x 2 tiles of sums, 16 x 16 each, over the steps of a run. Included after V.
//
//   tmm0 tmm1   sums of the first 16 rows of x with two strips          tmm4   rows of x
//   tmm2 tmm3   sums of the second 16 rows                              tmm5   the second 16 rows
//                                                                       tmm6, tmm7   one strip each
//
// Four multiplications per four loads: a tile is multiplied in 16 cycles and loaded in 8, so loads take half the time.
// Tile numbers are literals because compilers paste them into the instruction.

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// The compiler must not move stores and loads of memory across tile instructions, nor drop stores: g++ 12 declares of
// some of them that they read and write memory, and not all that they do.
inline void tile_barrier(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Up to 32 rows of x, in one pass, need no rows that are not there; more rows come in full tiles.
inline void configure_tiles(int64_t M) {
  const int64_t first = M < 16 ? M : 16;
  const int64_t second = M >= 32 ? 16 : M > 16 ? M - 16 : 0;
  const int64_t rows[8] = {first, first, second, second, first, second, 16, 16};
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.row_bytes[i] = rows[i] > 0 ? 64 : 0;
  }
  tile_barrier(&config);
  _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

struct BFloatTiles {
  static constexpr int kStepK = 32;
  static void multiply00() { _tile_dpbf16ps(0, 4, 6); }
  static void multiply01() { _tile_dpbf16ps(1, 4, 7); }
  static void multiply10() { _tile_dpbf16ps(2, 5, 6); }
  static void multiply11() { _tile_dpbf16ps(3, 5, 7); }
};

// x is signed, codes are not.
struct Int8Tiles {
  static constexpr int kStepK = 64;
  static void multiply00() { _tile_dpbsud(0, 4, 6); }
  static void multiply01() { _tile_dpbsud(1, 4, 7); }
  static void multiply10() { _tile_dpbsud(2, 5, 6); }
  static void multiply11() { _tile_dpbsud(3, 5, 7); }
};

// Where the tiles of a run are. Steps follow each other at kTileBytes.
struct TileRun {
  const uint8_t *a0, *a1;  // x, 16 rows each
  int64_t plane_bytes;     // from one plane of x to the next
  int planes;
  const uint8_t *b0, *b1;  // a strip each
  int steps;
  uint8_t* sums[4];  // row by row: [rows of x][strips]
  bool zero;         // sums start at zero and not at what memory holds
};

template <int MT, int NR>
void load_sums(const TileRun& run) {
  if (run.zero) {
    _tile_zero(0);
    if constexpr (NR == 2) _tile_zero(1);
    if constexpr (MT == 2) _tile_zero(2);
    if constexpr (MT == 2 && NR == 2) _tile_zero(3);
    return;
  }
  _tile_loadd(0, run.sums[0], 64);
  if constexpr (NR == 2) _tile_loadd(1, run.sums[1], 64);
  if constexpr (MT == 2) _tile_loadd(2, run.sums[2], 64);
  if constexpr (MT == 2 && NR == 2) _tile_loadd(3, run.sums[3], 64);
}

template <int MT, int NR>
void store_sums(const TileRun& run) {
  _tile_stored(0, run.sums[0], 64);
  if constexpr (NR == 2) _tile_stored(1, run.sums[1], 64);
  if constexpr (MT == 2) _tile_stored(2, run.sums[2], 64);
  if constexpr (MT == 2 && NR == 2) _tile_stored(3, run.sums[3], 64);
}

// `side` does other work between the steps, for the tile unit is busy 64 cycles with each while the core's vector ports
// have nothing to do.
template <int MT, int NR, class Tiles, class Side>
void multiply_run(const TileRun& run, Side& side) {
  tile_barrier(run.sums[0]);
  load_sums<MT, NR>(run);
  for (int p = 0; p < run.planes; ++p) {
    const uint8_t* a0 = run.a0 + p * run.plane_bytes;
    const uint8_t* a1 = MT == 2 ? run.a1 + p * run.plane_bytes : nullptr;
    for (int step = 0; step < run.steps; ++step) {
      const int64_t at = static_cast<int64_t>(step) * kTileBytes;
      tile_barrier(run.b0);
      _tile_loadd(6, run.b0 + at, 64);
      _tile_loadd(4, a0 + at, 64);
      Tiles::multiply00();
      if constexpr (NR == 2) {
        _tile_loadd(7, run.b1 + at, 64);
        Tiles::multiply01();
      }
      if constexpr (MT == 2) {
        _tile_loadd(5, a1 + at, 64);
        Tiles::multiply10();
        if constexpr (NR == 2) Tiles::multiply11();
      }
      side.step();
    }
  }
  side.drain();
  store_sums<MT, NR>(run);
  tile_barrier(run.sums[0]);
}
