// What the kernels of lora_gemv share: their argument, and what is done with a sum x·wᵀ to
// store an element of y.
#pragma once
#include "nf4.cuh"

namespace peftops::cuda {

// y = gain ⊙ (x·wᵀ + s · (gate ⊙ h)·bᵀ) + bias with h = x·aᵀ. T is the dtype of x, w and y; a,
// b and bias have it too, or are fp32.
struct Gemv {
  void* y;             // (m, n)
  const void* x;       // (m, k)
  const void* w;       // (n, k), or y0 (m, n) = x·wᵀ
  const void* a;       // (r, k)
  const void* b;       // (n, rb)
  const void* bias;    // (n,) or null
  const float* scale;  // (1,): s
  const float* gain;   // (n,) or null
  const float* gate;   // (m, experts) or null
  float* h;            // (m, r), rounded to T; null if `inside`
  int m, k, n;
  int r;           // rows of a
  int rb;          // columns of b: r, or a multiple of it if experts share h
  int experts;     // 1 if there is no gate
  bool wide_a;     // a is fp32
  bool wide_b;     // b is fp32
  bool wide_bias;  // bias is fp32
  bool inside;     // the kernel that makes y makes h too; else the launch before has made it
};

// The same with a 4-bit base; w is null then.
struct GemvNf4 : Gemv {
  Nf4 base;
};

// For five rows and more, in 16 bits.
int launch_lora_mma(const Gemv& g, Dtype dtype, int processors, uintptr_t stream);
// For up to 64 rows, or four of fp32. h, if there is a rank, was made by the launch before.
int launch_lora_nf4(const GemvNf4& g, Dtype dtype, int processors, uintptr_t stream);

namespace {

// Eight elements of a tensor of T, or of fp32 if `wide`, from element i on.
template <class T>
DEVICE void load_elements(float (&out)[8], const void* p, int64_t i, bool wide) {
  if (wide)
    widen(out, load(static_cast<const float*>(p) + i));
  else
    widen(out, load(static_cast<const T*>(p) + i));
}

// (gate ⊙ h)·bᵀ of one row and column. h (r,) is that row's, in shared or global memory.
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

// Stores an element of y whose sum x·wᵀ is given. h: as in delta.
template <class T>
DEVICE void store(const Gemv& g, int row, int column, float sum, const float* h) {
  const float total = sum + *g.scale * delta<T>(g, h, row, column);
  const float gain = g.gain ? g.gain[column] : 1.0f;
  const float bias = g.bias ? element<T>(g.bias, column, g.wide_bias) : 0.0f;
  static_cast<T*>(g.y)[int64_t(row) * g.n + column] = narrow<T>(total * gain + bias);
}

}  // namespace
}  // namespace peftops::cuda
