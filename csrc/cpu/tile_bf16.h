// bf16 on AVX-512 with dot products: operands as pairs in 32-bit lanes, and the one
// micro-kernel that multiplies them.
#pragma once
#include "panels.h"

namespace peftops::ISA {
namespace {

PEFTOPS_INLINE uint32_t mask32(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}
PEFTOPS_INLINE uint16_t mask16(int64_t count) { return uint16_t(mask32(min(count, 16))); }

PEFTOPS_INLINE __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
PEFTOPS_INLINE __m512bh pair(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}
PEFTOPS_INLINE __m512bh single(const bf16* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }

PEFTOPS_INLINE __m512 widen16(__m256i v) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}
PEFTOPS_INLINE __m512 low(__m512i v) { return widen16(_mm512_castsi512_si256(v)); }
PEFTOPS_INLINE __m512 high(__m512i v) { return widen16(_mm512_extracti64x4_epi64(v, 1)); }
PEFTOPS_INLINE __m512i narrow32(__m512 lo, __m512 hi) {
  return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}

// Up to 32 values as bf16, zero beyond.
PEFTOPS_INLINE __m512i load32(const bf16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(mask32(count), p);
}
PEFTOPS_INLINE __m512i load32(const float* p, int64_t count) {
  return narrow32(_mm512_maskz_loadu_ps(mask16(count), p),
                  _mm512_maskz_loadu_ps(mask16(count - 16), p + 16));
}
// Up to 16 values as float, rounded to bf16.
PEFTOPS_INLINE __m512 load16(const bf16* p, int64_t count) {
  return widen16(_mm256_maskz_loadu_epi16(mask16(count), p));
}
PEFTOPS_INLINE __m512 load16(const float* p, int64_t count) {
  return widen16((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask16(count), p)));
}
PEFTOPS_INLINE __m512i scaled(__m512i v, __m512 lo, __m512 hi) {
  return narrow32(_mm512_mul_ps(low(v), lo), _mm512_mul_ps(high(v), hi));
}

// Hints for a block that is read next, in short rows that no hardware prefetcher follows.
PEFTOPS_INLINE void prefetch(const bf16* p, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += 32)
      _mm_prefetch((const char*)(p + i * ld + c), _MM_HINT_T0);
}

// Sixteen rows of sixteen 32-bit lanes, transposed.
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
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88),
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// out[column / 2][row] = pairs along the columns of (rows, columns), for `width` rows of which
// the last may be absent; gain, where there is one, multiplies columns.
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

// out[row / 2][column] = pairs along the rows of (rows, columns), for `width` columns of which
// the last may be absent; gain, where there is one, multiplies rows.
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

// acc[i][16 v + lane] += x[i][0 … k) · w, with w[k / 2][column] pairs
template <int MR, int NV>
PEFTOPS_INLINE void multiply(const bf16* x, int64_t ldx, int64_t k, const uint32_t* w,
                             int64_t ldw, __m512 (&acc)[MR][NV]) {
  const bf16* row[MR];
  for (int i = 0; i < MR; ++i) row[i] = x + i * ldx;
  int64_t c = 0;
  if constexpr (MR * NV <=
                12) {  // too few sums to hide the latency of one: every second pair has its own
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

// f(rank, vectors) for the ranks of r, sixteen to a vector.
template <class F>
PEFTOPS_INLINE void by_ranks(int64_t padded, F f) {
  by_rows<4, 2, 1>(0, padded / 16, f);
}

}  // namespace
}  // namespace peftops::ISA
