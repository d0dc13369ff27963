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

constexpr int PAGE = 8;  // rank-rows

// The same, where rows may have adapters of their own: a is (R, k) then, b (R, n), scale (S,),
// gain (S, n), h (m, 8·pages), and there is no gate. Each row has those of its slot.
struct Routed : Gemv {
  const int* slots;  // (m,), -1 for the base alone; or null: all rows have the same adapter
  const int* table;  // (S, pages): pages of eight rank-rows
  const int* rank;   // (S,)
  int pages;
};

// The same with a 4-bit base; w is null then.
struct GemvNf4 : Routed {
  Nf4 base;
};

// What lora_gemv and multi_gemv have in common. n, r and rb, and a gate or a route, are the
// caller's to set. table: of the base's codes.
inline GemvNf4 gemv_of(Tensor y, Tensor h, Tensor x, Tensor w, Tensor table, Tensor absmax,
                       Tensor nested, Tensor nested_table, Tensor offset, Tensor a, Tensor b,
                       Tensor scale, Tensor bias, Tensor gain, int64_t block) {
  GemvNf4 g{};
  g.y = y.data;
  g.x = x.data;
  g.w = w.data;
  g.a = a.data;
  g.b = b.data;
  g.bias = bias.data;
  g.scale = static_cast<float*>(scale.data);
  g.gain = static_cast<float*>(gain.data);
  g.h = static_cast<float*>(h.data);
  g.m = int(x.shape[0]);
  g.k = int(x.shape[1]);
  g.experts = 1;
  g.wide_a = a.dtype == Dtype::f32;
  g.wide_b = b.dtype == Dtype::f32;
  g.wide_bias = bias.dtype == Dtype::f32;
  g.inside = !h.data;
  g.base = nf4_of(table.data ? w : table, table, absmax, nested, nested_table, offset, block);
  return g;
}

// Launches what makes y: if `given`, so that g.w is y0, by adding to it, else by one of the
// next two. h was made by the launch before, unless there is no rank or it is made `inside`.
int launch_product(const GemvNf4& g, Dtype dtype, bool given, int processors, uintptr_t stream);
// For five rows and more, in 16 bits.
int launch_lora_mma(const Routed& g, Dtype dtype, int processors, uintptr_t stream);
// For up to 64 rows, or four of fp32.
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

// h·b of one row and column, with b in the pages of the row's slot. h as in delta.
template <class T>
DEVICE float delta_of(const Routed& g, const float* h, int slot, int column) {
  float sum = 0;
  const int rank = g.rank[slot];
  const int* table = g.table + int64_t(slot) * g.pages;
#pragma unroll 1
  for (int j = 0; j < rank; j += PAGE) {
    const int64_t at = int64_t(table[j / PAGE]) * PAGE * g.n + column;
    const int last = min(PAGE, rank - j) - 1;
    float r_b[PAGE], r_h[PAGE];
#pragma unroll
    for (int i = 0; i < PAGE; ++i)
      r_b[i] = element<T>(g.b, at + int64_t(min(i, last)) * g.n, g.wide_b);
    *reinterpret_cast<float4*>(r_h) = *reinterpret_cast<const float4*>(h + j);
    *reinterpret_cast<float4*>(r_h + 4) = *reinterpret_cast<const float4*>(h + j + 4);
#pragma unroll
    for (int i = 0; i < PAGE; ++i) sum += i <= last ? r_h[i] * rounded<T>(r_b[i]) : 0.0f;
  }
  return sum;
}

// Brings what a block reads of b, for rows from m0 and columns from n0 on, nearer to it, while
// it multiplies x and w. There is a route.
template <class T>
DEVICE void prefetch_b(const Routed& g, int m0, int rows, int n0, int columns) {
  const int size = g.wide_b ? 4 : sizeof(T);
  const char* b = static_cast<const char*>(g.b) + int64_t(n0) * size;
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * g.r; at += blockDim.x) {
    const int slot = g.slots[m0 + at / g.r], j = at % g.r;
    if (slot < 0 || j >= g.rank[slot]) continue;
    const int64_t page = g.table[int64_t(slot) * g.pages + j / PAGE];
    prefetch(b + (page * PAGE + j % PAGE) * g.n * size);
  }
}

template <class T>
DEVICE void store(const Routed& g, int row, int column, float sum, const float* h) {
  if (!g.slots) {
    store<T>(static_cast<const Gemv&>(g), row, column, sum, h);
    return;
  }
  float gain = 1;
  if (const int slot = g.slots[row]; slot >= 0) {
    sum += g.scale[slot] * delta_of<T>(g, h, slot, column);
    if (g.gain) gain = g.gain[int64_t(slot) * g.n + column];
  }
  const float bias = g.bias ? element<T>(g.bias, column, g.wide_bias) : 0.0f;
  static_cast<T*>(g.y)[int64_t(row) * g.n + column] = narrow<T>(sum * gain + bias);
}

}  // namespace
}  // namespace peftops::cuda
