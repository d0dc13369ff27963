// Products of few rows of x in bf16 with a 4-bit weight, which is decoded 128 elements at a
// time and never stored.
//
// Decoding leaves elements in another order than they have in the weight. Instead of restoring
// the order of the weight each time, the order of x is changed once (split).
#pragma once
#include "nf4_panels.h"

namespace peftops::ISA {
namespace {

inline int64_t pad128(int64_t k) { return (k + 127) / 128 * 128; }

// out (m, pad128(k)) = x (m, k) in the order in which decode128 leaves a weight, with zeros
// beyond k. Of each 128 elements come first those at 4i + 1, then those at 4i, 4i + 3 and 4i +
// 2.
inline void split(const bf16* x, int64_t m, int64_t k, bf16* out) {
  const __m512i even =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                       26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < k; c += 128, out += 128) {
      __m512i v[4];
      for (int q = 0; q < 4; ++q) v[q] = load32(x + i * k + c + 32 * q, k - c - 32 * q);
      const __m512i e0 = _mm512_permutex2var_epi16(v[0], even, v[1]);
      const __m512i e1 = _mm512_permutex2var_epi16(v[2], even, v[3]);
      const __m512i o0 = _mm512_permutex2var_epi16(v[0], odd, v[1]);
      const __m512i o1 = _mm512_permutex2var_epi16(v[2], odd, v[3]);
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(o0, even, o1));
      _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(e0, even, e1));
      _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi16(o0, odd, o1));
      _mm512_storeu_si512(out + 96, _mm512_permutex2var_epi16(e0, odd, e1));
    }
}

// The values of the codes in two blocks of these scales, in one table. The fifth bit of an
// index chooses the block.
PEFTOPS_INLINE __m512i values(__m512 table, float first, float second) {
  return narrow32(_mm512_mul_ps(table, _mm512_set1_ps(first)),
                  _mm512_mul_ps(table, _mm512_set1_ps(second)));
}

// Decodes two runs. w: 64 bytes, which are 32 words of four codes; sixteen words are a run. t:
// what values() returns
PEFTOPS_INLINE void decode128(__m512i w, __m512i t, __m512bh (&out)[4]) {
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  asm("" : "+v"(w));  // else g++ 12 loads the bytes again for each of the four uses
  const auto look_up = [&](__m512i index) {  // (index & 15) | second
    return (__m512bh)_mm512_permutexvar_epi16(
        _mm512_ternarylogic_epi32(index, nibble, second, 0xEA), t);
  };
  out[0] = look_up(w);
  out[1] = look_up(_mm512_srli_epi16(w, 4));
  // Two shifts by multiplications, which do not need the permutes' port.
  out[2] = look_up(_mm512_mulhi_epu16(w, _mm512_set1_epi16(256)));
  out[3] = look_up(_mm512_mulhi_epu16(w, _mm512_set1_epi16(16)));
}

// The scales of the runs of NW rows of a weight. NESTED: scales are nested and no row crosses a
// group of 256 blocks of 64, so that all scales of a group are made once, as a table of its
// codes.
template <int NW, bool NESTED>
struct Scales {
  const float* at[NW];       // of each row: its scales, or its group's table
  const uint8_t* index[NW];  // of each row: the codes of its scales, if NESTED
  float* memory;             // for scales that are not NESTED
  float* tables;             // (NW, 256), if NESTED
  int64_t group[NW];         // whose table is made, or -1

  explicit Scales(float* scratch) : memory(scratch), tables(scratch) {
    for (int e = 0; e < NW; ++e) group[e] = -1;
  }
  // Floats of scratch that are needed for rows of so many runs.
  static int64_t floats(int64_t runs) { return NW * (NESTED ? 256 : runs + 16); }

  // Moves on to the rows from c on.
  PEFTOPS_INLINE void rows(const NF4& w, int64_t c, int64_t runs) {
    for (int e = 0; e < NW; ++e) {
      const int64_t first = (c + e) * runs;
      if constexpr (NESTED) {
        index[e] = w.absmax8 + first;
        const int64_t wanted = first >> 8;
        float* table = tables + 256 * e;
        if (e && wanted == group[0]) {
          at[e] = at[0];
          continue;
        }
        if (group[e] != wanted)
          for (int i = 0; i < 256; i += 16) {
            const __m512 part = _mm512_mul_ps(_mm512_loadu_ps(w.nested_table + i),
                                              _mm512_set1_ps(w.nested[wanted]));
            _mm512_storeu_ps(table + i, _mm512_add_ps(part, _mm512_set1_ps(w.offset)));
          }
        group[e] = wanted;
        at[e] = table;
      } else if (w.absmax && w.shift == 6) {
        at[e] = w.absmax + first;
      } else {
        float* out = memory + e * (runs + 16);
        for (int64_t j = 0; j < runs; ++j) out[j] = w.scale((first + j) >> (w.shift - 6));
        at[e] = out;
      }
    }
  }
  // The scale of a run of row e.
  PEFTOPS_INLINE float operator()(int e, int64_t run) const {
    return at[e][NESTED ? index[e][run] : run];
  }
};

// The codes of two runs, or of one.
PEFTOPS_INLINE __m512i load_codes(const uint8_t* p, bool both) {
  return both ? _mm512_loadu_si512(p)
              : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
}

// acc[MX · e + i] += w[c + e] · x[i] lane by lane. x (MX, pad128(k)) is split.
template <int MX, int NW, bool NESTED>
PEFTOPS_INLINE void dots(const NF4& w, const Scales<NW, NESTED>& scale, const bf16* x,
                         int64_t k, int64_t c, __m512 (&acc)[16]) {
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t runs = k / 64, ldx = pad128(k), bytes = k / 2;
  const uint8_t* codes = w.codes + c * bytes;
  // One row has too few sums to hide the latency of an instruction, so it has twice as many.
  __m512 odd[MX == 1 ? NW : 1];
  for (auto& v : odd) v = _mm512_setzero_ps();
  const auto step = [&](int64_t j, bool both) __attribute__((always_inline)) {
    __m512bh t_w[NW][4];
#pragma GCC unroll 4
    for (int e = 0; e < NW; ++e) {
      const uint8_t* at = codes + e * bytes + 32 * j;
      _mm_prefetch((const char*)at + NW * bytes, _MM_HINT_T0);
      decode128(load_codes(at, both), values(table, scale(e, j), both ? scale(e, j + 1) : 0.0f),
                t_w[e]);
      if constexpr (MX <= 4) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
          for (int i = 0; i < MX; ++i) {
            __m512& sum = MX == 1 && q % 2 ? odd[e] : acc[MX * e + i];
            sum = _mm512_dpbf16_ps(sum, t_w[e][q], pairs(x + i * ldx + 64 * j + 32 * q));
          }
      }
    }
    if constexpr (MX > 4) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
#pragma GCC unroll 8
        for (int i = 0; i < MX; ++i) {
          __m512bh t_x = pairs(x + i * ldx + 64 * j + 32 * q);
          asm("" : "+v"(t_x));
#pragma GCC unroll 4
          for (int e = 0; e < NW; ++e)
            acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w[e][q], t_x);
        }
    }
  };
  int64_t j = 0;
  for (; j + 2 <= runs; j += 2) step(j, true);
  if (j < runs) step(j, false);
  if constexpr (MX == 1)
    for (int e = 0; e < NW; ++e) acc[e] = _mm512_add_ps(acc[e], odd[e]);
}

// out[pad128(k) / 2][L][16] = pairs of split x (m, pad128(k)), a row in each lane, zeros beyond
// m.
template <int L>
void lanes(const bf16* x, int64_t m, int64_t k, uint32_t* out) {
  const int64_t ld = pad128(k);
  for (int64_t c = 0; c < ld; c += 32)
    for (int l = 0; l < L; ++l) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i)
        v[i] = 16 * l + i < m ? _mm512_loadu_si512(x + (16 * l + i) * ld + c)
                              : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < 16; ++i)
        _mm512_storeu_si512(out + ((c / 2 + i) * L + l) * 16, v[i]);
    }
}

constexpr int64_t RUNS = 8;  // of a row that are decoded at once, into the nearest cache

// acc[e][l] += w[c + e] · x, with a row of x in each lane. x: what lanes() makes; buffer:
// memory for NW rows of RUNS runs
template <int L, int NW>
PEFTOPS_INLINE void lane_dots(const NF4& w, const Scales<NW, false>& scale, const uint32_t* x,
                              int64_t k, int64_t c, bf16* buffer, __m512 (&acc)[NW][L]) {
  constexpr int64_t LD = RUNS * 64 + 32;  // rows must not fall into one cache set
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t runs = k / 64, bytes = k / 2;
  for (int64_t j = 0; j < runs; j += RUNS) {
    const int64_t some = min(RUNS, runs - j);
    for (int e = 0; e < NW; ++e)
      for (int64_t u = 0; u < some; u += 2) {
        const bool both = u + 2 <= some;
        const uint8_t* at = w.codes + (c + e) * bytes + 32 * (j + u);
        _mm_prefetch((const char*)at + NW * bytes, _MM_HINT_T0);
        __m512bh t_w[4];
        decode128(load_codes(at, both),
                  values(table, scale(e, j + u), both ? scale(e, j + u + 1) : 0.0f), t_w);
        for (int q = 0; q < 4; ++q)
          _mm512_storeu_si512(buffer + e * LD + 64 * u + 32 * q, (__m512i)t_w[q]);
      }
    const uint32_t* from = x + j * 32 * L * 16;
    for (int64_t p = 0; p < (some + 1) / 2 * 64; ++p) {
      __m512bh t_x[L];
#pragma GCC unroll 2
      for (int l = 0; l < L; ++l) t_x[l] = pairs(from + (p * L + l) * 16);
#pragma GCC unroll 16
      for (int e = 0; e < NW; ++e) {
        const __m512bh t_w = pair(buffer + e * LD + 2 * p);
#pragma GCC unroll 2
        for (int l = 0; l < L; ++l) acc[e][l] = _mm512_dpbf16_ps(acc[e][l], t_x[l], t_w);
      }
    }
  }
}

}  // namespace
}  // namespace peftops::ISA
