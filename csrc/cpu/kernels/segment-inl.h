// Integer products: from the int32 sums of one segment of K to fp32. What dot_i8 and tiles_i8 share, so that they give
// the same bits. Included after V and zeros-inl.h.
//
//   sum_k (xq - xz) * (q - z) = sum xq*q - z * sum xq - xz * (sum q - z * count)

// One segment in units of scale(x). x_total is the sum of (xq - x_zero), `sum` that of xq * (q - less).
inline V::F finish_segment(ZeroKind kind, const SegmentZeros& z, V::I sum, int32_t x_total,
                           V::I code_sum, int32_t x_zero, int less = 0) {
  const V::I centred = V::isub(sum, V::imul(V::iset1(x_zero), code_sum));
  const V::I zero = less == 0 ? z.integer : V::isub(z.integer, V::iset1(less));
  const V::F exact = V::to_f(V::isub(centred, V::imul(zero, V::iset1(x_total))));
  const V::F total = V::set1(static_cast<float>(x_total));
  if (kind == ZeroKind::kFloat) return V::mul(V::sub(exact, V::mul(z.rest, total)), z.scale);
  if (kind == ZeroKind::kOffset) return V::add(V::mul(exact, z.scale), V::mul(z.rest, total));
  return V::mul(exact, z.scale);
}
