// gemm and gemm_a8 on AMX: blocking and threads' shares around the micro-kernel of amx_tiles-inl.h.
//
//   for 8 strips (128 columns of y)
//     for panels of K (8 steps: 256 k of bf16, 512 of int8)
//       for pairs of strips                   B: 16 KiB, decoded while the panel before it is multiplied
//         for 32 rows of x                    A: 16 KiB
//           for runs, for steps               2 x 2 tiles
//
// An output is summed over K ascending, in tiles and then (codes, integers) from segment to segment in fp32, whatever M
// and its neighbours are: batch-invariant. Included after V and the other amx_*-inl.h.

enum : int64_t { kBlockStrips = 8 };

// Two strips of decoded weights, and the sums of their codes per run (int8 with zeros of x).
struct PanelBuffer {
  alignas(64) uint8_t tiles[2][kPanelSteps * kTileBytes];
  alignas(64) uint8_t code_sums[2][kPanelSteps][64] = {};
};

// ---- decoding ------------------------------------------------------------------------------------------------------

struct Decoding {
  const WeightView& w;
  DecodeBlock decode;  // or null: tiles are read where the packed weight has them
  const void* codec;
  int64_t block_tile_bytes;  // what a block becomes: a tile, or half of one
};

// Decodes a panel of one or two strips, a block at a time.
class Decoder {
 public:
  explicit Decoder(const Decoding& how) : how_(how) {}

  // `chances`: how often advance() will be called; the blocks are spread over them.
  void start(const Panel& panel, int64_t strip, int strips, PanelBuffer& to, int64_t chances) {
    panel_ = &panel;
    to_ = &to;
    strip_ = strip;
    index_ = run_ = block_ = 0;
    group_ = -1;
    blocks_ = 0;
    for (int i = 0; i < panel.runs; ++i) blocks_ += panel.run[i].blocks;
    blocks_ *= strips;
    left_ = blocks_;
    chances_ = chances;
    credit_ = 0;
    sum_ = V::izero();
  }

  void advance() {
    for (credit_ += blocks_; credit_ >= chances_ && left_ > 0; credit_ -= chances_) decode_one();
  }
  void finish() {
    while (left_ > 0) decode_one();
  }

 private:
  void decode_one() {
    const WeightView& w = how_.w;
    const Run& run = panel_->run[run_];
    const uint8_t* base = w.data + (strip_ + index_) * w.strip_bytes;
    const int64_t k = run.k0 + block_ * 32;
    const uint8_t* block = base + k / 32 * w.block_bytes;
    // The same block of the next panel, which comes after the other strips: no hardware prefetcher sees it coming.
    const int64_t ahead = kPanelSteps * (kTileBytes / how_.block_tile_bytes) * w.block_bytes;
    for (int64_t i = 0; i < w.block_bytes; i += 64) __builtin_prefetch(block + ahead + i, 0, 2);
    if (how_.decode != nullptr) {
      const int64_t g = k / w.group_size < w.groups ? k / w.group_size : w.groups - 1;
      if (g != group_) {
        group_ = g;
        state_ = tile_group(w, base, g);
      }
      uint8_t* to = to_->tiles[index_] + run.step0 * kTileBytes + block_ * how_.block_tile_bytes;
      how_.decode(how_.codec, block, state_, to, sum_);
      // An odd number of half tiles: zeros complete the last.
      const bool last = block_ + 1 == run.blocks;
      if (last && how_.block_tile_bytes < kTileBytes) {
        if (run.blocks % 2 == 1) __builtin_memset(to + kTileBytes / 2, 0, kTileBytes / 2);
        V::istore(to_->code_sums[index_][run_], sum_);
        sum_ = V::izero();
      }
    }
    --left_;
    if (++block_ < run.blocks) return;
    block_ = 0;
    if (++run_ < panel_->runs) return;
    run_ = 0;
    ++index_;
    group_ = -1;
  }

  const Decoding& how_;
  const Panel* panel_ = nullptr;
  PanelBuffer* to_ = nullptr;
  int64_t strip_ = 0, group_ = -1;
  int index_ = 0, run_ = 0, block_ = 0;  // the next block
  int64_t blocks_ = 0, left_ = 0, chances_ = 1, credit_ = 0;
  TileGroup state_{};
  V::I sum_{};
};

// ---- folding: finished segments into fp32 sums ---------------------------------------------------------------------

// A tile of one segment's sums, waiting.
struct Segment {
  const uint8_t* part;  // [16][16] fp32 or int32
  float* total;         // [16][16]
  int64_t strip, segment, row, rows;
  V::I code_sum;
};

// No segments: tiles are totals already.
struct NoFold {
  static constexpr bool kFolds = false, kIntegers = false;
  void operator()(const Segment&) const {}
};

// total += scale * part
struct ScaleFold {
  static constexpr bool kFolds = true, kIntegers = false;
  const GemmJob& job;

  void operator()(const Segment& s) const {
    const V::F scale = group_scales(job.w, job.w.data + s.strip * job.w.strip_bytes, s.segment);
    for (int64_t r = 0; r < s.rows; ++r) {
      const V::F part = V::load(reinterpret_cast<const float*>(s.part) + r * 16);
      V::store(s.total + r * 16, V::fma(part, scale, V::load(s.total + r * 16)));
    }
  }
};

// total += the exact integer sum times its scale, in dot_i8's order and with its roundings
struct IntegerFold {
  static constexpr bool kFolds = true, kIntegers = true;
  const GemmJob& job;

  void operator()(const Segment& s) const {
    const WeightView& w = job.w;
    const Activations& x = job.x;
    const int64_t segments = w.groups * x.segments_per_group;
    const int64_t g = s.segment / x.segments_per_group;
    const int64_t group_end = g + 1 == w.groups ? w.K : (g + 1) * w.group_size;
    const int64_t begin = g * w.group_size + s.segment % x.segments_per_group * x.segment;
    const int64_t end = begin + x.segment < group_end ? begin + x.segment : group_end;
    SegmentZeros zeros = segment_zeros<8>(w, w.data + s.strip * w.strip_bytes, g);
    if (w.zero_kind == ZeroKind::kNone) zeros.integer = V::iset1(1 << (w.bits - 1));
    if (x.zeros == nullptr && w.zero_kind == ZeroKind::kNone) {
      symmetric(s, x.sums + s.row * segments + s.segment, segments, zeros.scale);
      return;
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t m = s.row + r;
      const int32_t x_zero = x.zeros == nullptr ? 0 : x.zeros[m];
      const int32_t x_total =
          x.sums[m * segments + s.segment] - x_zero * static_cast<int32_t>(end - begin);
      const V::F value = finish_segment(w.zero_kind, zeros, V::iload(s.part + r * 64), x_total,
                                        s.code_sum, x_zero);
      V::store(s.total + r * 16, V::add(V::load(s.total + r * 16), value));
    }
  }

 private:
  // The same without zeros, in half the instructions: where groups are short, folding is what takes the time.
  void symmetric(const Segment& s, const int32_t* x_sums, int64_t stride, V::F scale) const {
    const int32_t middle = 1 << (job.w.bits - 1);
    for (int64_t r = 0; r < s.rows; ++r) {
      const V::I sum = V::isub(V::iload(s.part + r * 64), V::iset1(middle * x_sums[r * stride]));
      V::store(s.total + r * 16, V::add(V::load(s.total + r * 16), V::mul(V::to_f(sum), scale)));
    }
  }
};

// What goes on beside the tile unit: the next panel is decoded and the run before is folded.
template <class Fold>
struct SideWork {
  Decoder& ahead;
  const Fold& fold;
  int next = 0, waiting = 0;
  Segment segments[4];

  void step() {
    ahead.advance();
    if (next < waiting) fold(segments[next++]);
  }
  void drain() {
    while (next < waiting) fold(segments[next++]);
    next = waiting = 0;
  }
};

// ---- blocking ------------------------------------------------------------------------------------------------------

template <class Tiles, class Fold>
class TileGemm {
 public:
  TileGemm(const GemmJob& job, const Decoding& how, const Fold& fold, int64_t segment,
           int64_t per_group)
      : job_(job),
        how_(how),
        fold_(fold),
        segment_(segment),
        per_group_(per_group),
        row_tiles_((job.x.M + 15) / 16),
        steps_(tile_steps(job.w, segment, per_group, Tiles::kStepK)),
        decoder_(how),
        side_{decoder_, fold, 0, 0, {}} {}

  void run(int64_t begin, int64_t end) {
    configure_tiles(job_.x.M);
    for (int64_t strip = begin; strip < end; strip += kBlockStrips)
      block(strip, end - strip < kBlockStrips ? end - strip : static_cast<int64_t>(kBlockStrips));
    release_tiles();
  }

 private:
  // Up to eight strips, all of K.
  void block(int64_t strip, int64_t strips) {
    const int64_t pairs = (strips + 1) / 2;
    if constexpr (Fold::kFolds) {
      for (int64_t i = 0; i < pairs * row_tiles_ * 2 * 256; ++i) totals_[i] = 0.0f;
    }
    Panels panels(job_.w, segment_, per_group_, Tiles::kStepK);
    Panel panel[2];
    int now = 0, buffer = 0;
    bool more = panels.next(panel[0]);
    decoder_.start(panel[0], strip, strips > 1 ? 2 : 1, buffers_[0], 1);
    decoder_.finish();
    while (more) {
      more = panels.next(panel[now ^ 1]);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int count = strips - 2 * pair > 1 ? 2 : 1;
        const bool within = pair + 1 < pairs;
        if (within || more) {
          const int64_t ahead = within ? pair + 1 : 0;
          decoder_.start(within ? panel[now] : panel[now ^ 1], strip + 2 * ahead,
                         strips - 2 * ahead > 1 ? 2 : 1, buffers_[buffer ^ 1], chances(panel[now]));
        }
        multiply_panel(panel[now], strip + 2 * pair, count, pair, buffers_[buffer]);
        decoder_.finish();
        buffer ^= 1;
      }
      now ^= 1;
    }
    side_.drain();
    write(strip, strips);
  }

  // How many steps of the micro-kernel a panel takes.
  int64_t chances(const Panel& panel) const {
    const Run& last = panel.run[panel.runs - 1];
    return (row_tiles_ + 1) / 2 * job_.x.tile_planes * (last.step0 + last.steps);
  }

  void multiply_panel(const Panel& panel, int64_t strip, int strips, int64_t pair,
                      const PanelBuffer& buffer) {
    if constexpr (Fold::kIntegers) add_code_sums(panel, strips, pair, buffer);
    for (int64_t tile = 0; tile < row_tiles_; tile += 2) {
      for (int i = 0; i < panel.runs; ++i) {
        if (row_tiles_ - tile > 1) {
          strips == 2 ? multiply<2, 2>(panel, i, strip, pair, tile, buffer)
                      : multiply<2, 1>(panel, i, strip, pair, tile, buffer);
        } else {
          strips == 2 ? multiply<1, 2>(panel, i, strip, pair, tile, buffer)
                      : multiply<1, 1>(panel, i, strip, pair, tile, buffer);
        }
      }
    }
  }

  template <int MT, int NR>
  void multiply(const Panel& panel, int index, int64_t strip, int64_t pair, int64_t tile,
                const PanelBuffer& buffer) {
    const Run& run = panel.run[index];
    const int64_t plane_bytes = steps_ * kTileBytes, row_bytes = job_.x.tile_planes * plane_bytes;
    TileRun t;
    t.a0 = job_.x.tiles + tile * row_bytes + (panel.step0 + run.step0) * kTileBytes;
    t.a1 = t.a0 + row_bytes;
    t.plane_bytes = plane_bytes;
    t.planes = job_.x.tile_planes;
    t.b0 = weights(run, strip, 0, buffer);
    t.b1 = NR == 2 ? weights(run, strip, 1, buffer) : nullptr;
    t.steps = run.steps;
    t.zero = run.first;
    const bool whole = Fold::kFolds && run.first && run.last;
    uint8_t* parts = whole ? scratch_[scratch_turn_ ^= 1] : stored(pair, tile);
    for (int i = 0; i < 4; ++i) t.sums[i] = parts + i * kTileBytes;
    multiply_run<MT, NR, Tiles>(t, side_);
    if constexpr (Fold::kFolds) {
      if (run.last) {
        for (int i = 0; i < MT; ++i) {
          for (int s = 0; s < NR; ++s) wait(run, index, strip, pair, tile, i, s, t.sums[2 * i + s]);
        }
      }
    }
  }

  // A tile of a finished segment goes to the side work of the next run.
  void wait(const Run& run, int index, int64_t strip, int64_t pair, int64_t tile, int i, int s,
            const uint8_t* part) {
    const int64_t row = (tile + i) * 16, left = job_.x.M - row;
    side_.segments[side_.waiting++] = {
        part,
        total(pair, tile + i, s),
        strip + s,
        run.segment,
        row,
        left < 16 ? left : 16,
        Fold::kIntegers ? V::iload(run_sums_[s][index]) : V::izero()};
  }

  // Sums of codes: runs of a segment that spans panels add up.
  void add_code_sums(const Panel& panel, int strips, int64_t pair, const PanelBuffer& buffer) {
    for (int s = 0; s < strips; ++s) {
      for (int i = 0; i < panel.runs; ++i) {
        uint8_t* sum = code_sums_[2 * pair + s];
        const V::I before = panel.run[i].first ? V::izero() : V::iload(sum);
        const V::I now = V::iadd(before, V::iload(buffer.code_sums[s][i]));
        V::istore(sum, now);
        V::istore(run_sums_[s][i], now);
      }
    }
  }

  const uint8_t* weights(const Run& run, int64_t strip, int s, const PanelBuffer& buffer) const {
    const WeightView& w = job_.w;
    return how_.decode != nullptr
               ? buffer.tiles[s] + run.step0 * kTileBytes
               : w.data + (strip + s) * w.strip_bytes + run.k0 / 32 * w.block_bytes;
  }

  // Row tiles of a pair of strips stand together: [pair][row tile][strip][16][16].
  float* total(int64_t pair, int64_t tile, int s) {
    return totals_ + ((pair * row_tiles_ + tile) * 2 + s) * 256;
  }
  uint8_t* stored(int64_t pair, int64_t tile) {
    float* base = Fold::kFolds ? parts_ : totals_;
    return reinterpret_cast<uint8_t*>(base + (pair * row_tiles_ + tile) * 2 * 256);
  }

  void write(int64_t strip, int64_t strips) {
    for (int64_t m = 0; m < job_.x.M; ++m) {
      for (int64_t s = 0; s < strips; ++s) {
        const float* sums = total(s / 2, m / 16, static_cast<int>(s % 2)) + m % 16 * 16;
        V::F value = V::load(sums);
        if constexpr (Fold::kIntegers) value = V::mul(value, V::set1(job_.x.scales[m]));
        write_tile_row(job_.y, job_.w.N, m, (strip + s) * 16, value);
      }
    }
  }

  static constexpr int64_t kTotals = kTilePassRows * kBlockStrips * 16;

  const GemmJob& job_;
  const Decoding& how_;
  const Fold& fold_;
  const int64_t segment_, per_group_;
  const int64_t row_tiles_, steps_;
  Decoder decoder_;
  SideWork<Fold> side_;
  int scratch_turn_ = 0;
  PanelBuffer buffers_[2];
  alignas(64) uint8_t scratch_[2][4 * kTileBytes];
  alignas(64) uint8_t code_sums_[kBlockStrips][64];
  alignas(64) uint8_t run_sums_[2][kPanelSteps][64];
  alignas(64) float totals_[kTotals];
  alignas(64) float parts_[Fold::kFolds ? kTotals : 16];  // of segments longer than a panel
};

// ---- entry points --------------------------------------------------------------------------------------------------

void gemm_codes(const GemmJob& job, int64_t begin, int64_t end) {
  with_code_decoder(job.w, [&](DecodeBlock decode, const void* codec) {
    const Decoding how{job.w, decode, codec, kTileBytes};
    const ScaleFold fold{job};
    TileGemm<BFloatTiles, ScaleFold>(job, how, fold, job.w.group_size, 1).run(begin, end);
  });
}

void gemm_weights(const GemmJob& job, int64_t begin, int64_t end) {
  with_weight_decoder(job.w, [&](DecodeBlock decode, const void* codec) {
    const Decoding how{job.w, decode, codec, kTileBytes};
    const NoFold fold;
    TileGemm<BFloatTiles, NoFold>(job, how, fold, 0, 0).run(begin, end);
  });
}

// Eight-bit codes are tiles already, where every segment is made of whole ones and their sums are not asked for.
void gemm_i8(const GemmJob& job, int64_t begin, int64_t end) {
  const WeightView& w = job.w;
  const bool in_place = w.bits == 8 && job.x.zeros == nullptr && w.K_padded % 64 == 0 &&
                        (w.groups == 1 || w.group_size % 64 == 0);
  const Decoding how{w, in_place ? nullptr : i8_decoder(w.bits), nullptr, kTileBytes / 2};
  const IntegerFold fold{job};
  TileGemm<Int8Tiles, IntegerFold>(job, how, fold, job.x.segment, job.x.segments_per_group)
      .run(begin, end);
}
