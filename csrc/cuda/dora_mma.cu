// DoRA's norm for more than 64 ranks, in 16 bits. Here multiplying takes as long as reading Ŵ.
// So tiles are large, the fragments of both b and a stream through shared memory, and Ŵ is
// prefetched into L2 while its tile of b·a is made.
#include "dora.cuh"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int BN = 128, BK = 256;  // rows and columns of a block's tile
constexpr int STEPS = 2;           // of 16 ranks, in a stage
constexpr int STAGES = 4;          // on their way or in use
// 16-byte fragments of a stage
constexpr int OF_A = BK / UNIT * STEPS * FRAGMENTS_A;
constexpr int OF_B = BN / BAND * STEPS * FRAGMENTS_B;
constexpr int STAGE = OF_A + OF_B;
constexpr size_t SHARED = STAGES * STAGE * sizeof(uint4);
static_assert(SHARED + (3 << 10) <= 99 << 10, "");

// Loads the lane's pieces that hold one eight; zeros past the last row or column.
template <Form F>
DEVICE void load_pieces(uint32_t (&words)[16], const Norm& g, int row, int column, int t,
                        int eight) {
  using P = Pieces<F>;
#pragma unroll
  for (int p = 0; p < P::EIGHT; ++p) {
    const void* from = piece<F>(g, row, column, t, p + eight * (P::COUNT - P::EIGHT));
    if constexpr (P::BYTES == 16)
      *reinterpret_cast<uint4*>(words + p * 4) = from ? load_once(from) : uint4{};
    else
      *reinterpret_cast<uint2*>(words + p * 2) =
          from ? __ldg(static_cast<const uint2*>(from)) : uint2{};
  }
}

// Sums squares. Of the eight warps, two are along the rows, with two bands each, and four along
// k, with a unit each. A chunk is the STEPS · 16 ranks of a stage.
// limits: registers 160-255, shared 0-3072, mma 64-, async 6-, fma 128-
template <Form F, class T>
__global__ void __launch_bounds__(THREADS, 1) dora_wide_kernel(Norm g) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  uint4* s_stages = reinterpret_cast<uint4*>(s_memory);
  const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, t = lane % 4;
  const int i_n = tid / 32 % 2, i_k = tid / 64;  // the warp's place
  const int split = blockIdx.x % g.splits, n0 = blockIdx.x / g.splits * BN;
  const int row = n0 + i_n * 2 * BAND + quad * 4;  // the lane's first, of the first band
  const int chunks = g.steps / STEPS;
  const int units = (g.k + UNIT - 1) / UNIT, bands = (g.n + BAND - 1) / BAND;
  const Part part = part_of(g, split, BK);
  const float scale = *g.scale;
  Decoder decoder{};
  if constexpr (F == Form::nf4) {
    __shared__ float s_table[16 * COPIES], s_nested[NESTED];
    decoder = decoder_of(g.base, s_table, s_nested);
  }

  int tile_next = part.first, chunk_next = 0, stage_next = 0;
  // Starts the copies of the next stage, which may be of the next tile.
  auto start = [&] {
    if (tile_next < part.last) {
      uint4* stage = s_stages + stage_next * STAGE + tid;
      constexpr int EACH_A = STEPS * FRAGMENTS_A, EACH_B = STEPS * FRAGMENTS_B;
      static_assert(EACH_A == THREADS && EACH_B * 2 == THREADS, "");
#pragma unroll
      for (int q = 0; q < BK / UNIT; ++q) {
        const int unit = tile_next * (BK / UNIT) + q;
        const uint4* from = g.a + (int64_t(unit) * chunks + chunk_next) * EACH_A + tid;
        copy_async(stage + q * EACH_A, unit < units ? from : g.a, unit < units ? 16 : 0);
      }
#pragma unroll
      for (int q = 0; q < BN / BAND / 2; ++q) {
        const int band = n0 / BAND + q * 2 + tid / EACH_B;
        const uint4* from = g.b + (int64_t(band) * chunks + chunk_next) * EACH_B + tid % EACH_B;
        copy_async(stage + OF_A + q * THREADS, band < bands ? from : g.b,
                   band < bands ? 16 : 0);
      }
      if (++chunk_next == chunks) {
        chunk_next = 0;
        ++tile_next;
      }
      stage_next = (stage_next + 1) % STAGES;
    }
    commit_copies();
  };

  wait_for_launch_before();
  allow_launch_behind();
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) start();
  float sums[2][4] = {};
  int at = 0;  // the stage in use
#pragma unroll 1
  for (int tile = part.first; tile < part.last; ++tile) {
    const int column = tile * BK + i_k * UNIT;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const void* from =
              F == Form::transposed
                  ? piece<F>(g, n0 + i_n * 2 * BAND, column + i * 32 + lane, 0, 0)
                  : piece<F>(g, row + i * BAND + t, column, 0, 0))
        prefetch(from);
    float acc[2][2][2][4][4] = {};  // of each band and eight
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_copies<STAGES - 2>();
      __syncthreads();
      start();
      const uint4* s_a = s_stages + at * STAGE + i_k * STEPS * FRAGMENTS_A + lane;
      const uint4* s_b = s_stages + at * STAGE + OF_A + i_n * 2 * STEPS * FRAGMENTS_B + lane;
      at = (at + 1) % STAGES;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        uint4 r_b[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          r_b[i / 2][i % 2] = s_b[(i / 2 * STEPS + s) * FRAGMENTS_B + i % 2 * 32];
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const uint4 a0 = s_a[(s * 4 + eight * 2) * 32];
          const uint4 a1 = s_a[(s * 4 + eight * 2 + 1) * 32];
#pragma unroll
          for (int i = 0; i < 2; ++i) multiply<T>(acc[i][eight], r_b[i], a0, a1);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = row + i * BAND;
      float absmax[4] = {};
      if constexpr (F == Form::nf4) {
        const int mine = column + column_of<F>(0, t);
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (first + q < g.n && mine < g.k)
            absmax[q] = absmax_of(g.base, load_scale(g.base, int64_t(first + q) * g.k + mine),
                                  decoder.nested_table, decoder.offset);
      }
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        uint32_t words[16];
        load_pieces<F>(words, g, first, column, t, eight);
        const bool inside = column + column_of<F>(eight, t) < g.k;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          float w[8];
          row_of<F, T>(w, words, q, eight, decoder, absmax[q]);
          sums[i][q] += inside ? squares(w, scale, acc[i][eight][q / 2], q % 2) : 0.0f;
        }
      }
    }
  }

  // Adds the sums of the warps along k, in their order.
  wait_copies<0>();
  __syncthreads();
  float* s_sums = reinterpret_cast<float*>(s_memory);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float sum = sums[i][q];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) s_sums[i_k * BN + row - n0 + i * BAND + q] = sum;
    }
  __syncthreads();
  if (tid >= BN || n0 + tid >= g.n) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < BK / UNIT; ++i) sum += s_sums[i * BN + tid];
  g.sums[int64_t(split) * g.n + n0 + tid] = sum;
}

template <class T>
int wide(const Norm& g, uintptr_t stream) {
  const dim3 blocks(int64_t((g.n + BN - 1) / BN) * g.splits);
  auto kernel = dora_wide_kernel<Form::transposed, T>;
  if (g.form == Form::nf4) kernel = dora_wide_kernel<Form::nf4, T>;
  if (g.form == Form::dense) kernel = dora_wide_kernel<Form::dense, T>;
  return launch(kernel, blocks, THREADS, SHARED, stream, true, g);
}

}  // namespace

int launch_dora_wide(const Norm& g, Dtype dtype, uintptr_t stream) {
  return dtype == Dtype::f16 ? wide<__half>(g, stream) : wide<__nv_bfloat16>(g, stream);
}

}  // namespace peftops::cuda
