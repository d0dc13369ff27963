// Packs panels of a 4-bit weight as pairs of bf16 in 32-bit lanes. Blocks that are whole runs
// of a row are decoded on the way; others are decoded first, in parts that stay in the nearest
// cache.
#pragma once
#include "nf4.h"
#include "tile_bf16.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_decoded;  // of each thread of a team

// Whether each run of 64 elements lies in one row and one block.
inline bool in_runs(const NF4& w, int64_t k) { return k % 64 == 0 && w.shift >= 6; }

// The even and the odd elements of the run of 64 that begins at `at`. table: the weight's
PEFTOPS_INLINE void decode64(const NF4& w, __m512 table, int64_t at, __m512i& even,
                             __m512i& odd) {
  const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(w.scale(at >> w.shift)));
  const __m512i t = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
  const __m512i codes =
      _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(w.codes + at / 2)));
  // An index has five bits; both halves of t are the same.
  even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), t);
  odd = _mm512_permutexvar_epi16(codes, t);
}

// The panel (columns / 2, PANEL) of the weight (rows, columns) that begins at row i, as pairs
// along columns. The weight is in runs.
void pack_runs_by_columns(const NF4& w, int64_t rows, int64_t columns, int64_t i,
                          uint32_t* out) {
  const __m512 table = _mm512_loadu_ps(w.table);
  for (int64_t g = 0; g < PANEL; g += 16)
    for (int64_t c = 0; c < columns; c += 64) {
      // Lane l of lo has the pairs 8l … 8l + 3 of a row, and of hi the four after them.
      __m512i lo[16], hi[16];
      for (int64_t e = 0; e < 16; ++e) {
        lo[e] = hi[e] = _mm512_setzero_si512();
        if (i + g + e >= rows) continue;
        const int64_t at = (i + g + e) * columns + c;
        __m512i even, odd;
        _mm_prefetch((const char*)(w.codes + at / 2) + 8 * columns, _MM_HINT_T0);
        decode64(w, table, at, even, odd);
        lo[e] = _mm512_unpacklo_epi16(even, odd);
        hi[e] = _mm512_unpackhi_epi16(even, odd);
      }
      transpose(lo);
      transpose(hi);
      for (int64_t q = 0; q < 16; ++q) {
        uint32_t* to = out + (c / 2 + q / 4 * 8 + q % 4) * PANEL + g;
        _mm512_storeu_si512(to, lo[q]);
        _mm512_storeu_si512(to + 4 * PANEL, hi[q]);
      }
    }
}

// The panel (rows / 2, PANEL) of the weight (rows, columns) that begins at column c, as pairs
// along rows. The weight is in runs.
void pack_runs_by_rows(const NF4& w, int64_t rows, int64_t columns, int64_t c, uint32_t* out) {
  const __m512 table = _mm512_loadu_ps(w.table);
  for (int64_t i = 0; i < rows; i += 2, out += PANEL) {
    __m512i e0, o0, e1 = _mm512_setzero_si512(), o1 = e1;
    decode64(w, table, i * columns + c, e0, o0);
    if (i + 1 < rows) decode64(w, table, (i + 1) * columns + c, e1, o1);
    const __m512i el = _mm512_unpacklo_epi16(e0, e1), eh = _mm512_unpackhi_epi16(e0, e1);
    const __m512i ol = _mm512_unpacklo_epi16(o0, o1), oh = _mm512_unpackhi_epi16(o0, o1);
    // Lane l of v[q] has the columns 16l + 4q … 16l + 4q + 3.
    const __m512i v[4] = {_mm512_unpacklo_epi32(el, ol), _mm512_unpackhi_epi32(el, ol),
                          _mm512_unpacklo_epi32(eh, oh), _mm512_unpackhi_epi32(eh, oh)};
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const __m512i e = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(out + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(out + 32, _mm512_shuffle_i32x4(d, e, 0x88));
    _mm512_storeu_si512(out + 48, _mm512_shuffle_i32x4(d, e, 0xdd));
  }
}

constexpr int64_t DECODED = 512;  // elements of a row that are decoded before they are packed

// The rows [i, i + rows) and columns [c, c + columns) of a 4-bit weight (n, k), decoded into
// memory of this thread. ld: elements from row to row of the result
const bf16* decoded(const NF4& w, int64_t k, int64_t i, int64_t rows, int64_t c,
                    int64_t columns, int64_t ld) {
  bf16* out = t_decoded.get<bf16>(rows * ld);
  for (int64_t e = 0; e < rows; ++e) decode(w, (i + e) * k + c, columns, out + e * ld);
  return out;
}

// The panel of a 4-bit weight (rows, columns) that begins at column c, as pairs along its rows.
// gain: (rows,) multiplies rows, or null
void pack_rows(const NF4& w, int64_t rows, int64_t columns, int64_t c, uint32_t* out,
               const float* gain) {
  if (in_runs(w, columns) && !gain) return pack_runs_by_rows(w, rows, columns, c, out);
  const int64_t count = min(PANEL, columns - c), tall = 32;
  for (int64_t i = 0; i < rows; i += tall) {
    const bf16* part = decoded(w, columns, i, min(tall, rows - i), c, count, PANEL);
    pack_rows(part, PANEL, min(tall, rows - i), count, out + i / 2 * PANEL, PANEL,
              gain ? gain + i : nullptr);
  }
}

// The panel of a 4-bit weight (rows, columns) that begins at row i, as pairs along its columns.
void pack_columns(const NF4& w, int64_t rows, int64_t columns, int64_t i, uint32_t* out) {
  if (in_runs(w, columns)) return pack_runs_by_columns(w, rows, columns, i, out);
  const int64_t ld = DECODED + 32;  // rows must not fall into one cache set
  for (int64_t g = 0; g < PANEL; g += 16)
    for (int64_t c = 0; c < columns; c += DECODED) {
      const int64_t count = max(0, min(16, rows - i - g)), some = min(DECODED, columns - c);
      const bf16* part = decoded(w, columns, i + g, count, c, some, ld);
      pack_columns(part, ld, count, some, out + c / 2 * PANEL + g, 16, nullptr, PANEL);
    }
}

}  // namespace
}  // namespace peftops::ISA
