// LoRA for one to four rows in fp32 arithmetic, for every dtype and instruction set: the weight is read once.
#include "nf4.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_few;  // of the caller, read by its team
thread_local Scratch t_row;  // of each thread: a row of a 4-bit base

// out[i] = w · x[i]
template <int MX, class T>
inline void dots(const T* w, const float* x, int64_t k, float* out) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < k; ++c) {
    const float t_w = widen(w[c]);
    s0 += t_w * x[c];
    if (MX > 1) s1 += t_w * x[k + c];
    if (MX > 2) s2 += t_w * x[2 * k + c];
    if (MX > 3) s3 += t_w * x[3 * k + c];
  }
  const float sums[4] = {s0, s1, s2, s3};
  for (int i = 0; i < MX; ++i) out[i] = sums[i];
}

#ifdef __AVX512BW__
constexpr int CODED = 4;  // columns of a 4-bit base at once

// Even elements of each 32, then the odd ones
void split(float* x, int64_t count) {
  for (int64_t c = 0; c + 32 <= count; c += 32) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 lo = _mm512_loadu_ps(x + c), hi = _mm512_loadu_ps(x + c + 16);
    _mm512_storeu_ps(x + c, _mm512_permutex2var_ps(lo, even, hi));
    _mm512_storeu_ps(x + c + 16, _mm512_permutex2var_ps(lo, _mm512_add_epi32(even, _mm512_set1_epi32(1)), hi));
  }
}

// out[e][i] = w[c + e] · x[i], of weights whose blocks are whole runs of 32 and split x; no weight is stored
template <int MX, class T>
void dots(const NF4& w, int64_t c, int64_t columns, const float* x, int64_t k, float (&out)[CODED][MX]) {
  __m512 acc[CODED][MX] = {}, values[CODED];
  int64_t at[CODED];
  for (int e = 0; e < CODED; ++e) at[e] = (c + min(e, columns - 1)) * k;
  const int64_t block = (int64_t(1) << w.shift) - 1;
  for (int64_t j = 0; j < k; j += 32)
#pragma GCC unroll 4
    for (int e = 0; e < CODED; ++e) {
      if (!j || !((at[e] + j) & block)) {
        T t[16];
        float wide[16];
        w.values((at[e] + j) >> w.shift, t);
        for (int i = 0; i < 16; ++i) wide[i] = widen(t[i]);
        values[e] = _mm512_loadu_ps(wide);
      }
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.codes + (at[e] + j) / 2)));
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values[e]);
      const __m512 odd = _mm512_permutexvar_ps(codes, values[e]);
#pragma GCC unroll 4
      for (int i = 0; i < MX; ++i) {
        acc[e][i] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + i * k + j), acc[e][i]);
        acc[e][i] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + i * k + j + 16), acc[e][i]);
      }
    }
  for (int e = 0; e < CODED; ++e)
    for (int i = 0; i < MX; ++i) out[e][i] = _mm512_reduce_add_ps(acc[e][i]);
}
#else
constexpr int CODED = 1;
void split(float*, int64_t) {}
template <int MX, class T>
void dots(const NF4&, int64_t, int64_t, const float*, int64_t, float (&)[CODED][MX]) {}
#endif

template <class T>
float* widened(float* out, Tensor t) {
  const int64_t count = t.shape[0] * t.shape[1];
  with_type(t.dtype, [&](auto e) {
    for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(widen(as<decltype(e)>(t)[i]));
  });
  return out + count;
}

// hg (m, columns) = gate ⊙ x·aᵀ, times s, from all of a's ranks
template <class T>
void spread(float* out, const float* h, Tensor gate, int64_t m, int64_t r, int64_t columns, float s) {
  const int64_t experts = gate.data ? gate.shape[1] : 1;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float value = h[i * r + j % r], g = gate.data ? as<float>(gate)[i * experts + j / (columns / experts)] : 1;
      out[i * columns + j] = s * (gate.data ? rounded<T>(value * g) : value);
    }
}

template <int MX, class T>
void few(Tensor y, Tensor x, Tensors base, Tensor a, Tensor b, float s, Tensor bias, Tensor gain, Tensor gate,
         const NF4* codes) {
  const int64_t k = x.shape[1], n = b.shape[0], r = a.shape[0], columns = b.shape[1];
  float* xf = t_few.get<float>(MX * (k + r + columns) + r * k + n * columns);
  float *h = xf + MX * k, *hs = h + MX * r, *af = hs + MX * columns, *bf = widened<T>(af, a);
  widened<T>(xf, x);
  widened<T>(bf, b);
  for (int64_t j = 0; j < r; ++j) {
    float out[MX];
    dots<MX>(af + j * k, xf, k, out);
    for (int i = 0; i < MX; ++i) h[i * r + j] = rounded<T>(out[i]);
  }
  spread<T>(hs, h, gate, MX, r, columns, s);
  const auto finish = [&](int64_t c, const float* out) {
    float delta[MX], added = 0;
    dots<MX>(bf + c * columns, hs, columns, delta);
    with_type(bias.data ? bias.dtype : Dtype::none, [&](auto e) { added = widen(as<decltype(e)>(bias)[c]); });
    for (int i = 0; i < MX; ++i)
      narrow((out[i] + delta[i]) * (gain.data ? as<float>(gain)[c] : 1.0f) + added, as<T>(y) + i * n + c);
  };
  const bool runs = CODED > 1 && codes && k % 32 == 0;
  if (runs) split(xf, MX * k);
  const int threads = threads_for(MX * n * k);
  if (runs) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < n; c += CODED) {
      float out[CODED][MX];
      dots<MX, T>(*codes, c, min(CODED, n - c), xf, k, out);
      for (int64_t e = 0; e < min(CODED, n - c); ++e) finish(c + e, out[e]);
    }
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < n; ++c) {
    float out[MX];
    const T* row = as<T>(base.at[0]) + c * k;
    if (codes) decode(*codes, c * k, k, t_row.get<T>(k)), row = t_row.get<T>(k);
    dots<MX>(row, xf, k, out);
    finish(c, out);
  }
}

}  // namespace

void lora_few(Tensor y, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor gain, Tensor gate,
              Form form, int64_t block) {
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
    const float s = *as<float>(scale);
    const auto run = [&](const NF4* codes) {
      if (x.shape[0] == 1) few<1, T>(y, x, base, a, b, s, bias, gain, gate, codes);
      if (x.shape[0] == 2) few<2, T>(y, x, base, a, b, s, bias, gain, gate, codes);
      if (x.shape[0] == 3) few<3, T>(y, x, base, a, b, s, bias, gain, gate, codes);
      if (x.shape[0] == 4) few<4, T>(y, x, base, a, b, s, bias, gain, gate, codes);
    };
    if (form == Form::nf4) {
      const NF4 codes(base, block);
      run(&codes);
    } else {
      run(nullptr);
    }
  });
}

}  // namespace peftops::ISA
