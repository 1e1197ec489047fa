// The search for a better scale than round-to-nearest's: its parts, included after quantize/rules-inl.h. Besides what that asks
// for, the includer has a Float64, which converts to and from Float32.
//
// The search starts from round-to-nearest, tries a grid of smaller and larger ranges (with negative scales where the codes of a
// format reach further, or lie closer, on one side of 0), then refits scale (and offset) by least squares to the codes found, and
// keeps a candidate only if its squared error is smaller: never worse than round-to-nearest on any group. The error is
// summed in fp64 over 16 fixed lanes, so that the choice is the same on every ISA and device.

enum : int { kSearchSteps = 64, kSearchRefits = 4 };
LOWBIT_HD inline int search_steps(CodeGrid grid) {
  return grid.scales.dtype == ScaleDtype::kE8m0 ? 2 : kSearchSteps;
}

// Only a group whose extent and scale are finite is searched.
LOWBIT_HD inline bool searchable(Range r, Affine p) {
  const Float32 infinity = bits_float(0x7f800000u);
  return !r.has_nan && r.high - r.low < infinity && p.scale < infinity;
}

// Step i takes this much of the range: 0.40 .. 1.15. Two bits want to clip half of it, symmetric codes gain by reaching a
// little further. The sign is that of the scale: where both are tried, each has every other step, which loses nothing that
// the refits do not find again.
template <ZeroKind kKind>
LOWBIT_HD inline Float32 search_factor(CodeGrid grid, Range r, int step) {
  if (grid.scales.dtype == ScaleDtype::kE8m0)  // the powers beside round-to-nearest's
    return step == 0 ? 0.5f : step == 1 ? 2.0f : 1.0f;
  const Float32 factor = 0.40f + 0.012f * static_cast<Float32>(step);
  if (kKind != ZeroKind::kNone || grid.mirror == Mirror::kNothing) return factor;
  const bool negative = grid.mirror == Mirror::kBoth ? (step & 1) != 0 : r.high > -r.low;
  return negative ? -factor : factor;
}

// Neither 0 nor Inf nor NaN.
LOWBIT_HD inline bool usable_scale(Float32 scale) { return scale != 0.0f && scale - scale == 0.0f; }

LOWBIT_HD inline Float64 error_term(Float32 x, Float32 value) {
  const Float64 difference = static_cast<Float64>(x) - static_cast<Float64>(value);
  return difference * difference;
}

// Sums over a group for least squares of x ~ level * scale (+ offset): of weight times 1, level, level^2, x, level * x.
struct Moments {
  Float64 w, l, ll, x, lx;
};

template <ZeroKind kKind>
LOWBIT_HD inline Affine refit_of(Moments s, Affine p) {
  if (kKind == ZeroKind::kOffset || kKind == ZeroKind::kFloat) {
    const Float64 determinant = s.w * s.ll - s.l * s.l;
    if (determinant > Float64(0)) {
      const Float64 scale = (s.w * s.lx - s.l * s.x) / determinant;
      const Float64 offset =
          (s.x - scale * s.l) / s.w;  // of level, i.e. added to (q - zero) * scale
      const Float32 zero = p.zero;
      p.scale = static_cast<Float32>(scale);
      p.offset = static_cast<Float32>(offset);
      if (kKind == ZeroKind::kFloat && scale > Float64(0))
        p.zero = static_cast<Float32>(static_cast<Float64>(zero) - offset / scale);
    }
  } else if (s.ll > Float64(0)) {
    p.scale = static_cast<Float32>(s.lx / s.ll);
  }
  return p;
}
