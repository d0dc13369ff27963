// What the kernels of dora_norm share: their argument, the layout of b and a, and how a lane
// reads Ŵ.
//
// A warp's tile is a band of 32 rows and a unit of 64 columns. A sum of squares may be added in
// any order, so rows and columns are given to the tensor cores' lanes as Ŵ is read best: lane
// 4g + t has the rows 4g to 4g + 3 of the band and two eights of columns. The two eights are
// neighbours if Ŵ has 4 bits, where eight columns are one 32-bit word.
//
// b and a are laid out as "fragments": the registers that the lanes of a warp pass to one
// instruction of the tensor cores, lane by lane, so that a lane loads its own 16 bytes.
#pragma once
#include "nf4.cuh"

namespace peftops::cuda {

// out = ‖Ŵ + s·b·a‖ of each row of Ŵ.
struct Norm {
  float* out;          // (n,)
  float* sums;         // scratch (splits, n): the sum of squares over each part of k
  uint4* a;            // scratch: fragments [unit][step][eight, half][lane]
  uint4* b;            // scratch: fragments [band][step][half][lane]
  const void* w;       // (n, k), or (k, n) if transposed; null if Ŵ has 4 bits
  const void* from_a;  // a (r, k)
  const void* from_b;  // b (n, r)
  const float* scale;  // (1,): s
  int n, k, r;
  int steps;    // of 16 ranks, in fragments
  int splits;   // parts of k, each for other blocks
  bool wide_a;  // a is fp32
  bool wide_b;  // b is fp32
  Form form;    // of w: dense, transposed or nf4
  Nf4 base;
};

// For more than 64 ranks, in 16 bits.
int launch_dora_wide(const Norm& g, Dtype dtype, uintptr_t stream);
// For fp32, and for weights that cannot be read 16 bytes at a time.
int launch_dora_plain(const Norm& g, Dtype dtype, uintptr_t stream);

namespace {

constexpr int BAND = 32;    // rows of a warp's tile
constexpr int UNIT = 64;    // columns of a warp's tile
constexpr int STEP = 16;    // ranks that one instruction multiplies
constexpr int COPIES = 32;  // of the table of a 4-bit base: one for each lane
constexpr int FRAGMENTS_A = 4 * 32, FRAGMENTS_B = 2 * 32;  // of a step, 16 bytes each

// Where in a unit the first or second (`eight`) eight columns of lane 4g + t begin.
template <Form F>
DEVICE int column_of(int eight, int t) {
  return F == Form::nf4 ? t * 16 + eight * 8 : eight * 32 + t * 8;
}

// How a lane reads its 4 rows and 16 columns of a tile. A piece is one load: eight columns of a
// row (dense), four rows of a column (transposed), or sixteen columns of a row (nf4).
template <Form F>
struct Pieces;
template <>
struct Pieces<Form::dense> {
  static constexpr int BYTES = 16;  // of a piece
  static constexpr int COUNT = 8;   // pieces of a tile
  static constexpr int EIGHT = 4;   // pieces that hold one eight
};
template <>
struct Pieces<Form::transposed> {
  static constexpr int BYTES = 8;
  static constexpr int COUNT = 16;
  static constexpr int EIGHT = 8;
};
template <>
struct Pieces<Form::nf4> {
  static constexpr int BYTES = 8;
  static constexpr int COUNT = 4;
  static constexpr int EIGHT = 4;  // the same four: each holds both eights
};

// Where piece p of a lane lies, or null past the last row or column.
//   row: the lane's first row; column: the unit's first column; t: lane % 4
template <Form F>
DEVICE const void* piece(const Norm& g, int row, int column, int t, int p) {
  constexpr int EIGHT = Pieces<F>::EIGHT;
  const int eight = p / EIGHT, i = p % EIGHT;
  column += column_of<F>(eight, t);
  if (column >= g.k || row + (F == Form::transposed ? 0 : i) >= g.n) return nullptr;
  if (F == Form::transposed)
    return static_cast<const char*>(g.w) + (int64_t(column + i) * g.n + row) * 2;
  const int64_t at = int64_t(row + i) * g.k + column;
  return F == Form::nf4 ? g.base.codes + at / 2 : static_cast<const uint8_t*>(g.w) + at * 2;
}

// What a lane needs to decode a 4-bit base, besides codes and scales.
struct Decoder {
  const float* table;         // this lane's copy of the 16 values, in shared memory
  const float* nested_table;  // (256,) in shared memory
  float offset;               // of nested scales
};

// Fills the tables in shared memory. Threads have to meet before they use them.
DEVICE Decoder decoder_of(const Nf4& base, float* s_table, float* s_nested) {
  for (int i = threadIdx.x; i < 16 * COPIES; i += blockDim.x)
    s_table[i] = base.table[i / COPIES];
  for (int i = threadIdx.x; base.nested && i < NESTED; i += blockDim.x)
    s_nested[i] = base.nested_table[i];
  return {s_table + threadIdx.x % COPIES, s_nested, base.nested ? *base.offset : 0.0f};
}

// The eight elements of one of the lane's rows.
//   words: the pieces that hold this eight
//   row: 0 to 3; absmax: the row's, if Ŵ has 4 bits
template <Form F, class T>
DEVICE void row_of(float (&out)[8], const uint32_t (&words)[16], int row, int eight,
                   const Decoder& decoder, float absmax) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (F == Form::nf4) {
      const int code = words[row * 2 + eight] >> (i ^ 1) * 4 & 15;
      out[i] = rounded<T>(__fmul_rn(decoder.table[code * COPIES], absmax));
    } else {
      const uint32_t word = F == Form::dense ? words[row * 4 + i / 2] : words[i * 2 + row / 2];
      const uint16_t bits = word >> (F == Form::dense ? i % 2 : row % 2) * 16;
      out[i] = widen(*reinterpret_cast<const T*>(&bits));
    }
  }
}

// Σ (w + s·acc)² over eight elements of a row. half: which half of the accumulators is the
// row's.
DEVICE float squares(const float (&w)[8], float scale, const float (&acc)[4][4], int half) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = w[i] + scale * acc[i / 2][half * 2 + i % 2];
    sum += v * v;
  }
  return sum;
}

// acc += b·a of one step, for the lane's four rows and one eight of its columns.
template <class T>
DEVICE void multiply(float (&acc)[2][4][4], const uint4 (&b)[2], const uint4& a0,
                     const uint4& a1) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t left[] = {b[i].x, b[i].y, b[i].z, b[i].w};
    multiply<T>(acc[i][0], left, a0.x, a0.y);
    multiply<T>(acc[i][1], left, a0.z, a0.w);
    multiply<T>(acc[i][2], left, a1.x, a1.y);
    multiply<T>(acc[i][3], left, a1.z, a1.w);
  }
}

// The tiles [first, last) of k that a block walks.
struct Part {
  int first, last;
};
// width: columns of a tile
DEVICE Part part_of(const Norm& g, int split, int width) {
  const int tiles = (g.k + width - 1) / width;
  const int each = (tiles + g.splits - 1) / g.splits;
  return {min(tiles, split * each), min(tiles, (split + 1) * each)};
}

}  // namespace
}  // namespace peftops::cuda
