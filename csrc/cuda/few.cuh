// Products of a few rows of x with rows of a matrix, which is read once, 16 bytes at a time by
// each thread.
#pragma once
#include "tile.cuh"

namespace peftops::cuda {
namespace {

// Where rows of x start if they lie one below the other. Those past the last one repeat it.
struct Below {
  int last;  // the index of the last one
  int k;     // columns

  DEVICE int operator()(int i) const { return min(i, last) * k; }
};

// sums[i] += w · row i of x over eight columns. It starts at x + start(i).
template <int M, class W, class T, class Start>
DEVICE void multiply(float (&sums)[M], const Eight<W>& w, const T* x, const Start& start) {
  float r_w[8], r_x[8];
  widen(r_w, w);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    widen(r_x, load(x + start(i)));
#pragma unroll
    for (int e = 0; e < 8; ++e)
      sums[i] += (sizeof(W) == sizeof(T) ? r_w[e] : rounded<T>(r_w[e])) * r_x[e];
  }
}

// sums[i] += row · row i of x over the eights of columns that start at begin, begin + step, …
template <int M, class W, class T, class Start>
DEVICE void dots(float (&sums)[M], const W* row, const T* x, const Start& start, int k,
                 int begin, int step) {
  // Loads in flight: 2 KiB of a row for each warp, or half of that if x takes the registers.
  constexpr int DEPTH = M > 1 && sizeof(T) == 4 ? 1 : 8 / sizeof(W);
  int c = begin;
#pragma unroll 1
  for (; c + (DEPTH - 1) * step < k; c += DEPTH * step) {
    Eight<W> r_w[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) r_w[d] = load_once(row + c + d * step);
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) multiply(sums, r_w[d], x + c + d * step, start);
  }
#pragma unroll 1
  for (; c < k; c += step) multiply(sums, load_once(row + c), x + c, start);
}

// The part of sums[i] += row · row i of x that is left to thread `thread` of `threads`.
template <int M, class W, class T, class Start>
DEVICE void dots_of_any_length(float (&sums)[M], const W* row, const T* x, const Start& start,
                               int k, int thread, int threads) {
  if (k % 8 == 0) {
    dots(sums, row, x, start, k, thread * 8, threads * 8);
    return;
  }
#pragma unroll 1
  for (int c = thread; c < k; c += threads) {
    const float w = rounded<T>(widen(row[c]));
#pragma unroll
    for (int i = 0; i < M; ++i) sums[i] += w * widen(x[start(i) + c]);
  }
}

}  // namespace
}  // namespace peftops::cuda
