// ‖Ŵ + s·b·a‖ of each row of Ŵ, from tiles of b·a that are never stored. How a tile is
// multiplied is left to an engine E, of which there are two: Fma (dora.cpp) and Dots
// (dora_bf16.cpp). An engine has the types Item and Vector, CHAIN, and the functions steps,
// load, multiply, of_a and of_b.
#pragma once
#include "nf4.h"

namespace peftops::ISA {
namespace {

constexpr int NV = VECTORS;
constexpr int MR = 4;                 // rows of a tile
constexpr int64_t TILE = NV * LANES;  // columns of a tile
constexpr int64_t TALL = 32;          // rows that one thread walks along
constexpr int64_t CHUNK = 512;        // columns whose operand stays in the nearest cache
constexpr int64_t SQUARES = 16;       // squares of one fp32 sum; a longer one loses digits
constexpr int64_t PARTS = 8;          // sums of such sums, for the same reason
constexpr int64_t COLUMNS = 64;       // columns that one thread walks down
constexpr int64_t AHEAD = 16;         // rows between what is read and what is prefetched

thread_local Scratch t_a, t_b;   // of the caller, read by its team
thread_local Scratch t_decoded;  // of each thread of a team

// a (r, k) or bᵀ (r, n) as an engine wants it: items [step][column], zero beyond the last
// column.
template <class E>
struct Operand {
  const typename E::Item* at;
  int64_t ld;  // items from step to step

  // ld for so many columns. + 16, so that steps do not fall into one cache set.
  static int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64 + 16; }
};

// A matrix (rows, columns) as it lies in memory, which is Ŵ or its transpose, and the two
// operands whose product is added to it.
template <class E, class T>
struct Sum {
  const T* base;     // the matrix, or null if it has 4 bits
  const NF4& codes;  // the matrix if it has 4 bits
  Operand<E> x;      // of rows
  Operand<E> w;      // of columns
  int64_t rows, columns;
  int64_t steps;  // of the operands
  float s;        // LoRA's scale

  // v = x·w for the R rows from i on and the TILE columns from c on, over the steps [j, end).
  template <int R>
  inline __attribute__((always_inline)) void multiply(int64_t i, int64_t c, int64_t j,
                                                      int64_t end, vec (&v)[R][NV]) const {
    for (auto& row : v)
      for (auto& part : row) part = vec{};
    for (; j < end; ++j) {
      const auto* t_x = x.at + j * x.ld + i;
      const auto* t_w = w.at + j * w.ld + c;
      typename E::Vector part[NV];
#pragma GCC unroll 4
      for (int q = 0; q < NV; ++q) part[q] = E::load(t_w + LANES * q);
#pragma GCC unroll 4
      for (int e = 0; e < R; ++e)
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) v[e][q] = E::multiply(part[q], t_x[e], v[e][q]);
    }
  }

  // v = base + s · x·w for R rows and TILE columns, zero beyond the last column.
  //   from: where these elements of the base lie, ld elements from row to row
  //   WHOLE: all TILE columns exist
  template <int R, bool WHOLE>
  inline __attribute__((always_inline)) void tile(int64_t i, int64_t c, const T* from,
                                                  int64_t ld, vec (&v)[R][NV]) const {
    multiply(i, c, 0, min(steps, E::CHAIN), v);
    for (int64_t j = E::CHAIN; j < steps; j += E::CHAIN) {
      vec more[R][NV];
      multiply(i, c, j, min(steps, j + E::CHAIN), more);
      for (int e = 0; e < R; ++e)
        for (int q = 0; q < NV; ++q) v[e][q] += more[e][q];
    }
    T edge[WHOLE ? 1 : R * TILE];
    const int64_t left = columns - c;
    if (!WHOLE) {
      memset((void*)edge, 0, sizeof edge);
      for (int e = 0; e < R; ++e)
        memcpy((void*)(edge + e * TILE), from + e * ld, size_t(left) * sizeof(T));
      from = edge;
      ld = TILE;
    }
    const vec scale = s - vec{};
#pragma GCC unroll 4
    for (int e = 0; e < R; ++e)
#pragma GCC unroll 4
      for (int q = 0; q < NV; ++q) {
        v[e][q] = fma(v[e][q], scale, load(from + e * ld + LANES * q));
        // If an operand is infinite, its product with the zeros that pad the other is NaN.
        if (!WHOLE)
          for (int l = 0; l < LANES; ++l) v[e][q][l] = LANES * q + l < left ? v[e][q][l] : 0;
      }
  }

  // sum[e] += the squares of row i + e, over TILE columns.
  template <int R, bool WHOLE>
  inline __attribute__((always_inline)) void along(int64_t i, int64_t c, const T* from,
                                                   int64_t ld, vec (&sum)[R]) const {
    for (int e = 0; e < R; ++e)  // the next rows, which the hardware does not prefetch
      for (size_t b = 0; b < TILE * sizeof(T); b += 64)
        __builtin_prefetch((const char*)(from + (R + e) * ld) + b);
    vec v[R][NV];
    tile<R, WHOLE>(i, c, from, ld, v);
#pragma GCC unroll 4
    for (int e = 0; e < R; ++e)
#pragma GCC unroll 4
      for (int q = 0; q < NV; ++q) sum[e] = fma(v[e][q], v[e][q], sum[e]);
  }

  // total[e] += the squares of row i + e, over the columns [c, end).
  template <int R>
  void along_chunk(int64_t i, int64_t c, int64_t end, const T* from, int64_t ld,
                   vec* total) const {
    vec sum[R];
    for (int e = 0; e < R; ++e) sum[e] = vec{};
    for (; c + TILE <= end; c += TILE, from += TILE) along<R, true>(i, c, from, ld, sum);
    if (c < end) along<R, false>(i, c, from, ld, sum);
    for (int e = 0; e < R; ++e) total[e] += sum[e];
  }

  // sum += the squares of TILE columns from c on, over the rows [i, i + R).
  template <int R, bool WHOLE>
  inline __attribute__((always_inline)) void down(int64_t i, int64_t c, vec* sum) const {
    const T* from = base + i * columns + c;
    for (int e = 0; e < R; ++e)
      for (size_t b = 0; b < TILE * sizeof(T); b += 64)
        __builtin_prefetch((const char*)(from + (AHEAD + e) * columns) + b);
    vec v[R][NV];
    tile<R, WHOLE>(i, c, from, columns, v);
#pragma GCC unroll 4
    for (int q = 0; q < NV; ++q)
#pragma GCC unroll 4
      for (int e = 0; e < R; ++e) sum[q] = fma(v[e][q], v[e][q], sum[q]);
  }

  // The same of the columns [c, end).
  template <int R>
  void down_block(int64_t i, int64_t c, int64_t end, vec* sum) const {
    for (; c + TILE <= end; c += TILE, sum += NV) down<R, true>(i, c, sum);
    if (c < end) down<R, false>(i, c, sum);
  }

  // n[i] = ‖row i‖.
  void norms_of_rows(float* n) const {
    const auto rows_from = [&](int64_t first) {
      const int64_t count = min(TALL, rows - first);
      vec total[TALL] = {};
      for (int64_t c = 0; c < columns; c += CHUNK) {
        const int64_t some = min(CHUNK, columns - c);
        const T* from = base + first * columns + c;
        int64_t ld = columns;
        if (!base) {
          T* out = t_decoded.get<T>(TALL * (CHUNK + 32));
          from = out;
          ld = CHUNK + 32;
          for (int64_t e = 0; e < count; ++e)
            decode(codes, (first + e) * columns + c, some, out + e * ld);
        }
        int64_t i = 0;
        for (; i + MR <= count; i += MR)
          along_chunk<MR>(first + i, c, c + some, from + i * ld, ld, total + i);
        for (; i < count; ++i)
          along_chunk<1>(first + i, c, c + some, from + i * ld, ld, total + i);
      }
      for (int64_t i = 0; i < count; ++i) {
        vec& t = total[i];
        for (int half = LANES / 2; half; half /= 2)
          for (int l = 0; l < half; ++l) t[l] += t[l + half];
        n[first + i] = __builtin_sqrtf(t[0]);
      }
    };
    Team team;
#pragma omp parallel for num_threads(threads_for(rows * columns * (steps + 2))) schedule(static)
    for (int64_t first = 0; first < rows; first += TALL) team.run([&] { rows_from(first); });
    team.finish();
  }

  // n[c] = ‖column c‖.
  void norms_of_columns(float* n) const {
#pragma omp parallel for num_threads(threads_for(rows * columns * (steps + 2))) schedule(static)
    for (int64_t first = 0; first < columns; first += COLUMNS) {
      const int64_t count = min(COLUMNS, columns - first);
      vec total[PARTS][COLUMNS / LANES] = {};
      for (int64_t top = 0; top < rows; top += SQUARES) {
        const int64_t end = min(rows, top + SQUARES);
        vec sum[COLUMNS / LANES] = {};
        int64_t i = top;
        for (; i + MR <= end; i += MR) down_block<MR>(i, first, first + count, sum);
        for (; i < end; ++i) down_block<1>(i, first, first + count, sum);
        for (int64_t q = 0; q < COLUMNS / LANES; ++q) total[top / SQUARES % PARTS][q] += sum[q];
      }
      for (int64_t half = PARTS / 2; half; half /= 2)
        for (int64_t e = 0; e < half; ++e)
          for (int64_t q = 0; q < COLUMNS / LANES; ++q) total[e][q] += total[e + half][q];
      for (int64_t c = 0; c < count; ++c)
        n[first + c] = __builtin_sqrtf(total[0][c / LANES][c % LANES]);
    }
  }
};

// Launches what the form needs; arguments as in dora_norm of ops.h.
template <class E, class T>
void norm(Tensor out, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale, Form form,
          int64_t block) {
  const int64_t n = b.shape[0], k = x.shape[1], steps = E::steps(a.shape[0]);
  const Operand<E> of_a = E::template of_a<T>(a), of_b = E::template of_b<T>(b);
  const NF4 codes(base, form == Form::nf4 ? block : 0);
  const T* w = form == Form::nf4 ? nullptr : as<T>(base.at[0]);
  const float s = *as<float>(scale);
  if (form == Form::transposed)
    Sum<E, T>{w, codes, of_a, of_b, k, n, steps, s}.norms_of_columns(as<float>(out));
  else
    Sum<E, T>{w, codes, of_b, of_a, n, k, steps, s}.norms_of_rows(as<float>(out));
}

}  // namespace
}  // namespace peftops::ISA
