// DoRA's norm in fp32, and for weights whose rows do not start at a multiple of 16 bytes. It
// makes tiles of b·a by plain multiply-adds, since tensor cores have no full fp32 and the other
// kernels read 16 bytes at a time.
#include "dora.cuh"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int BN = 64;         // rows of a tile, which has UNIT = 64 columns
constexpr int RANKS = 16;      // that are multiplied between barriers
constexpr int PITCH = 64 + 4;  // floats from a rank to the next

// An element of Ŵ, whatever its form.
template <class T>
DEVICE float weight(const Norm& g, const Decoder& decoder, int row, int column) {
  const int64_t at =
      g.form == Form::transposed ? int64_t(column) * g.n + row : int64_t(row) * g.k + column;
  if (g.form != Form::nf4) return widen(static_cast<const T*>(g.w)[at]);
  const float absmax =
      absmax_of(g.base, load_scale(g.base, at), decoder.nested_table, decoder.offset);
  const int code = g.base.codes[at / 2] >> (at & 1 ? 0 : 4) & 15;
  return rounded<T>(__fmul_rn(decoder.table[code * COPIES], absmax));
}

// Sums squares. A thread has four rows and four columns of a tile.
// limits: registers 48-128, shared 11000-12000, fma 64-
template <class T>
__global__ void __launch_bounds__(THREADS, 2) dora_plain_kernel(Norm g) {
  __shared__ float s_table[16 * COPIES], s_nested[NESTED];
  __shared__ __align__(16) float s_a[RANKS][PITCH], s_b[RANKS][PITCH];
  const int tid = threadIdx.x, x = tid % 16 * 4, y = tid / 16 * 4;
  const int split = blockIdx.x % g.splits, n0 = blockIdx.x / g.splits * BN;
  const Part part = part_of(g, split, UNIT);
  const float scale = *g.scale;
  const bool aligned = sizeof(T) == 4 && g.form == Form::dense && g.k % 4 == 0;
  Decoder decoder{};
  if (g.form == Form::nf4) decoder = decoder_of(g.base, s_table, s_nested);
  __syncthreads();
  allow_launch_behind();

  float sums[4] = {};
#pragma unroll 1
  for (int tile = part.first; tile < part.last; ++tile) {
    const int column = tile * UNIT + x;
    float w[4][4] = {}, acc[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = n0 + y + i;
      if (row < g.n && column < g.k && aligned)
        *reinterpret_cast<float4*>(w[i]) = __ldg(reinterpret_cast<const float4*>(
            static_cast<const float*>(g.w) + int64_t(row) * g.k + column));
      else
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (row < g.n && column + j < g.k) w[i][j] = weight<T>(g, decoder, row, column + j);
    }
#pragma unroll 1
    for (int rank = 0; rank < g.r; rank += RANKS) {
      __syncthreads();
#pragma unroll
      for (int q = 0; q < RANKS * 64 / THREADS; ++q) {
        const int o = tid + q * THREADS;
        const int of_a = o / 64, c = o % 64;        // a rank and a column of a
        const int of_b = o % RANKS, r = o / RANKS;  // a rank and a row of b
        const int k = tile * UNIT + c, n = n0 + r;
        s_a[of_a][c] =
            rank + of_a < g.r && k < g.k
                ? rounded<T>(element<T>(g.from_a, int64_t(rank + of_a) * g.k + k, g.wide_a))
                : 0.0f;
        s_b[of_b][r] =
            rank + of_b < g.r && n < g.n
                ? rounded<T>(element<T>(g.from_b, int64_t(n) * g.r + rank + of_b, g.wide_b))
                : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < RANKS; ++j) {
        const float4 a = *reinterpret_cast<const float4*>(s_a[j] + x);
        const float4 b = *reinterpret_cast<const float4*>(s_b[j] + y);
        const float r_a[] = {a.x, a.y, a.z, a.w}, r_b[] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] += r_b[i / 4] * r_a[i % 4];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float v = w[i][j] + scale * acc[i][j];
        if (column + j < g.k) sum += v * v;
      }
      sums[i] += sum;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int o = 8; o; o /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], o);
    if (x == 0 && n0 + y + i < g.n) g.sums[int64_t(split) * g.n + n0 + y + i] = sums[i];
  }
}

}  // namespace

int launch_dora_plain(const Norm& g, Dtype dtype, uintptr_t stream) {
  const dim3 blocks(int64_t((g.n + BN - 1) / BN) * g.splits);
  return with_type(dtype, [&](auto t) {
    return launch(dora_plain_kernel<decltype(t)>, blocks, THREADS, 0, stream, false, g);
  });
}

}  // namespace peftops::cuda
