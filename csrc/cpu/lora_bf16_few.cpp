// LoRA in bf16 for few rows: the weight is streamed once, and its rows are the long side.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "ops.h"
#include "tile_bf16.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_h, t_spread;  // of the caller, read by its team

constexpr int64_t AHEAD = 16384;  // bytes between what is read and what is asked for

struct Few {
  bf16* y;
  const bf16 *x, *w;
  int64_t m, n, k, r;
  float s;
  const float* gain;
  Tensor bias;

  PEFTOPS_INLINE void store(float value, int64_t i, int64_t c) const {
    if (gain) value *= gain[c];
    if (bias.data) value += bias.dtype == Dtype::f32 ? as<float>(bias)[c] : widen(as<bf16>(bias)[c]);
    narrow(value, y + i * n + c);
  }
};

// lane j = the sum of v[j]
PEFTOPS_INLINE __m512 sums(const __m512 (&v)[16]) {
  __m512 t[8], q[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
    q[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  const __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(u, w, 0x88), _mm512_shuffle_f32x4(u, w, 0xdd));
}

PEFTOPS_INLINE __m512i whole32(const bf16* p) { return _mm512_loadu_si512(p); }
PEFTOPS_INLINE __m512i whole32(const float* p) { return narrow32(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)); }

// acc + w · x lane by lane, one weight row as one stream
template <class T>
PEFTOPS_INLINE __m512 dot(const T* w, const bf16* x, int64_t k, __m512 acc) {
  __m512 s[4] = {acc};
  int64_t c = 0;
  for (; c + 128 <= k; c += 128)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      _mm_prefetch((const char*)(w + c + 32 * q) + AHEAD, _MM_HINT_T0);
      s[q] = _mm512_dpbf16_ps(s[q], (__m512bh)whole32(w + c + 32 * q), pairs(x + c + 32 * q));
    }
  for (; c < k; c += 32) s[1] = _mm512_dpbf16_ps(s[1], (__m512bh)load32(w + c, k - c), (__m512bh)load32(x + c, k - c));
  return _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
}

// acc[MX · e + i] += w[e] · x[i] lane by lane
template <int MX, int NW, class T>
PEFTOPS_INLINE void dots(const T* w, const bf16* x, int64_t k, __m512 (&acc)[16]) {
  if constexpr (MX == 1) {
    for (int e = 0; e < NW; ++e) acc[e] = dot(w + e * k, x, k, acc[e]);
    return;
  }
  int64_t c = 0;
  for (; c + 32 <= k; c += 32)
#pragma GCC unroll 8
    for (int e = 0; e < NW; ++e) {
      const __m512bh t_w = (__m512bh)whole32(w + e * k + c);
      _mm_prefetch((const char*)(w + e * k + c) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int i = 0; i < MX; ++i) acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, pairs(x + i * k + c));
    }
  if (c < k)
    for (int e = 0; e < NW; ++e)
      for (int i = 0; i < MX; ++i) {
        const __m512bh t_w = (__m512bh)load32(w + e * k + c, k - c), t_x = (__m512bh)load32(x + i * k + c, k - c);
        acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, t_x);
      }
}

// y[i][c] for MX rows of x and NW columns from c on, or h for w = a; the delta enters the sums before the product
template <int MX, int NW, class T, class B, class STORE>
PEFTOPS_INLINE void block(const T* w, const bf16* x, int64_t k, const float* h, const B* b, int64_t r, int64_t i0,
                          int64_t c, STORE store) {
  __m512 acc[16] = {};
  for (int64_t j = 0; j < r; j += 16)
    for (int e = 0; e < NW; ++e) {
      const __m512 t_b = load16(b + (c + e) * r + j, r - j);
      for (int i = 0; i < MX; ++i) {
        const __m512 t_h = _mm512_maskz_loadu_ps(mask16(r - j), h + (i0 + i) * r + j);
        acc[MX * e + i] = _mm512_fmadd_ps(t_b, t_h, acc[MX * e + i]);
      }
    }
  dots<MX, NW>(w + c * k, x + i0 * k, k, acc);
  float out[16];
  _mm512_storeu_ps(out, sums(acc));
  for (int e = 0; e < NW; ++e)
    for (int i = 0; i < MX; ++i) store(out[MX * e + i], i0 + i, c + e);
}

// NW columns for all rows, four rows at a time, so that the weights come from memory once; 16 for one row, 8 for two
template <int NW, class T, class B, class STORE>
PEFTOPS_INLINE void columns(const T* w, const bf16* x, int64_t m, int64_t k, const float* h, const B* b, int64_t r,
                            int64_t c, STORE store) {
  if constexpr (NW > 4) {
    block<16 / NW, NW>(w, x, k, h, b, r, 0, c, store);
  } else {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) block<4, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 3) block<3, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 2) block<2, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 1) block<1, NW>(w, x, k, h, b, r, i, c, store);
  }
}

template <int NW, class T, class B, class STORE>
PEFTOPS_INLINE void all_columns(const T* w, const bf16* x, int64_t m, int64_t k, const float* h, const B* b, int64_t r,
                                int64_t n, STORE store) {
  const int64_t id = omp_get_thread_num(), team = omp_get_num_threads(), runs = n / NW;
  for (int64_t c = runs * id / team * NW; c < runs * (id + 1) / team * NW; c += NW)
    columns<NW>(w, x, m, k, h, b, r, c, store);
  if (id + 1 == team)
    for (int64_t c = runs * NW; c < n; ++c) columns<1>(w, x, m, k, h, b, r, c, store);
}

// h[i][j], the gated product of x and a as rounded there, times s
void spread(float* out, const bf16* h, Tensor gate, int64_t m, int64_t ra, int64_t r, float s) {
  const int64_t experts = gate.data ? gate.shape[1] : 1;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < r; ++j) {
      bf16 value = h[i * ra + j % ra];
      if (gate.data) narrow(widen(value) * as<float>(gate)[i * experts + j / (r / experts)], &value);
      out[i * r + j] = s * widen(value);
    }
}

template <int NW, class A, class B>
void few(const Few& t, const A* a, int64_t ra, const B* b, Tensor gate) {
  bf16* h = t_h.get<bf16>(t.m * ra);
  float* hs = t_spread.get<float>(t.m * t.r);
  const int threads = threads_for(t.m * t.n * t.k);
#pragma omp parallel num_threads(threads)
  {
    all_columns<NW>(a, t.x, t.m, t.k, nullptr, b, 0, ra,
                    [&](float v, int64_t i, int64_t j) { narrow(v, h + i * ra + j); });
#pragma omp barrier
#pragma omp single
    spread(hs, h, gate, t.m, ra, t.r, t.s);
    all_columns<NW>(t.w, t.x, t.m, t.k, hs, b, t.r, t.n, [&](float v, int64_t i, int64_t c) { t.store(v, i, c); });
  }
}

}  // namespace

void lora_gemv(Tensor y, Tensor x, Tensor w, Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor gain, Tensor gate) {
  const int64_t m = x.shape[0], n = b.shape[0], k = x.shape[1], r = b.shape[1], ra = a.shape[0];
  const Few t{as<bf16>(y), as<bf16>(x), as<bf16>(w), m, n, k, r, *as<float>(scale), as<float>(gain), bias};
  const auto run = [&](auto* a_rows, auto* b_rows) {
    if (m == 1)
      few<16>(t, a_rows, ra, b_rows, gate);
    else if (m == 2)
      few<8>(t, a_rows, ra, b_rows, gate);
    else
      few<4>(t, a_rows, ra, b_rows, gate);
  };
  const auto with_b = [&](auto* a_rows) {
    if (b.dtype == Dtype::f32)
      run(a_rows, as<float>(b));
    else
      run(a_rows, as<bf16>(b));
  };
  if (a.dtype == Dtype::f32)
    with_b(as<float>(a));
  else
    with_b(as<bf16>(a));
}

}  // namespace peftops::ISA
#endif
