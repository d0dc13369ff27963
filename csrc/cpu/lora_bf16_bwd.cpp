// LoRA's backward pass in bf16 on AVX-512 with dot products. One read of dy makes both u = dy·b
// and b's gradient; u gives the gradients of h and gate; then come dx, by the product of
// product_bf16.h, and a's gradient, from a read of x.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "ops.h"
#include "product_bf16.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_a, t_b, t_h, t_parts, t_grad, t_sum;  // of the caller, read by its team

// v[j][c] += Σ h[i][j] · t[i][c] over the rows [i0, i1) of t, for 32 columns from c on.
//   bits: a mask of t (m, n), or null
//   h: pairs along its rows, [pair][padded]
//   first, last: whether these are the first and the last rows; between them the columns of v
//     are in the order in which the unpacks leave them
PEFTOPS_INLINE void outer(float* v, int64_t ldv, const bf16* t, int64_t n, const uint8_t* bits,
                          const uint32_t* h, int64_t padded, int64_t i0, int64_t i1, int64_t c,
                          bool first, bool last) {
  const int64_t bytes = mask_bytes(n);
  const uint32_t inside = mask32(n - c);
  const auto row = [&](int64_t i) {
    uint32_t keep = inside;
    if (bits) {
      memcpy(&keep, bits + i * bytes + c / 8, 4);
      keep &= inside;
    }
    return _mm512_maskz_loadu_epi16(keep, t + i * n + c);
  };
  for (int64_t j = 0; j < padded; j += 8) {
    __m512 acc[8][2] = {};
    float* at = v + j * ldv + c;
    for (int64_t i = i0; i < i1; i += 2) {
      const __m512i u0 = row(i), u1 = i + 1 < i1 ? row(i + 1) : _mm512_setzero_si512();
      const __m512bh lo = (__m512bh)_mm512_unpacklo_epi16(u0, u1);
      const __m512bh hi = (__m512bh)_mm512_unpackhi_epi16(u0, u1);
      const uint32_t* pair_of_h = h + i / 2 * padded + j;
#pragma GCC unroll 8
      for (int e = 0; e < 8; ++e) {
        const __m512bh t_h = (__m512bh)_mm512_set1_epi32(int(pair_of_h[e]));
        acc[e][0] = _mm512_dpbf16_ps(acc[e][0], lo, t_h);
        acc[e][1] = _mm512_dpbf16_ps(acc[e][1], hi, t_h);
      }
    }
    if (!first)
      for (int e = 0; e < 8; ++e) {
        acc[e][0] = _mm512_add_ps(acc[e][0], _mm512_loadu_ps(at + e * ldv));
        acc[e][1] = _mm512_add_ps(acc[e][1], _mm512_loadu_ps(at + e * ldv + 16));
      }
    if (last) {
      // The unpacks left the columns as 0–3 8–11 16–19 24–27 and 4–7 12–15 20–23 28–31.
      const __m512i lo =
          _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
      const __m512i hi =
          _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
      for (int e = 0; e < 8; ++e) {
        const __m512 both[2] = {acc[e][0], acc[e][1]};
        acc[e][0] = _mm512_permutex2var_ps(both[0], lo, both[1]);
        acc[e][1] = _mm512_permutex2var_ps(both[0], hi, both[1]);
      }
    }
    for (int e = 0; e < 8; ++e) {
      _mm512_storeu_ps(at + e * ldv, acc[e][0]);
      _mm512_storeu_ps(at + e * ldv + 16, acc[e][1]);
    }
  }
}

// u (m, padded) = t·b and v (padded, ldv) = hᵀ·drop(t) in one read of t (m, n). u or v may be
// null. A group of columns is one thread's, however many threads there are, and groups are
// added in order, so that the result has the same bits every time.
//   bits: the mask of t, or null
//   h, b: pairs along their rows, [pair][padded]
void reduce(float* u, float* v, int64_t ldv, Tensor t, const uint8_t* bits, const uint32_t* h,
            const uint32_t* b, int64_t padded) {
  const int64_t m = t.shape[0], n = t.shape[1], wide = 128, tall = 64;
  const int64_t groups = min(4, ceil_div(n, wide));
  const bf16* from = as<bf16>(t);
  if (v && !m) memset(v, 0, size_t(padded * ldv) * sizeof(float));
  float* parts = u ? t_parts.get<float>(groups * m * padded) : nullptr;
  const int threads = threads_for(m * n * padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * n / groups / 32 * 32;
    const int64_t end = group + 1 < groups ? (group + 1) * n / groups / 32 * 32 : n;
    for (int64_t i0 = 0; i0 < m; i0 += tall) {
      const int64_t i1 = min(i0 + tall, m);
      for (int64_t c0 = begin; c0 < end; c0 += wide) {
        const int64_t c1 = min(c0 + wide, end);
        const int64_t next = c1 < end ? i0 : i1, to = c1 < end ? c1 : begin;
        prefetch(from + next * n + to, n, min(tall, m - next), min(wide, end - to));
        if (u)
          by_ranks(padded, [&](int64_t rank, auto vectors) {
            constexpr int NV = decltype(vectors)::value, MR = NV == 4 ? 4 : 8;
            by_rows<MR, 4, 2, 1>(i0, i1, [&](int64_t i, auto rows) {
              constexpr int M = decltype(rows)::value;
              __m512 acc[M][NV] = {};
              float* at = parts + (group * m + i) * padded + 16 * rank;
              if (c0 > begin)
                for (int e = 0; e < M; ++e)
                  for (int q = 0; q < NV; ++q)
                    acc[e][q] = _mm512_loadu_ps(at + e * padded + 16 * q);
              multiply<M, NV>(from + i * n + c0, n, c1 - c0, b + c0 / 2 * padded + 16 * rank,
                              padded, acc);
              for (int e = 0; e < M; ++e)
                for (int q = 0; q < NV; ++q)
                  _mm512_storeu_ps(at + e * padded + 16 * q, acc[e][q]);
            });
          });
        if (v)
          for (int64_t c = c0; c < c1; c += 32)
            outer(v, ldv, from, n, bits, h, padded, i0, i1, c, i0 == 0, i1 == m);
      }
    }
  }
  if (u)
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < m * padded; i += 16) {
      __m512 sum = _mm512_loadu_ps(parts + i);
      for (int64_t g = 1; g < groups; ++g)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + g * m * padded + i));
      _mm512_storeu_ps(u + i, sum);
    }
}

// Returns h's gradient (m, r) in bf16 and stores gate's. u (m, padded) times s is the gradient
// of the gated h, which has `columns` columns.
bf16* ungated(Tensor dgate, Tensor h, Tensor gate, const float* u, int64_t columns,
              int64_t padded, float s) {
  const int64_t m = h.shape[0], r = h.shape[1];
  bf16* dh = t_h.get<bf16>(m * r);
  if (!gate.data) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < r; j += 16) {
        const __m512 value =
            _mm512_mul_ps(_mm512_loadu_ps(u + i * padded + j), _mm512_set1_ps(s));
        _mm256_mask_storeu_epi16(dh + i * r + j, mask16(r - j),
                                 (__m256i)_mm512_cvtneps_pbh(value));
      }
    return dh;
  }
  const int64_t experts = gate.shape[1], each = columns / experts;
  float* sum = t_panel.get<float>(r + experts);
  for (int64_t i = 0; i < m; ++i) {
    memset(sum, 0, size_t(r + experts) * sizeof(float));
    float part = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const float d = s * u[i * padded + j];
      sum[j % r] += as<float>(gate)[i * experts + j / each] * d;
      part += d * widen(as<bf16>(h)[i * r + j % r]);
      if ((j + 1) % each && j % 16 < 15) continue;
      sum[r + j / each] += part;
      part = 0;
    }
    for (int64_t j = 0; j < r; ++j) narrow(sum[j], dh + i * r + j);
    if (dgate.data)
      memcpy(as<float>(dgate) + i * experts, sum + r, size_t(experts) * sizeof(float));
  }
  return dh;
}

}  // namespace

void lora_bwd_bf16(Tensor dx, Tensor da, Tensor db, Tensor dgate, Tensor dy, Tensor x,
                   Tensors base, Tensor a, Tensor b, Tensor scale, Tensor h, Tensor bits,
                   Tensor gain, Tensor gate, Form form, int64_t block, double p) {
  const int64_t m = x.shape[0], k = x.shape[1], n = b.shape[0], r = a.shape[0];
  const int64_t columns = b.shape[1];
  const int64_t padded = pad16(columns), ldv = (n + 31) / 32 * 32;
  const int64_t ranks = pad16(r), ldk = (k + 31) / 32 * 32;
  const float s = *as<float>(scale);
  const float* g = as<float>(gain);
  const bool inner = dx.data || da.data || dgate.data;  // what needs u
  float* u = inner ? t_sum.get<float>(m * padded) : nullptr;
  float* v = db.data ? t_grad.get<float>(padded * ldv) : nullptr;
  uint32_t *bp = nullptr, *hp = nullptr;  // b and h, packed
  if (u) {
    bp = t_b.get<uint32_t>((n + 1) / 2 * padded);
    with_operand<bf16>(
        b, [&](auto* from) { pack_rows(from, columns, n, columns, bp, padded, g); });
  }
  if (v) {
    hp = t_a.get<uint32_t>((m + 1) / 2 * padded);
    pack_rows(gated(h, gate, columns, t_h), columns, m, columns, hp, padded);
  }
  if (u || v) reduce(u, v, ldv, dy, nullptr, hp, bp, padded);
  if (v) store_gradient<bf16>(db, v, ldv, true, s, g);
  if (!inner) return;

  const bf16* dh = ungated(dgate, h, gate, u, columns, padded, s);
  if (dx.data) {
    Product t{};
    t.out = as<bf16>(dx);
    if (form != Form::given) t.x = as<bf16>(dy);  // gain is multiplied into the packed base
    t.h = dh;
    t.m = m;
    t.n = k;
    t.k = n;
    t.r = r;
    t.s = dropout_factor(p);
    t.bits = as<uint8_t>(bits);
    product_with(t, form, block, true, base, a, g);
  }
  if (da.data) {
    hp = t_a.get<uint32_t>((m + 1) / 2 * ranks);
    v = t_grad.get<float>(ranks * ldk);
    pack_rows(dh, r, m, r, hp, ranks);
    reduce(nullptr, v, ldk, x, as<uint8_t>(bits), hp, nullptr, ranks);
    store_gradient<bf16>(da, v, ldk, false, dropout_factor(p), nullptr);
  }
}

}  // namespace peftops::ISA
#endif
