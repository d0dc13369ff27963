// LoRA for few rows in fp32 arithmetic, for every dtype and instruction set. Reading the weight
// takes most of the time, so it is read once, as it is stored, and not packed.
#include "nf4.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_few;      // of the caller, read by its team
thread_local Scratch t_decoded;  // of each thread: rows of a 4-bit base

constexpr int COLUMNS = 4;  // rows of the weight that are read side by side

// acc[e][i] += w[e] · x[i] lane by lane. w is rounded to T if it is wider.
template <class T, int W, int X, class From>
PEFTOPS_INLINE void add_dots(const From* w, int64_t ldw, const float* x, int64_t ldx, int64_t k,
                             vec (&acc)[W][X]) {
  const auto step = [&](int64_t c, int64_t some) __attribute__((always_inline)) {
    vec t_w[W];
#pragma GCC unroll 4
    for (int e = 0; e < W; ++e) t_w[e] = load_as<T>(w + e * ldw + c, some);
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) {
      const vec t_x = load(x + i * ldx + c, some);
#pragma GCC unroll 4
      for (int e = 0; e < W; ++e) acc[e][i] = fma(t_w[e], t_x, acc[e][i]);
    }
  };
  int64_t c = 0;
  for (; c + LANES <= k; c += LANES) step(c, LANES);
  if (c < k) step(c, k - c);
}

// The same as sums of sums, with CHAIN terms in each lane.
template <class T, int W, int X, class From>
PEFTOPS_INLINE void add_product(const From* w, int64_t ldw, const float* x, int64_t k,
                                vec (&acc)[W][X]) {
  for (int64_t c = 0; c < k; c += CHAIN * LANES) {
    vec part[W][X];
    clear(part);
    add_dots<T>(w + c, ldw, x + c, k, min(CHAIN * LANES, k - c), part);
#pragma GCC unroll 4
    for (int e = 0; e < W; ++e)
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) acc[e][i] += part[e][i];
  }
}

// The arguments of the op.
template <class T>
struct Few {
  T* y;              // (m, n)
  const T* base;     // (n, k), or null if it has 4 bits
  const NF4* codes;  // of a 4-bit base, or null
  const float* x;    // (m, k)
  const float* hs;   // (m, columns) = s · (gate ⊙ h)
  int64_t m, n, k;
  int64_t columns;    // of b
  const float* gain;  // (n,), or null
  Tensor b;           // (n, columns)
  Tensor bias;        // (n,), or without data

  // The rows [i, i + X) and W columns from c on of y. w: where their weights begin
  template <int W, int X>
  void block(const T* w, int64_t i, int64_t c) const {
    vec acc[W][X];
    clear(acc);
    with_operand<T>(b, [&](const auto* from) {
      add_dots<T>(from + c * columns, columns, hs + i * columns, columns, columns, acc);
    });
    add_product<T>(w, k, x + i * k, k, acc);
    for (int e = 0; e < W; ++e)
      for (int q = 0; q < X; ++q) {
        float value = sum(acc[e][q]);
        if (gain) value *= gain[c + e];
        with_operand<T>(bias,
                        [&](const auto* added) { value += added ? widen(added[c + e]) : 0; });
        narrow(value, y + (i + q) * n + c + e);
      }
  }

  // All rows of W columns from c on. What is summed at once fits into the registers.
  template <int W>
  void some(int64_t c) const {
    const T* w = base + c * k;
    if (codes) {
      T* out = t_decoded.get<T>(W * k);
      for (int e = 0; e < W; ++e) decode(*codes, (c + e) * k, k, out + e * k);
      w = out;
    }
    constexpr int AT_ONCE = VECTORS == 4 || W < 2 ? W : 2;
    by_rows<4, 2, 1>(0, m, [&](int64_t i, auto count) {
      constexpr int X = decltype(count)::value, SOME = X == 4 ? AT_ONCE : W;
      for (int e = 0; e < W; e += SOME) block<SOME, X>(w + e * k, i, c + e);
    });
  }
};

// hs (m, columns) = s · (gate ⊙ x·aᵀ), rounded to T before s. h: memory for x·aᵀ (m, r)
template <class T>
void down(float* hs, const float* x, Tensor a, Tensor gate, int64_t m, int64_t columns, float s,
          float* h) {
  const int64_t r = a.shape[0], k = a.shape[1], experts = gate.data ? gate.shape[1] : 1;
  with_operand<T>(a, [&](const auto* from) {
#pragma omp parallel for num_threads(threads_for(m * r * k)) schedule(static)
    for (int64_t j = 0; j < r; ++j)
      by_rows<4, 2, 1>(0, m, [&](int64_t i, auto count) {
        constexpr int X = decltype(count)::value;
        vec acc[1][X];
        clear(acc);
        add_product<T>(from + j * k, k, x + i * k, k, acc);
        for (int q = 0; q < X; ++q) h[(i + q) * r + j] = rounded<T>(sum(acc[0][q]));
      });
  });
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float value = h[i * r + j % r];
      if (gate.data)
        value = rounded<T>(value * as<float>(gate)[i * experts + j / (columns / experts)]);
      hs[i * columns + j] = s * value;
    }
}

}  // namespace

void lora_few(Tensor y, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale, Tensor bias,
              Tensor gain, Tensor gate, Form form, int64_t block) {
  const int64_t m = x.shape[0], k = x.shape[1], n = b.shape[0], r = a.shape[0];
  const int64_t columns = b.shape[1];
  const NF4 codes(base, form == Form::nf4 ? block : 0);
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
    float* wide = t_few.get<float>(pad16(m * k) + m * (columns + r));
    float* hs = wide + pad16(m * k);
    widen_row(as<T>(x), m * k, nullptr, wide);
    down<T>(hs, wide, a, gate, m, columns, *as<float>(scale), hs + m * columns);
    Few<T> few{};
    few.y = as<T>(y);
    if (form == Form::nf4)
      few.codes = &codes;
    else
      few.base = as<T>(base.at[0]);
    few.x = wide;
    few.hs = hs;
    few.m = m;
    few.n = n;
    few.k = k;
    few.columns = columns;
    few.gain = as<float>(gain);
    few.b = b;
    few.bias = bias;
    const auto columns_from = [&](int64_t c) {
      if (c + COLUMNS <= n) return few.template some<COLUMNS>(c);
      for (; c < n; ++c) few.template some<1>(c);
    };
    Team team;
#pragma omp parallel for num_threads(threads_for_few(m, n, k)) schedule(static)
    for (int64_t c = 0; c < n; c += COLUMNS) team.run([&] { columns_from(c); });
    team.finish();
  });
}

}  // namespace peftops::ISA
