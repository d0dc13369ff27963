// What the kernels of lora_gemv share: their argument, and what follows the sum x·wᵀ.
#pragma once
#include "nf4.cuh"

namespace peftops::cuda {

struct Gemv {  // y = gain ⊙ (x·wᵀ + s · (gate ⊙ h)·bᵀ) + bias
  void* y;
  const void *x, *w, *a, *b, *bias;
  const float *scale, *gain, *gate;
  float* h;  // (m, r), rounded to x's dtype
  int m, k, n, r, rb, experts;
  bool wide_a, wide_b, wide_bias;  // fp32, whatever x is
  bool inside;  // h is made by the kernel that adds it, not by the launch before
};

struct GemvNf4 : Gemv {  // w is null
  Nf4 base;
};

// Five rows and more, in 16 bits
int launch_lora_mma(const Gemv& g, Dtype dtype, int processors, uintptr_t stream);
// Rows as lora_nf4.cu says; h, if there is a rank, was made by the launch before
int launch_lora_nf4(const GemvNf4& g, Dtype dtype, int processors, uintptr_t stream);

namespace {

template <class T>
DEVICE void load_elements(float (&out)[8], const void* p, int64_t i, bool wide) {
  if (wide)
    widen(out, load(static_cast<const float*>(p) + i));
  else
    widen(out, load(static_cast<const T*>(p) + i));
}

// (gate ⊙ h)·bᵀ of one row and column; h is that row's, in shared or global memory
template <class T>
DEVICE float delta(const Gemv& g, const float* h, int row, int column) {
  float sum = 0;
  const int64_t at = int64_t(column) * g.rb;
  if (!g.gate && g.rb % 8 == 0) {
#pragma unroll 1
    for (int j = 0; j < g.rb; j += 8) {
      float r_b[8], r_h[8];
      load_elements<T>(r_b, g.b, at + j, g.wide_b);
      *reinterpret_cast<float4*>(r_h) = *reinterpret_cast<const float4*>(h + j);
      *reinterpret_cast<float4*>(r_h + 4) = *reinterpret_cast<const float4*>(h + j + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += r_h[i] * rounded<T>(r_b[i]);
    }
    return sum;
  }
#pragma unroll 1
  for (int j = 0; j < g.rb; ++j) {
    float hg = h[j % g.r];
    if (g.gate) hg = rounded<T>(hg * g.gate[int64_t(row) * g.experts + j / (g.rb / g.experts)]);
    sum += hg * rounded<T>(element<T>(g.b, at + j, g.wide_b));
  }
  return sum;
}

template <class T>
DEVICE void store(const Gemv& g, int row, int column, float sum, const float* h) {
  const float total = sum + *g.scale * delta<T>(g, h, row, column);
  const float gain = g.gain ? g.gain[column] : 1.0f;
  const float bias = g.bias ? element<T>(g.bias, column, g.wide_bias) : 0.0f;
  static_cast<T*>(g.y)[int64_t(row) * g.n + column] = narrow<T>(total * gain + bias);
}

}  // namespace
}  // namespace peftops::cuda
