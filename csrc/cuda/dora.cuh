// What the kernels of dora_norm share: their argument, the fragments that b and a become, and
// how a lane meets Ŵ.
//
// A warp's tile is a band of 32 rows and a unit of 64 columns. Of a sum of squares the order is
// free, so rows and columns are dealt to the tensor cores' lanes as Ŵ is read best: lane 4g + t
// has rows 4g to 4g + 3 of the band, and two eights of columns, which lie together where eight
// are a word of codes.
#pragma once
#include "nf4.cuh"

namespace peftops::cuda {

struct Norm {         // out = ‖Ŵ + s·b·a‖ of each row
  float *out, *sums;  // (n,), and squares (splits, n) of each part of k
  uint4 *a, *b;  // fragments: [unit][step][eight, half][lane] and [band][step][half][lane], a
                 // step is 16 ranks
  const void *w, *from_a, *from_b;
  const float* scale;
  int n, k, r, steps, splits;
  bool wide_a, wide_b;  // fp32, whatever x is
  Form form;
  Nf4 base;
};

// More than 64 ranks, in 16 bits
int launch_dora_wide(const Norm& g, Dtype dtype, uintptr_t stream);
// What is not read 16 bytes at a time, and fp32
int launch_dora_plain(const Norm& g, Dtype dtype, uintptr_t stream);

namespace {

constexpr int BAND = 32, UNIT = 64, STEP = 16,
              COPIES = 32;  // of the table of a 4-bit base: one for each lane
constexpr int FRAGMENTS_A = 4 * 32, FRAGMENTS_B = 2 * 32;  // of a step

// Columns of the unit, from which a lane has eight
template <Form F>
DEVICE int column_of(int eight, int t) {
  return F == Form::nf4 ? t * 16 + eight * 8 : eight * 32 + t * 8;
}

// How a lane's part of a band and a unit is read: rows of an eight, columns of four rows, or
// rows of both eights
template <Form F>
struct Pieces {
  static constexpr int BYTES = F == Form::dense ? 16 : 8, COUNT = F == Form::dense ? 8
                                                                  : F == Form::nf4 ? 4
                                                                                   : 16;
  static constexpr int WORDS = BYTES / 4,
                       EIGHT = F == Form::nf4 ? COUNT : COUNT / 2;  // pieces of an eight
};

// Where a piece lies, or null past the last row or column
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

// What else a lane needs of a 4-bit base
struct Decoder {
  const float *table, *nested_table;  // the table's copy of this lane; both in shared memory
  float offset;
};

DEVICE Decoder decoder_of(const Nf4& base, float* s_table, float* s_nested) {
  for (int i = threadIdx.x; i < 16 * COPIES; i += blockDim.x)
    s_table[i] = base.table[i / COPIES];
  for (int i = threadIdx.x; base.nested && i < NESTED; i += blockDim.x)
    s_nested[i] = base.nested_table[i];
  return {s_table + threadIdx.x % COPIES, s_nested, base.nested ? *base.offset : 0.0f};
}

// Eight elements of a row, of the words of these pieces
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

// Σ (w + s·acc)² of eight elements of a row, which is one half of the accumulators
DEVICE float squares(const float (&w)[8], float scale, const float (&acc)[4][4], int half) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = w[i] + scale * acc[i / 2][half * 2 + i % 2];
    sum += v * v;
  }
  return sum;
}

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

struct Part {
  int first, last;  // tiles of k
};
DEVICE Part part_of(const Norm& g, int split, int width) {
  const int tiles = (g.k + width - 1) / width, each = (tiles + g.splits - 1) / g.splits;
  return {min(tiles, split * each), min(tiles, (split + 1) * each)};
}

}  // namespace
}  // namespace peftops::cuda
