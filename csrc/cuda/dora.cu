// DoRA's norm ‖Ŵ + s·b·a‖ of each row for up to 64 ranks, in 16 bits. Tensor cores make tiles
// of b·a, which stay in registers; Ŵ, which is read once, is added to each of them there.
//
// Three launches overlap: one lays out b and a for the tensor cores, one sums squares over
// parts of k, and one adds these sums and takes roots.
#include "dora.cuh"
#include "ops.h"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int STEPS = 4;  // of 16 ranks, at most

// Makes the fragments of b and a, rounded to T, with zeros past the last row, column and rank.
// A thread makes 16 bytes.
// limits: registers 16-64, shared 0
template <class T>
__global__ void __launch_bounds__(THREADS) dora_pack_kernel(Norm g) {
  allow_launch_behind();
  const int64_t of_b = int64_t((g.n + BAND - 1) / BAND) * g.steps * FRAGMENTS_B;
  const int64_t of_a = int64_t((g.k + UNIT - 1) / UNIT) * g.steps * FRAGMENTS_A;
  int64_t o = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const bool left = o < of_b;  // of b, which is the left operand
  if (!left) o -= of_b;
  if (o >= of_a && !left) return;
  const int lane = o % 32, quad = lane / 4, t = lane % 4;
  const int plane = o / 32 % (left ? 2 : 4);  // [half] of b, [eight, half] of a
  const int64_t which = o / (left ? FRAGMENTS_B : FRAGMENTS_A);
  const int rank = int(which % g.steps) * STEP + t * 2;
  const int tile = int(which / g.steps);  // the band or the unit
  const void* from = left ? g.from_b : g.from_a;
  const bool wide = left ? g.wide_b : g.wide_a;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Registers in the order of PTX: of b rows first, then ranks; of a ranks first, then
    // columns.
    const int first = rank + (left ? i / 2 : i % 2) * 8, pair_a = plane % 2 * 2 + i / 2;
    const int row = tile * BAND + quad * 4 + plane * 2 + i % 2;
    const int column = tile * UNIT + quad % 2 + pair_a * 2 +
                       (g.form == Form::nf4 ? column_of<Form::nf4>(plane / 2, quad / 2)
                                            : column_of<Form::dense>(plane / 2, quad / 2));
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool inside = first + e < g.r && (left ? row < g.n : column < g.k);
      const int64_t at =
          left ? int64_t(row) * g.r + first + e : int64_t(first + e) * g.k + column;
      v[e] = inside ? element<T>(from, at, wide) : 0.0f;
    }
    words[i] = pair<T>(v[0], v[1]);
  }
  (left ? g.b : g.a)[o] = {words[0], words[1], words[2], words[3]};
}

template <Form F>
struct Shape {
  static constexpr int STAGES = F == Form::nf4 ? 4 : 2;  // tiles on their way or in use
  static constexpr int OF_W = Pieces<F>::COUNT * Pieces<F>::BYTES * THREADS;  // bytes of Ŵ
  // Bytes of a stage: Ŵ, then fragments of a.
  static int stage(int steps) { return OF_W + steps * FRAGMENTS_A * 16; }
  static_assert(STAGES * (OF_W + STEPS * FRAGMENTS_A * 16) + (F == Form::nf4 ? 3 << 10 : 0) <=
                    99 << 10,
                "");
};

// Sums squares for up to 64 ranks. A warp keeps its band's b in registers and walks through the
// units of k; the block's warps share the fragments of a. A lane copies what it needs of Ŵ to
// shared memory for itself, so that no registers wait for it.
// limits: registers 64-128, shared 0-3072, mma 64-, async 6-, fma 64-
template <Form F, class T>
__global__ void __launch_bounds__(THREADS, 2) dora_norm_kernel(Norm g) {
  using S = Shape<F>;
  using P = Pieces<F>;
  extern __shared__ __align__(128) unsigned char s_memory[];
  const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, t = lane % 4;
  const int split = blockIdx.x % g.splits, band = blockIdx.x / g.splits * WARPS + tid / 32;
  const int row = band * BAND + quad * 4;                 // the lane's first
  const int size = S::OF_W + g.steps * FRAGMENTS_A * 16;  // of a stage, in bytes
  const Part part = part_of(g, split, UNIT);
  const float scale = *g.scale;

  auto start_w = [&](int tile) {
    unsigned char* stage = s_memory + tile % S::STAGES * size;
#pragma unroll
    for (int p = 0; p < P::COUNT; ++p) {
      const void* from = piece<F>(g, row, tile * UNIT, t, p);
      copy_async<P::BYTES>(stage + (p * THREADS + tid) * P::BYTES, from ? from : g.scale,
                           from ? P::BYTES : 0);
    }
  };
  auto start_a = [&](int tile) {
    uint4* stage = reinterpret_cast<uint4*>(s_memory + tile % S::STAGES * size + S::OF_W);
    const uint4* from = g.a + int64_t(tile) * g.steps * FRAGMENTS_A;
#pragma unroll 1
    for (int i = tid; i < g.steps * FRAGMENTS_A; i += THREADS)
      copy_async(stage + i, from + i, 16);
  };
  Decoder decoder{};
  Scale scales[4] = {};  // of the next tile
  auto fetch_scales = [&](int tile) {
    const int column = tile * UNIT + column_of<F>(0, t);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (row + q < g.n && column < g.k)
        scales[q] = load_scale(g.base, int64_t(row + q) * g.k + column);
  };

#pragma unroll
  for (int i = 0; i < S::STAGES - 1; ++i)
    if (part.first + i < part.last) start_w(part.first + i);
  if constexpr (F == Form::nf4) {
    __shared__ float s_table[16 * COPIES], s_nested[NESTED];
    decoder = decoder_of(g.base, s_table, s_nested);
    if (part.first < part.last) fetch_scales(part.first);
  }
  wait_for_launch_before();
  allow_launch_behind();
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; ++i) {
    if (part.first + i < part.last) start_a(part.first + i);
    commit_copies();
  }
  uint4 r_b[STEPS][2];
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      r_b[s][i] = s < g.steps && row < g.n
                      ? g.b[((int64_t(band) * g.steps + s) * 2 + i) * 32 + lane]
                      : uint4{};

  float sums[4] = {};
#pragma unroll 1
  for (int tile = part.first; tile < part.last; ++tile) {
    wait_copies<S::STAGES - 2>();
    __syncthreads();
    if (const int next = tile + S::STAGES - 1; next < part.last) {
      start_w(next);
      start_a(next);
    }
    commit_copies();
    float absmax[4] = {};
    if constexpr (F == Form::nf4) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
        absmax[q] = absmax_of(g.base, scales[q], decoder.nested_table, decoder.offset);
      if (tile + 1 < part.last) fetch_scales(tile + 1);
    }
    const unsigned char* stage = s_memory + tile % S::STAGES * size;
    const uint4* s_a = reinterpret_cast<const uint4*>(stage + S::OF_W) + lane;
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      float acc[2][4][4] = {};
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
        if (s < g.steps)
          multiply<T>(acc, r_b[s], s_a[(s * 4 + eight * 2) * 32],
                      s_a[(s * 4 + eight * 2 + 1) * 32]);
      uint32_t words[16];
#pragma unroll
      for (int p = 0; p < P::EIGHT; ++p) {
        const unsigned char* from =
            stage + ((p + eight * (P::COUNT - P::EIGHT)) * THREADS + tid) * P::BYTES;
        if constexpr (P::BYTES == 16)
          *reinterpret_cast<uint4*>(words + p * 4) = *reinterpret_cast<const uint4*>(from);
        else
          *reinterpret_cast<uint2*>(words + p * 2) = *reinterpret_cast<const uint2*>(from);
      }
      // Past the last column a is zero, and an infinite b would make NaN of it.
      const bool inside = tile * UNIT + column_of<F>(eight, t) < g.k;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float w[8];
        row_of<F, T>(w, words, q, eight, decoder, absmax[q]);
        sums[q] += inside ? squares(w, scale, acc[q / 2], q % 2) : 0.0f;
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    sums[q] += __shfl_xor_sync(~0u, sums[q], 1);
    sums[q] += __shfl_xor_sync(~0u, sums[q], 2);
    if (t == 0 && row + q < g.n) g.sums[int64_t(split) * g.n + row + q] = sums[q];
  }
}

// Adds the sums of all parts of k, in their order, and takes roots. A thread makes a row.
// limits: registers 12-64, shared 0
__global__ void __launch_bounds__(THREADS) dora_root_kernel(Norm g) {
  const int row = blockIdx.x * THREADS + threadIdx.x;
  wait_for_launch_before();
  if (row >= g.n) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < g.splits; ++i) sum += g.sums[int64_t(i) * g.n + row];
  g.out[row] = __fsqrt_rn(sum);
}

template <class T>
int pack(const Norm& g, uintptr_t stream) {
  const int64_t of_b = int64_t((g.n + BAND - 1) / BAND) * g.steps * FRAGMENTS_B;
  const int64_t of_a = int64_t((g.k + UNIT - 1) / UNIT) * g.steps * FRAGMENTS_A;
  return launch(dora_pack_kernel<T>, dim3((of_a + of_b + THREADS - 1) / THREADS), THREADS, 0,
                stream, false, g);
}

template <Form F, class T>
int few(const Norm& g, uintptr_t stream) {
  const dim3 blocks(int64_t((g.n + WARPS * BAND - 1) / (WARPS * BAND)) * g.splits);
  const size_t shared = Shape<F>::STAGES * Shape<F>::stage(g.steps);
  return launch(dora_norm_kernel<F, T>, blocks, THREADS, shared, stream, g.r > 0, g);
}

// Launches whatever fills g.sums.
template <class T>
int squared(const Norm& g, Dtype dtype, uintptr_t stream) {
  if (g.r)
    if (const int error = pack<T>(g, stream)) return error;
  if (g.r > STEPS * STEP) return launch_dora_wide(g, dtype, stream);
  if (g.form == Form::nf4) return few<Form::nf4, T>(g, stream);
  return g.form == Form::dense ? few<Form::dense, T>(g, stream)
                               : few<Form::transposed, T>(g, stream);
}

}  // namespace
}  // namespace peftops::cuda

// out (n,) = ‖Ŵ + s·b·a‖ of each row of Ŵ (n, k).
//   sums: fp32 scratch (splits, n)
//   fragments_a, fragments_b: scratch (⌈k/64⌉·64, steps·16) and (⌈n/32⌉·32, steps·16) in x's
//     dtype; empty if no tensor cores are used
//   x: says k and in which dtype to compute; it is not read
//   w: Ŵ, or its codes with table, absmax, nested, nested_table, offset and block, see Nf4
//   tiled: Ŵ can be read 16 bytes at a time, and x has 16 bits
extern "C" int dora_norm(peftops::Tensor out, peftops::Tensor sums, peftops::Tensor fragments_a,
                         peftops::Tensor fragments_b, peftops::Tensor x, peftops::Tensor w,
                         peftops::Tensor table, peftops::Tensor absmax, peftops::Tensor nested,
                         peftops::Tensor nested_table, peftops::Tensor offset,
                         peftops::Tensor a, peftops::Tensor b, peftops::Tensor scale,
                         peftops::Form form, int64_t block, bool tiled, uintptr_t stream) {
  using namespace peftops::cuda;
  using peftops::Dtype;
  Norm g{};
  g.out = static_cast<float*>(out.data);
  g.sums = static_cast<float*>(sums.data);
  g.a = static_cast<uint4*>(fragments_a.data);
  g.b = static_cast<uint4*>(fragments_b.data);
  g.w = w.data;
  g.from_a = a.data;
  g.from_b = b.data;
  g.scale = static_cast<const float*>(scale.data);
  g.n = int(b.shape[0]);
  g.k = int(x.shape[1]);
  g.r = int(a.shape[0]);
  g.steps = int(fragments_a.shape[1] / STEP);
  g.splits = int(sums.shape[0]);
  g.wide_a = a.dtype == Dtype::f32;
  g.wide_b = b.dtype == Dtype::f32;
  g.form = form;
  g.base = nf4_of(w, table, absmax, nested, nested_table, offset, block);
  int error;
  if (!tiled)
    error = launch_dora_plain(g, x.dtype, stream);
  else if (x.dtype == Dtype::f16)
    error = squared<__half>(g, x.dtype, stream);
  else
    error = squared<__nv_bfloat16>(g, x.dtype, stream);
  if (error) return error;
  const dim3 blocks((g.n + THREADS - 1) / THREADS);
  return launch(dora_root_kernel, blocks, THREADS, 0, stream, true, g);
}
