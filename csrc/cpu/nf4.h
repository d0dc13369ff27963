// Decodes 4-bit weights as bitsandbytes stores them: two codes a byte, the first in the high
// half, and a scale (absmax) for each block of elements. Scales may themselves be 8-bit codes.
#pragma once
#include "vec.h"

namespace peftops::ISA {
namespace {

// Ŵ = table[code] · absmax of the block, rounded once to T.
struct NF4 {
  const uint8_t* codes;       // (⌈elements / 2⌉,)
  const uint8_t* absmax8;     // (blocks,): codes of nested scales, or null
  const float* table;         // (16,): the value of each code
  const float* absmax;        // (blocks,), or null if scales are nested
  const float* nested;        // (blocks / 256,): scales of the scales, or null
  const float* nested_table;  // (256,): the value of each 8-bit code, or null
  float offset;               // is added to nested scales
  int shift;                  // a block has 1 << shift elements

  // block: elements of a block; 0: the base has not 4 bits, and all fields are zero
  NF4(Tensors base, int64_t block) {
    memset(this, 0, sizeof *this);
    if (!block) return;
    shift = __builtin_ctzll(uint64_t(block));
    codes = as<uint8_t>(base.at[0]);
    table = as<float>(base.at[1]);
    if (base.count == 6) {
      absmax8 = as<uint8_t>(base.at[2]);
      nested = as<float>(base.at[3]);
      nested_table = as<float>(base.at[4]);
      offset = *as<float>(base.at[5]);
    } else {
      absmax = as<float>(base.at[2]);
    }
  }

  // The scale of block `at`.
  float scale(int64_t at) const {
    if (absmax) return absmax[at];
    // bitsandbytes rounds this product before it adds the offset, too.
    const float product = nested_table[absmax8[at]] * nested[at >> 8];
    return product + offset;
  }

  // out = the values of the sixteen codes in block `at`.
  template <class T>
  void values(int64_t at, T (&out)[16]) const;
};

// Decodes whole bytes of one block. t: the values of the codes
template <class T>
inline void decode_bytes(const uint8_t* codes, int64_t bytes, const T (&t)[16], T* out) {
  for (int64_t i = 0; i < bytes; ++i) {
    out[2 * i] = t[codes[i] >> 4];
    out[2 * i + 1] = t[codes[i] & 15];
  }
}

template <class T>
void NF4::values(int64_t at, T (&out)[16]) const {
  for (int v = 0; v < 16; v += LANES) store(out + v, load(table + v) * all(scale(at)));
}

// decode_words and decode_run do what decode_bytes does, by vectors: of 16-bit values and of
// floats.
#if defined(__AVX512BW__)
template <class T>
inline void decode_words(const uint8_t* codes, int64_t bytes, const T (&t)[16], T* out) {
  const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)t));
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  // lo and hi: the values of 32 bytes. An index has five bits; both halves of `values` are the
  // same.
  const auto two = [&](__m256i bytes, __m512i& lo, __m512i& hi) {
    const __m512i w = _mm512_cvtepu8_epi16(bytes);
    const __m512i e = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), values);
    const __m512i o = _mm512_permutexvar_epi16(w, values);
    const __m512i l = _mm512_unpacklo_epi16(e, o), h = _mm512_unpackhi_epi16(e, o);
    lo = _mm512_permutex2var_epi64(l, first, h);
    hi = _mm512_permutex2var_epi64(l, second, h);
  };
  int64_t i = 0;
  __m512i lo, hi;
  for (; i + 32 <= bytes; i += 32) {
    two(_mm256_loadu_si256((const __m256i*)(codes + i)), lo, hi);
    _mm512_storeu_si512(out + 2 * i, lo);
    _mm512_storeu_si512(out + 2 * i + 32, hi);
  }
  if (i + 16 <= bytes) {
    two(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(codes + i))), lo, hi);
    _mm512_storeu_si512(out + 2 * i, lo);
    i += 16;
  }
  decode_bytes(codes + i, bytes - i, t, out + 2 * i);
}
inline void decode_run(const uint8_t* codes, int64_t bytes, const float (&t)[16], float* out) {
  const __m512 values = _mm512_loadu_ps(t);
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
    const __m512 e = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), values);
    const __m512 o = _mm512_permutexvar_ps(w, values);
    const __m512i l = (__m512i)_mm512_unpacklo_ps(e, o), h = (__m512i)_mm512_unpackhi_ps(e, o);
    _mm512_storeu_si512(out + 2 * i, _mm512_permutex2var_epi64(l, first, h));
    _mm512_storeu_si512(out + 2 * i + 16, _mm512_permutex2var_epi64(l, second, h));
  }
  decode_bytes(codes + i, bytes - i, t, out + 2 * i);
}
#elif defined(__AVX2__)
// The codes of sixteen bytes, in the order of their elements.
inline void split(const uint8_t* codes, __m128i (&out)[2]) {
  const __m128i w = _mm_loadu_si128((const __m128i*)codes), nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(w, 4), nibble);
  const __m128i odd = _mm_and_si128(w, nibble);
  out[0] = _mm_unpacklo_epi8(even, odd);
  out[1] = _mm_unpackhi_epi8(even, odd);
}
// Looks up the low and the high bytes of the values in a table each.
template <class T>
inline void decode_words(const uint8_t* codes, int64_t bytes, const T (&t)[16], T* out) {
  const __m128i first = _mm_loadu_si128((const __m128i*)t);
  const __m128i second = _mm_loadu_si128((const __m128i*)(t + 8));
  const __m128i byte = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    __m128i parts[2];
    split(codes + i, parts);
    for (int e = 0; e < 2; ++e) {
      const __m128i l = _mm_shuffle_epi8(low, parts[e]), h = _mm_shuffle_epi8(high, parts[e]);
      __m128i* to = (__m128i*)(out + 2 * i + 16 * e);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(l, h));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, h));
    }
  }
  decode_bytes(codes + i, bytes - i, t, out + 2 * i);
}
inline void decode_run(const uint8_t* codes, int64_t bytes, const float (&t)[16], float* out) {
  const __m256 first = _mm256_loadu_ps(t), second = _mm256_loadu_ps(t + 8);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    __m128i parts[2];
    split(codes + i, parts);
    for (int e = 0; e < 4; ++e) {
      const __m256i code =
          _mm256_cvtepu8_epi32(e % 2 ? _mm_srli_si128(parts[e / 2], 8) : parts[e / 2]);
      const __m256 low = _mm256_permutevar8x32_ps(first, code);
      const __m256 high = _mm256_permutevar8x32_ps(second, code);
      // Its sign is the fourth bit of the code, which says which of the two to take.
      const __m256 which = (__m256)_mm256_slli_epi32(code, 28);
      _mm256_storeu_ps(out + 2 * i + 8 * e, _mm256_blendv_ps(low, high, which));
    }
  }
  decode_bytes(codes + i, bytes - i, t, out + 2 * i);
}
#else
template <class T>
inline void decode_words(const uint8_t* codes, int64_t bytes, const T (&t)[16], T* out) {
  decode_bytes(codes, bytes, t, out);
}
#endif

template <class T>
inline void decode_run(const uint8_t* codes, int64_t bytes, const T (&t)[16], T* out) {
  decode_words(codes, bytes, t, out);
}

// out[0 … count) = the elements of w from `at` on.
template <class T>
inline void decode(const NF4& w, int64_t at, int64_t count, T* out) {
  const int64_t end = at + count;
  while (at < end) {
    const int64_t block = at >> w.shift, stop = min(end, (block + 1) << w.shift);
    T t[16];
    w.values(block, t);
    if (at % 2) *out++ = t[w.codes[at++ / 2] & 15];
    const int64_t bytes = (stop - at) / 2;
    decode_run(w.codes + at / 2, bytes, t, out);
    at += 2 * bytes;
    out += 2 * bytes;
    if (at < stop) *out++ = t[w.codes[at++ / 2] >> 4];
  }
}

}  // namespace
}  // namespace peftops::ISA
