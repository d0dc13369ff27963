// LoRA in bf16 for few rows: the weight is streamed once, and its rows are the long side.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "tile_bf16.h"

#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_x, t_h, t_pairs, t_a, t_b;  // of the caller, read by its team

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

// acc[MX · e + i] += w[e] · x[i] lane by lane
template <int MX, int NW, class T>
PEFTOPS_INLINE void dots(const T* w, const bf16* x, int64_t k, __m512 (&acc)[16]) {
  __m512 odd[NW] = {};  // one row alone would wait for its own sums
  int64_t c = 0;
  if constexpr (MX == 1)
    for (; c + 64 <= k; c += 64) {
      const __m512bh x0 = pairs(x + c), x1 = pairs(x + c + 32);
#pragma GCC unroll 8
      for (int e = 0; e < NW; ++e) {
        const T* at = w + e * k + c;
        acc[e] = _mm512_dpbf16_ps(acc[e], (__m512bh)whole32(at), x0);
        odd[e] = _mm512_dpbf16_ps(odd[e], (__m512bh)whole32(at + 32), x1);
        _mm_prefetch((const char*)(at + 1024), _MM_HINT_T0), _mm_prefetch((const char*)(at + 1056), _MM_HINT_T0);
      }
    }
  for (; c + 32 <= k; c += 32)
#pragma GCC unroll 8
    for (int e = 0; e < NW; ++e) {
      const __m512bh t_w = (__m512bh)whole32(w + e * k + c);
#pragma GCC unroll 8
      for (int i = 0; i < MX; ++i)
        acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, pairs(x + i * k + c));
    }
  if (c < k)
    for (int e = 0; e < NW; ++e)
      for (int i = 0; i < MX; ++i) {
        const __m512bh t_w = (__m512bh)load32(w + e * k + c, k - c), t_x = (__m512bh)load32(x + i * k + c, k - c);
        acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, t_x);
      }
  if constexpr (MX == 1)
    for (int e = 0; e < NW; ++e) acc[e] = _mm512_add_ps(acc[e], odd[e]);
}

// NW columns of y from c on, or of h for w = a; the delta enters the sums before the product
template <int MX, int NW, class T, class B, class STORE>
PEFTOPS_INLINE void columns(const T* w, const bf16* x, int64_t k, const float* h, const B* b, int64_t r, int64_t c,
                            STORE store) {
  __m512 acc[16] = {};
  for (int64_t j = 0; j < r; j += 16)
    for (int e = 0; e < NW; ++e) {
      const __m512 t_b = load16(b + (c + e) * r + j, r - j);
      for (int i = 0; i < MX; ++i)
        acc[MX * e + i] = _mm512_fmadd_ps(t_b, _mm512_maskz_loadu_ps(mask16(r - j), h + i * r + j), acc[MX * e + i]);
    }
  dots<MX, NW>(w + c * k, x, k, acc);
  float out[16];
  _mm512_storeu_ps(out, sums(acc));
  for (int e = 0; e < NW; ++e)
    for (int i = 0; i < MX; ++i) store(out[MX * e + i], i, c + e);
}

template <int MX, class T, class B, class STORE>
PEFTOPS_INLINE void all_columns(const T* w, const bf16* x, int64_t k, const float* h, const B* b, int64_t r, int64_t n,
                                STORE store) {
  constexpr int NW = MX <= 2 ? 8 : 4;
  const int64_t id = omp_get_thread_num(), team = omp_get_num_threads(), runs = n / NW;
  for (int64_t c = runs * id / team * NW; c < runs * (id + 1) / team * NW; c += NW)
    columns<MX, NW>(w, x, k, h, b, r, c, store);
  if (id + 1 == team)
    for (int64_t c = runs * NW; c < n; ++c) columns<MX, 1>(w, x, k, h, b, r, c, store);
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

// m ≤ 4: a weight vector times the x vectors of the same columns
template <int MX, class A, class B>
void by_dots(const Few& t, const A* a, int64_t ra, const B* b, Tensor gate) {
  bf16* h = t_h.get<bf16>(t.m * ra);
  float* hs = t_pairs.get<float>(t.m * t.r);
#pragma omp parallel num_threads(threads_for(t.m * t.n * t.k))
  {
    all_columns<MX>(a, t.x, t.k, nullptr, b, 0, ra, [&](float v, int64_t i, int64_t j) { narrow(v, h + i * ra + j); });
#pragma omp barrier
#pragma omp single
    spread(hs, h, gate, t.m, ra, t.r, t.s);
    all_columns<MX>(t.w, t.x, t.k, hs, b, t.r, t.n, [&](float v, int64_t i, int64_t c) { t.store(v, i, c); });
  }
}

// out[i][c] = x · wᵀ with the rows of x in lanes, and the pairs of w broadcast
template <int MR, int NV, class STORE>
PEFTOPS_INLINE void strip(const bf16* w, int64_t k, const uint32_t* x, const bf16* b, const uint32_t* h, int64_t r,
                          float s, int64_t m, int64_t c, STORE store) {
  __m512 acc[MR][NV] = {};
  if (r) multiply<MR, NV>(b + c * r, r, r, h, 16 * NV, acc);
  for (auto& row : acc)
    for (auto& v : row) v = _mm512_mul_ps(v, _mm512_set1_ps(s));
  multiply<MR, NV>(w + c * k, k, k, x, 16 * NV, acc);
  float out[16];
  for (int e = 0; e < MR; ++e)
    for (int v = 0; v < NV; ++v) {
      _mm512_storeu_ps(out, acc[e][v]);
      for (int64_t i = 16 * v; i < min(m, 16 * v + 16); ++i) store(out[i - 16 * v], i, c + e);
    }
}

template <int NV, class STORE>
PEFTOPS_INLINE void strips(const bf16* w, int64_t k, const uint32_t* x, const bf16* b, const uint32_t* h, int64_t r,
                           float s, int64_t m, int64_t n, STORE store) {
  constexpr int MR = NV <= 2 ? 8 : 6;
  const int64_t runs = ceil_div(n, MR);
#pragma omp for schedule(static)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t c = run * MR;
    if (c + MR <= n)
      strip<MR, NV>(w, k, x, b, h, r, s, m, c, store);
    else
      for (int64_t e = c; e < n; ++e) strip<1, NV>(w, k, x, b, h, r, s, m, e, store);
  }
}

const bf16* rounded(Tensor t, Scratch& scratch) {
  if (t.dtype == Dtype::bf16) return as<bf16>(t);
  const int64_t count = t.shape[0] * t.shape[1];
  bf16* out = scratch.get<bf16>(count + 32);
#pragma omp parallel for num_threads(threads_for(16 * count))
  for (int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(out + i, load32(as<float>(t) + i, count - i));
  return out;
}

// m ≤ 64
template <int NV>
void by_strips(const Few& t, Tensor a, Tensor b, Tensor gate) {
  constexpr int64_t width = 16 * NV, step = 512;
  const int64_t ra = a.shape[0];
  const bf16 *t_a_rows = rounded(a, t_a), *b_rows = rounded(b, t_b);
  uint32_t* x = t_x.get<uint32_t>((t.k + 1) / 2 * width);
  bf16* h = t_h.get<bf16>(t.m * (ra + t.r));
  bf16* hg = h + t.m * ra;
  uint32_t* hp = t_pairs.get<uint32_t>((t.r + 1) / 2 * width);
#pragma omp parallel num_threads(threads_for(t.m * t.n * t.k))
  {
#pragma omp for
    for (int64_t c = 0; c < t.k; c += step)
      pack_columns(t.x + c, t.k, t.m, min(step, t.k - c), x + c / 2 * width, width);
    strips<NV>(t_a_rows, t.k, x, nullptr, nullptr, 0, 0, t.m, ra,
               [&](float v, int64_t i, int64_t j) { narrow(v, h + i * ra + j); });
#pragma omp single
    {
      const int64_t experts = gate.data ? gate.shape[1] : 1;
      for (int64_t i = 0; i < t.m; ++i)
        for (int64_t j = 0; j < t.r; ++j) {
          hg[i * t.r + j] = h[i * ra + j % ra];
          if (gate.data)
            narrow(widen(h[i * ra + j % ra]) * as<float>(gate)[i * experts + j / (t.r / experts)], hg + i * t.r + j);
        }
      pack_columns(hg, t.r, t.m, t.r, hp, width);
    }
    strips<NV>(t.w, t.k, x, b_rows, hp, t.r, t.s, t.m, t.n, [&](float v, int64_t i, int64_t c) { t.store(v, i, c); });
  }
}

}  // namespace

void lora_gemv(Tensor y, Tensor x, Tensor w, Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor gain, Tensor gate) {
  const Few t{as<bf16>(y), as<bf16>(x), as<bf16>(w),      x.shape[0],      b.shape[0],
              x.shape[1],  b.shape[1],  *as<float>(scale), as<float>(gain), bias};
  const auto few = [&](auto* a_rows, auto* b_rows) {
    const int64_t ra = a.shape[0];
    if (t.m == 1) by_dots<1>(t, a_rows, ra, b_rows, gate);
    if (t.m == 2) by_dots<2>(t, a_rows, ra, b_rows, gate);
    if (t.m == 3) by_dots<3>(t, a_rows, ra, b_rows, gate);
    if (t.m == 4) by_dots<4>(t, a_rows, ra, b_rows, gate);
  };
  if (t.m > 4) {
    if (t.m <= 16) return by_strips<1>(t, a, b, gate);
    if (t.m <= 32) return by_strips<2>(t, a, b, gate);
    if (t.m <= 48) return by_strips<3>(t, a, b, gate);
    return by_strips<4>(t, a, b, gate);
  }
  if (a.dtype == Dtype::f32 && b.dtype == Dtype::f32) return few(as<float>(a), as<float>(b));
  if (a.dtype == Dtype::f32) return few(as<float>(a), as<bf16>(b));
  if (b.dtype == Dtype::f32) return few(as<bf16>(a), as<float>(b));
  few(as<bf16>(a), as<bf16>(b));
}

}  // namespace peftops::ISA
#endif
