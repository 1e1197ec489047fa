// Where the codes of a block of cpu_tile16 stand (packing/cpu_tile16.h has the picture). Included inside a namespace: that of
// the packer, and those of the kernels per ISA, which must share no functions.

// `bits` bits of the codes of a quad: in vector `vector`, from bit `shift` of every byte on; in the code from `position` on.
struct CodePiece {
  int vector, shift, bits, position;
};

// In order; those that a quad does not have are of no bits.
struct CodePieces {
  CodePiece piece[3];
};

// Codes of so many successive quads stand whole in the bytes of one vector.
constexpr int whole_quads(int bits) { return 8 / bits; }

// Quads for which no whole place is left take what is left of the bytes, in two or three pieces.
constexpr CodePieces code_pieces(int bits, int quad) {
  constexpr CodePieces kThree[] = {{{{0, 6, 2, 0}, {2, 6, 1, 2}, {}}},
                                   {{{1, 6, 2, 0}, {2, 7, 1, 2}, {}}}};
  constexpr CodePieces kFive[] = {{{{0, 5, 3, 0}, {1, 5, 2, 3}, {}}},
                                  {{{2, 5, 3, 0}, {3, 5, 2, 3}, {}}},
                                  {{{4, 5, 3, 0}, {1, 7, 1, 3}, {3, 7, 1, 4}}}};
  constexpr CodePieces kSix[] = {{{{0, 6, 2, 0}, {1, 6, 2, 2}, {2, 6, 2, 4}}},
                                 {{{3, 6, 2, 0}, {4, 6, 2, 2}, {5, 6, 2, 4}}}};
  const int whole = whole_quads(bits), left = quad - bits * whole;  // of `bits` vectors
  if (left < 0) return {{{quad / whole, quad % whole * bits, bits, 0}, {}, {}}};
  return bits == 3 ? kThree[left] : bits == 5 ? kFive[left] : kSix[left];
}

// The quads of a block of 32 k, in an order that needs vectors in the order of addresses and few at the same time.
constexpr int quad_in_order(int bits, int i) {
  constexpr int kFive[] = {0, 1, 5, 2, 3, 6, 4, 7};
  constexpr int kSix[] = {0, 1, 2, 6, 3, 4, 5, 7};
  return bits == 5 ? kFive[i] : bits == 6 ? kSix[i] : i;
}
