// bf16 for AVX-512 with dot products: operands are packed as pairs in 32-bit lanes, and one
// micro-kernel multiplies them.
#pragma once
#include "panels.h"

namespace peftops::ISA {
namespace {

// The mask of the first `count` of 32 lanes.
PEFTOPS_INLINE uint32_t mask32(int64_t count) {
  if (count >= 32) return ~0u;
  return count <= 0 ? 0 : (1u << count) - 1;
}
PEFTOPS_INLINE uint16_t mask16(int64_t count) { return uint16_t(mask32(min(count, 16))); }

// Sixteen pairs as they lie in memory.
PEFTOPS_INLINE __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
// One pair in all lanes.
PEFTOPS_INLINE __m512bh pair(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}
// One element and zero in all lanes.
PEFTOPS_INLINE __m512bh single(const bf16* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }

PEFTOPS_INLINE __m512 widen16(__m256i v) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}
PEFTOPS_INLINE __m512 low(__m512i v) { return widen16(_mm512_castsi512_si256(v)); }
PEFTOPS_INLINE __m512 high(__m512i v) { return widen16(_mm512_extracti64x4_epi64(v, 1)); }
PEFTOPS_INLINE __m512i narrow32(__m512 lo, __m512 hi) {
  return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}

// Loads up to 32 values as bf16; zeros beyond.
PEFTOPS_INLINE __m512i load32(const bf16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(mask32(count), p);
}
PEFTOPS_INLINE __m512i load32(const float* p, int64_t count) {
  return narrow32(_mm512_maskz_loadu_ps(mask16(count), p),
                  _mm512_maskz_loadu_ps(mask16(count - 16), p + 16));
}
// Loads up to 16 values as floats that are rounded to bf16; zeros beyond.
PEFTOPS_INLINE __m512 load16(const bf16* p, int64_t count) {
  return widen16(_mm256_maskz_loadu_epi16(mask16(count), p));
}
PEFTOPS_INLINE __m512 load16(const float* p, int64_t count) {
  return widen16((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask16(count), p)));
}
// 32 values times lo (the first 16) and hi, rounded.
PEFTOPS_INLINE __m512i scaled(__m512i v, __m512 lo, __m512 hi) {
  return narrow32(_mm512_mul_ps(low(v), lo), _mm512_mul_ps(high(v), hi));
}

// Prefetches a block that is read next. Its rows are too short for the hardware's prefetcher.
PEFTOPS_INLINE void prefetch(const bf16* p, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += 32)
      _mm_prefetch((const char*)(p + i * ld + c), _MM_HINT_T0);
}

// Transposes sixteen rows of sixteen 32-bit lanes.
PEFTOPS_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// out[column / 2][row] = pairs along the columns of (rows, columns).
//   ld: elements from row to row
//   width: rows of out; those beyond `rows` are zero
//   gain: (columns,) multiplies columns, or null
//   ldo: words of out from pair to pair; 0 means width
template <class T>
void pack_columns(const T* from, int64_t ld, int64_t rows, int64_t columns, uint32_t* out,
                  int64_t width, const float* gain = nullptr, int64_t ldo = 0) {
  ldo = ldo ? ldo : width;
  for (int64_t r = 0; r < width; r += 16)
    for (int64_t c = 0; c < columns; c += 32) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i) {
        _mm_prefetch((const char*)(from + (r + i + 16) * ld + c), _MM_HINT_T0);
        v[i] = r + i < rows ? load32(from + (r + i) * ld + c, columns - c)
                            : _mm512_setzero_si512();
        if (gain)
          v[i] = scaled(v[i], _mm512_maskz_loadu_ps(mask16(columns - c), gain + c),
                        _mm512_maskz_loadu_ps(mask16(columns - c - 16), gain + c + 16));
      }
      transpose(v);
      uint32_t* to = out + c / 2 * ldo + r;
      const int64_t count = min(16, (columns - c + 1) / 2);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + i * ldo, v[i]);
    }
}

// out[row / 2][column] = pairs along the rows of (rows, columns).
//   ld: elements from row to row
//   width: columns of out; those beyond `columns` are zero
//   gain: (rows,) multiplies rows, or null
template <class T>
void pack_rows(const T* from, int64_t ld, int64_t rows, int64_t columns, uint32_t* out,
               int64_t width, const float* gain = nullptr) {
  const __m512i first =
      _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                       6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < width; c += 32) {
      const bool both = r + 1 < rows;
      __m512i u = load32(from + r * ld + c, columns - c), v = _mm512_setzero_si512();
      if (both) v = load32(from + (r + 1) * ld + c, columns - c);
      if (gain) u = scaled(u, _mm512_set1_ps(gain[r]), _mm512_set1_ps(gain[r]));
      if (gain && both) v = scaled(v, _mm512_set1_ps(gain[r + 1]), _mm512_set1_ps(gain[r + 1]));
      uint32_t* to = out + r / 2 * width + c;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(u, first, v));
      if (c + 16 < width) _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(u, second, v));
    }
}

// acc += x · w of pair c of each row. w: the pair's words
template <int MR, int NV>
PEFTOPS_INLINE void multiply_pair(const bf16* const (&row)[MR], int64_t c, const uint32_t* w,
                                  __m512 (&acc)[MR][NV]) {
  __m512bh t_w[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) t_w[v] = pairs(w + 16 * v);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const __m512bh t_x = pair(row[i] + 2 * c);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], t_w[v], t_x);
  }
}

// acc[i][v] += Σ x[i][c] · w[c][16 · v + lane] over c < k. w is packed: [pair of c][column],
// ldw words from pair to pair.
template <int MR, int NV>
PEFTOPS_INLINE void multiply(const bf16* x, int64_t ldx, int64_t k, const uint32_t* w,
                             int64_t ldw, __m512 (&acc)[MR][NV]) {
  const bf16* row[MR];
  for (int i = 0; i < MR; ++i) row[i] = x + i * ldx;
  int64_t c = 0;
  // So few sums do not hide the latency of an instruction: every second pair has its own.
  if constexpr (MR * NV <= 12) {
    __m512 odd[MR][NV] = {};
    for (; c + 2 <= k / 2; c += 2) {
      multiply_pair(row, c, w + c * ldw, acc);
      multiply_pair(row, c + 1, w + (c + 1) * ldw, odd);
    }
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_add_ps(acc[i][v], odd[i][v]);
  }
  for (; c < k / 2; ++c) multiply_pair(row, c, w + c * ldw, acc);
  if (k % 2)
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v)
        acc[i][v] = _mm512_dpbf16_ps(acc[i][v], pairs(w + k / 2 * ldw + 16 * v),
                                     single(row[i] + k - 1));
}

// Calls f(first vector, Count of vectors) for all ranks, sixteen in a vector. padded:
// pad16(ranks)
template <class F>
PEFTOPS_INLINE void by_ranks(int64_t padded, F f) {
  by_rows<4, 2, 1>(0, padded / 16, f);
}

}  // namespace
}  // namespace peftops::ISA
