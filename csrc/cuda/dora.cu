// DoRA's norm: b·a by tiles on tensor cores, and Ŵ, which is read once, added to each tile
// where it was made.
#include "dora.cuh"
#include "ops.h"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, STEPS = 4;

// The fragments of b and a, rounded to T, zero past the last row, column and rank. A thread
// makes 16 bytes. limits: registers 16-64, shared 0
template <class T>
__global__ void __launch_bounds__(THREADS) dora_pack_kernel(Norm g) {
  allow_launch_behind();
  const int64_t of_b = int64_t((g.n + BAND - 1) / BAND) * g.steps * FRAGMENTS_B;
  const int64_t of_a = int64_t((g.k + UNIT - 1) / UNIT) * g.steps * FRAGMENTS_A;
  int64_t o = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const bool left = o < of_b;
  if (!left) o -= of_b;
  if (o >= of_a && !left) return;
  const int lane = o % 32, quad = lane / 4, t = lane % 4, plane = o / 32 % (left ? 2 : 4);
  const int64_t which = o / (left ? FRAGMENTS_B : FRAGMENTS_A);
  const int rank = int(which % g.steps) * STEP + t * 2, tile = int(which / g.steps);
  const void* from = left ? g.from_b : g.from_a;
  const bool wide = left ? g.wide_b : g.wide_a;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // registers in the order of PTX: of b rows first, then ranks; of a ranks first, then
    // columns
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
  static constexpr int STAGES = F == Form::nf4 ? 4 : 2;
  static constexpr int OF_W = Pieces<F>::COUNT * Pieces<F>::BYTES * THREADS;
  static int stage(int steps) { return OF_W + steps * FRAGMENTS_A * 16; }
  static_assert(STAGES * (OF_W + STEPS * FRAGMENTS_A * 16) + (F == Form::nf4 ? 3 << 10 : 0) <=
                    99 << 10,
                "");
};

// 64 ranks at most. A warp keeps b of a band, and goes through units of k, which the block's
// warps share. What a lane needs of Ŵ it copies to shared memory for itself, so that no
// registers wait for it. limits: registers 64-128, shared 0-3072, mma 64-, async 6-, fma 64-
template <Form F, class T>
__global__ void __launch_bounds__(THREADS, 2) dora_norm_kernel(Norm g) {
  using S = Shape<F>;
  using P = Pieces<F>;
  extern __shared__ __align__(128) unsigned char s_memory[];
  const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, t = lane % 4;
  const int split = blockIdx.x % g.splits, band = blockIdx.x / g.splits * WARPS + tid / 32;
  const int row = band * BAND + quad * 4, size = S::OF_W + g.steps * FRAGMENTS_A * 16;
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
    if (const int next = tile + S::STAGES - 1; next < part.last) start_w(next), start_a(next);
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
      const bool inside = tile * UNIT + column_of<F>(eight, t) <
                          g.k;  // else an infinite b makes NaN of a's zeros
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

// fragments of a (⌈k/64⌉·64, steps·16) and b (⌈n/32⌉·32, steps·16) are scratch, empty where
// nothing is rounded to 16 bits for tensor cores; so is sums (splits, n).
extern "C" int dora_norm(peftops::Tensor out, peftops::Tensor sums, peftops::Tensor fragments_a,
                         peftops::Tensor fragments_b, peftops::Tensor x, peftops::Tensor w,
                         peftops::Tensor table, peftops::Tensor absmax, peftops::Tensor nested,
                         peftops::Tensor nested_table, peftops::Tensor offset,
                         peftops::Tensor a, peftops::Tensor b, peftops::Tensor scale,
                         peftops::Form form, int64_t block, bool tiled, uintptr_t stream) {
  using namespace peftops::cuda;
  using peftops::Dtype;
  const Norm g{static_cast<float*>(out.data),
               static_cast<float*>(sums.data),
               static_cast<uint4*>(fragments_a.data),
               static_cast<uint4*>(fragments_b.data),
               w.data,
               a.data,
               b.data,
               static_cast<const float*>(scale.data),
               int(b.shape[0]),
               int(x.shape[1]),
               int(a.shape[0]),
               int(fragments_a.shape[1] / STEP),
               int(sums.shape[0]),
               a.dtype == Dtype::f32,
               b.dtype == Dtype::f32,
               form,
               nf4_of(w, table, absmax, nested, nested_table, offset, block)};
  int error = !tiled                  ? launch_dora_plain(g, x.dtype, stream)
              : x.dtype == Dtype::f16 ? squared<__half>(g, x.dtype, stream)
                                      : squared<__nv_bfloat16>(g, x.dtype, stream);
  if (!error)
    error = launch(dora_root_kernel, dim3((g.n + THREADS - 1) / THREADS), THREADS, 0, stream,
                   true, g);
  return error;
}
