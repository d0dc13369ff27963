// Vectors of floats for each instruction set, conversions between them and 16-bit values, and
// the micro-kernel that multiplies them. One source serves all instruction sets; `vec` has the
// width of a register.
#pragma once
#include "tile.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace peftops::ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
constexpr int VECTORS = 4;  // of one row of sums
// Terms of one sum. A longer sum would lose digits, so sums of sums are made.
constexpr int64_t CHAIN = 64;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int VECTORS = 2;
constexpr int64_t CHAIN = 64;
#else
constexpr int LANES = 4;
constexpr int VECTORS = 2;
// Half as many, because products are rounded too if they are not fused with the sum.
constexpr int64_t CHAIN = 32;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
// A vec in memory, at any address of a float.
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

constexpr int ROWS = 6;                 // of a block of sums
constexpr int WIDTH = VECTORS * LANES;  // columns of a block of sums

inline int64_t pad16(int64_t r) { return (r + 15) / 16 * 16; }

// v in every lane.
PEFTOPS_INLINE vec all(float v) { return v - vec{}; }

// a · b + c, with one rounding if the instruction set has it.
PEFTOPS_INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512BW__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PEFTOPS_INLINE vec load(const float* p) { return *(const vec_at*)p; }
PEFTOPS_INLINE vec load(const bf16* p) {
#if defined(__AVX512BW__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)),
                                16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
#endif
}
PEFTOPS_INLINE vec load(const fp16* p) {
#if defined(__AVX512BW__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
#endif
}

PEFTOPS_INLINE void store(float* p, vec v) { *(vec_at*)p = v; }
PEFTOPS_INLINE void store(bf16* p, vec v) {
  const words word = (words)v, up = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  const halves h = __builtin_convertvector(v == v ? up : up * 0 + 0x7fc0, halves);
  memcpy(p, &h, sizeof h);
}
PEFTOPS_INLINE void store(fp16* p, vec v) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256(
      (__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p,
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int l = 0; l < LANES; ++l) narrow(v[l], p + l);
#endif
}

// Loads up to LANES values; the lanes beyond are zero.
template <class T>
PEFTOPS_INLINE vec load(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T some[LANES];
  memset((void*)some, 0, sizeof some);
  if (count > 0) memcpy((void*)some, p, size_t(count) * sizeof(T));
  return load(some);
}
// Stores up to LANES values.
template <class T>
PEFTOPS_INLINE void store(T* p, vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  T some[LANES];
  store(some, v);
  if (count > 0) memcpy((void*)p, some, size_t(count) * sizeof(T));
}

// v rounded to the type of the second argument.
PEFTOPS_INLINE vec round_to(vec v, float) { return v; }
PEFTOPS_INLINE vec round_to(vec v, bf16) {
  const words word = (words)v, up = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000;
  return v == v ? (vec)up : v;
}
PEFTOPS_INLINE vec round_to(vec v, fp16) {
  fp16 some[LANES];
  store(some, v);
  return load(some);
}
// Loads up to LANES values and rounds them to T if T is narrower than they are.
template <class T, class From>
PEFTOPS_INLINE vec load_as(const From* p, int64_t count) {
  const vec v = load(p, count);
  if constexpr (sizeof(T) < sizeof(From)) return round_to(v, T{});
  return v;
}

template <class T, class From>
PEFTOPS_INLINE vec load_as(const From* p) {
  return load_as<T>(p, LANES);
}

// v in the lanes whose bit is set, else zero.
PEFTOPS_INLINE vec kept(vec v, uint32_t bits) {
  words bit;
  for (int l = 0; l < LANES; ++l) bit[l] = 1u << l;
  return (bit & bits) != 0 ? v : vec{};
}
// The mask's bits of LANES columns from c on. c is a multiple of LANES.
PEFTOPS_INLINE uint32_t bits_at(const uint8_t* row, int64_t c) {
  if (LANES == 4) return uint32_t(row[c / 8] >> c % 8);
  uint32_t word = row[c / 8];
  if (LANES == 16) word |= uint32_t(row[c / 8 + 1]) << 8;
  return word;
}

// The sum over the lanes.
PEFTOPS_INLINE float sum(vec v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 four =
      _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// A row as floats. Elements whose bit is not set become zero; bits may be null. The last vector
// is filled with zeros beyond the end of the row.
template <class T>
inline void widen_row(const T* from, int64_t count, const uint8_t* bits, float* out) {
  int64_t c = 0;
  if (!bits)
    for (; c + LANES <= count; c += LANES) store(out + c, load(from + c));
  for (; c < count; c += LANES) {
    const vec v = load(from + c, count - c);
    store(out + c, bits ? kept(v, bits_at(bits, c)) : v);
  }
}

// Transposes the matrix whose rows are these LANES vectors.
PEFTOPS_INLINE void transpose(vec (&v)[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    // Which lane each lane takes: below LANES of v[i], else of v[i + step].
    words low, high;
    for (int l = 0; l < LANES; ++l) {
      low[l] = l & step ? LANES + l - step : l;
      high[l] = l & step ? LANES + l : l + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & step)) {
        const vec first = v[i], second = v[i + step];
        v[i] = __builtin_shuffle(first, second, low);
        v[i + step] = __builtin_shuffle(first, second, high);
      }
  }
}

// Sets all to zero. It is written out because "= {}" also writes memory that is never read.
template <int MR, int NV>
PEFTOPS_INLINE void clear(vec (&acc)[MR][NV]) {
#pragma GCC unroll 24
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = vec{};
}

// out[i · ldo + lane] = from[lane · ld + i] for i < count, rounded to T. Lanes from `lanes` on
// are zero. gain: (count,) multiplies what has index i, or null
template <class T, class From>
void transpose_into(const From* from, int64_t ld, int64_t lanes, int64_t count, float* out,
                    int64_t ldo, const float* gain = nullptr) {
  for (int64_t i = 0; i < count; i += LANES) {
    vec v[LANES];
    for (int64_t l = 0; l < LANES; ++l)
      v[l] = l < lanes ? load_as<T>(from + l * ld + i, count - i) : vec{};
    for (int64_t l = 0; gain && l < LANES; ++l) v[l] *= load(gain + i, count - i);
    transpose(v);
    for (int64_t e = 0; e < min(LANES, count - i); ++e) store(out + (i + e) * ldo, v[e]);
  }
}

// acc[i][v] += Σ x[i][c] · w[c][LANES · v + lane] over c < k.
template <int MR, int NV>
PEFTOPS_INLINE void multiply(const float* x, int64_t ldx, int64_t k, const float* w,
                             int64_t ldw, vec (&acc)[MR][NV]) {
  const float* row[MR];
  for (int i = 0; i < MR; ++i) row[i] = x + i * ldx;
  for (int64_t c = 0; c < k; ++c) {
    vec t_w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) t_w[v] = load(w + c * ldw + LANES * v);
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      const vec t_x = all(row[i][c]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(t_w[v], t_x, acc[i][v]);
    }
  }
}

// out (rows, width) = x (rows, k) · w (k, width), or += if `add`. width is a multiple of 16.
inline void multiply_into(float* out, int64_t ldo, bool add, const float* x, int64_t ldx,
                          int64_t rows, int64_t k, const float* w, int64_t ldw, int64_t width) {
  const auto part = [&](int64_t i, int64_t first, auto count, auto vectors) {
    constexpr int MR = decltype(count)::value, NV = decltype(vectors)::value;
    for (int64_t c = 0; c < max(k, 1); c += CHAIN) {  // without k, zeros are written
      vec acc[MR][NV];
      clear(acc);
      multiply(x + i * ldx + c, ldx, min(CHAIN, k - c), w + c * ldw + LANES * first, ldw, acc);
#pragma GCC unroll 8
      for (int e = 0; e < MR; ++e)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          float* at = out + (i + e) * ldo + LANES * (first + v);
          store(at, add || c ? load(at) + acc[e][v] : acc[e][v]);
        }
    }
  };
  const auto columns = [&](int64_t first, auto vectors) {
    by_rows<ROWS, 4, 2, 1>(0, rows,
                           [&](int64_t i, auto count) { part(i, first, count, vectors); });
  };
  if constexpr (VECTORS == 4)
    by_rows<4, 2, 1>(0, width / LANES, columns);
  else
    by_rows<VECTORS>(0, width / LANES, columns);
}

// A vector as floats. If it has floats already, it is not copied. scratch: memory for the
// result
template <class T>
const float* as_float(Tensor t, Scratch& scratch) {
  if (!t.data || t.dtype == Dtype::f32) return as<float>(t);
  float* out = scratch.get<float>(pad16(t.shape[0]));
  widen_row(as<T>(t), t.shape[0], nullptr, out);
  return out;
}

// Stores s · v (padded, ldv) as the gradient of a (r, k), or, transposed, of b (n, columns).
//   gain: (n,) multiplies the rows of b's gradient, or null
template <class T>
void store_gradient(Tensor to, const float* v, int64_t ldv, bool transposed, float s,
                    const float* gain) {
  const int64_t rows = to.shape[0], columns = to.shape[1];
  with_operand<T>(to, [&](auto* out) {
#pragma omp parallel for num_threads(threads_for(16 * rows * columns))
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float value = v[i * ldv + j];
        if (transposed) value = v[j * ldv + i] * (gain ? gain[i] : 1.0f);
        narrow(s * value, out + i * columns + j);
      }
  });
}

}  // namespace
}  // namespace peftops::ISA
