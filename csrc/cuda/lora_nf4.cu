// LoRA for few rows on a 4-bit base. Every byte of codes is read once and decoded where it is
// multiplied, so that the weight is never stored in 16 bits. k is a multiple of 32, so that 16
// bytes of codes lie in one row and one block.
#include "lora.cuh"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int GROUP = 32;   // columns of k whose codes are 16 bytes
constexpr int COPIES = 16;  // of the lookup table: one for each lane of half a warp
constexpr int LOOKUP = 256 * COPIES * 2;  // floats: two values for each byte of codes

// A block makes BM rows and BN columns of y. Its eight warps are WARPS_N = BN / (16 · TILES)
// along the columns times WARPS_K along k, within each tile of BK columns of k.
template <int BM, int BN>
struct Shape {
  static constexpr int BK = BM > 8 ? 128 : 16384 / BN;
  static constexpr int CHUNKS = BK / GROUP;                  // 16 bytes of codes, of a row
  static constexpr int EIGHTS = BK / 8;                      // 16 bytes of x, of a row
  static constexpr int BITS = CHUNKS / 8 + 2;                // log2 of CHUNKS
  static constexpr int TILES = BM == 8 || BN == 64 ? 2 : 1;  // of 16 columns of y, of a warp
  static constexpr int WARPS_N = BN / 16 / TILES;
  static constexpr int WARPS_K = WARPS / WARPS_N;
  static constexpr int STAGES = BM == 64 || BK == 512 ? 3 : 4;  // tiles on their way or in use
  // Floats from a row of scales or sums to the next; + 4, so that no two lanes meet in a bank.
  static constexpr int PITCH = BN + 4, WIDTH = BN + 4;
  // Bytes of a stage: codes from 0, x from AT_X, scales from AT_SCALES to STAGE.
  static constexpr int AT_X = BN * BK / 2;
  static constexpr int AT_SCALES = AT_X + BM * BK * 2;
  static constexpr int STAGE = AT_SCALES + CHUNKS * PITCH * 4;
  static constexpr size_t SHARED = LOOKUP * 4 + STAGES * STAGE;
  static_assert(CHUNKS == 1 << BITS && CHUNKS % WARPS_K == 0 && STAGE % 16 == 0 &&
                    SHARED + NESTED * 4 <= 99 << 10,
                "");
  static_assert(SHARED >= 4 * WARPS_K * BM * WIDTH, "sums lie where tiles lay");
};

// Where 16 bytes of a row of a tile lie. Those that a warp reads at once are in different
// banks.
template <int CHUNKS>
DEVICE int codes_at(int row, int chunk) {
  return (row * CHUNKS + (chunk ^ (CHUNKS < 8 ? row * CHUNKS / 8 & CHUNKS - 1 : row & 7))) * 16;
}
template <int EIGHTS>
DEVICE int x_at(int row, int eight) {
  return (row * EIGHTS + (eight ^ (row & 1) * 4)) * 16;
}

// A block makes BN columns of y (m, n), m ≤ BM. Rows of the base are the left operand of the
// tensor cores. In a group of 32 columns of k, lane t of four has the columns 8t to 8t + 7: one
// word of codes and 16 bytes of x. It looks up the two values of each byte of codes, multiplies
// them by absmax in fp32 and rounds once, which gives the same bits as dequantizing.
// limits: registers 48-160, shared 1024, mma 8-, async 8-, wide 8-, loop 160-400
template <int BM, int BN, class T>
__global__ void __launch_bounds__(THREADS, BM == 64 ? 1 : 2) lora_nf4_kernel(GemvNf4 g) {
  using S = Shape<BM, BN>;
  extern __shared__ __align__(128) unsigned char s_memory[];
  __shared__ float s_nested[NESTED];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int i_n = warp % S::WARPS_N, i_k = warp / S::WARPS_N;  // the warp's place
  const int n0 = blockIdx.x * BN, tiles = (g.k + S::BK - 1) / S::BK;
  const int quad = lane / 4, t_quad = lane % 4;  // the lane's place
  const Nf4 base = g.base;
  const float offset = base.nested ? *base.offset : 0.0f;
  unsigned char* s_tiles = s_memory + LOOKUP * 4;

  // A thread copies the same chunks of each tile, in the rows row + q · STEP. Rows past the
  // last one repeat it; their sums are not stored.
  constexpr int STEP = THREADS / S::CHUNKS, EACH = (BN + STEP - 1) / STEP;
  constexpr int STEP_X = THREADS / S::EIGHTS;
  const int row = tid / S::CHUNKS, chunk = tid % S::CHUNKS;
  const int row_x = tid / S::EIGHTS, eight = tid % S::EIGHTS;
  const int to = codes_at<S::CHUNKS>(row, chunk);
  const int to_x = S::AT_X + x_at<S::EIGHTS>(row_x, eight);
  const uint8_t* from[EACH];
#pragma unroll
  for (int q = 0; q < EACH; ++q)
    from[q] =
        base.codes + (int64_t(min(n0 + row + q * STEP, g.n - 1)) * g.k + chunk * GROUP) / 2;
  const T* from_x = static_cast<const T*>(g.x) + int64_t(row_x) * g.k + eight * 8;
  // It fetches scales, too: one for a pair of chunks if blocks hold whole pairs.
  const int pairs = base.shift > 5 && g.k % 64 == 0;  // 1 or 0
  const int bits = S::BITS - pairs, step_s = THREADS >> bits;
  const int row_s = tid >> bits, chunk_s = tid - (row_s << bits);
  const int k_s = chunk_s * GROUP << pairs;
  uint64_t from_s[EACH];
#pragma unroll
  for (int q = 0; q < EACH; ++q)
    from_s[q] = uint64_t(min(n0 + row_s + q * step_s, g.n - 1)) * g.k + k_s;
  // Starts the copies of tile t. Its scales wait in registers until the tile before has been
  // multiplied.
  auto start = [&](int t, Scale(&waiting)[EACH]) {
    unsigned char* tile = s_tiles + t % S::STAGES * S::STAGE;
    const int k = t * S::BK, left = g.k - k;
#pragma unroll
    for (int q = 0; q < EACH; ++q)
      if (BN % STEP == 0 || row + q * STEP < BN)
        copy_async(tile + to + q * STEP * S::CHUNKS * 16, from[q] + k / 2,
                   chunk * GROUP < left ? 16 : 0);
#pragma unroll
    for (int q = 0; q < BM / STEP_X; ++q)
      if (row_x + q * STEP_X < g.m)
        copy_async(tile + to_x + q * STEP_X * S::EIGHTS * 16,
                   from_x + int64_t(q * STEP_X) * g.k + k, eight * 8 < left ? 16 : 0);
#pragma unroll
    for (int q = 0; q < EACH; ++q) {
      waiting[q] = {0, 0};
      if (row_s + q * step_s < BN && k_s < left) waiting[q] = load_scale(base, from_s[q] + k);
    }
  };
  auto keep = [&](int t, const Scale(&waiting)[EACH]) {
    float* s_scales =
        reinterpret_cast<float*>(s_tiles + t % S::STAGES * S::STAGE + S::AT_SCALES);
#pragma unroll
    for (int q = 0; q < EACH; ++q)
      if (const int at = row_s + q * step_s; at < BN)
        s_scales[chunk_s * S::PITCH + at] = absmax_of(base, waiting[q], s_nested, offset);
  };

  Scale first[S::STAGES - 1][EACH], waiting[EACH];
#pragma unroll
  for (int t = 0; t < S::STAGES - 1; ++t) {
    if (t < tiles) start(t, first[t]);
    commit_copies();
  }
  if (g.slots) prefetch_b<T>(g, 0, g.m, n0, min(BN, g.n - n0));
  if (base.nested) s_nested[tid] = base.nested_table[tid];
  static_assert(THREADS == NESTED, "");
  float2* s_pairs = reinterpret_cast<float2*>(s_memory);
#pragma unroll 8
  for (int i = tid; i < 256 * COPIES; i += THREADS)
    s_pairs[i] = {__ldg(base.table + i / COPIES / 16), __ldg(base.table + i / COPIES % 16)};
  __syncthreads();
#pragma unroll
  for (int t = 0; t < S::STAGES - 1; ++t)
    if (t < tiles) keep(t, first[t]);

  float acc[S::TILES][BM / 8][4] = {};
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    const int next = t + S::STAGES - 1;
    wait_copies<S::STAGES - 2>();
    __syncthreads();
    if (next < tiles) start(next, waiting);
    commit_copies();
    const unsigned char* tile = s_tiles + t % S::STAGES * S::STAGE;
    const float* s_scales = reinterpret_cast<const float*>(tile + S::AT_SCALES);
#pragma unroll
    for (int c = 0; c < S::CHUNKS / S::WARPS_K; ++c) {
      const int i_chunk = c * S::WARPS_K + i_k, i_row = i_n * S::TILES * 16 + quad;
      const unsigned char* codes = tile + codes_at<S::CHUNKS>(i_row, i_chunk) + t_quad * 4;
      const float* absmax = s_scales + (i_chunk >> pairs) * S::PITCH + i_row;
      const unsigned char* x = tile + S::AT_X + x_at<S::EIGHTS>(quad, i_chunk * 4 + t_quad);
      uint32_t r_w[S::TILES][2][4];
#pragma unroll
      for (int i = 0; i < S::TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int below = i * 16 + half * 8;  // eight rows further, chunks lie the same way
          const uint32_t word =
              *reinterpret_cast<const uint32_t*>(codes + below * S::CHUNKS * 16);
          const float scale = absmax[below];
#pragma unroll
          for (int byte = 0; byte < 4; ++byte) {
            const uint32_t at =
                (byte ? word >> byte * 8 - 7 : word << 7) & 0x7f80 | lane % COPIES * 8;
            const float2 values = *reinterpret_cast<const float2*>(s_memory + at);
            r_w[i][byte / 2][byte % 2 * 2 + half] =
                pair<T>(__fmul_rn(values.x, scale), __fmul_rn(values.y, scale));
          }
        }
#pragma unroll
      for (int j = 0; j < BM / 8; ++j) {
        if (BM > 8 && j * 8 >= g.m) break;
        uint4 r_x{};
        if (j * 8 + quad < g.m)
          r_x = *reinterpret_cast<const uint4*>(x + j * 8 * S::EIGHTS * 16);
#pragma unroll
        for (int i = 0; i < S::TILES; ++i) {
          multiply<T>(acc[i][j], r_w[i][0], r_x.x, r_x.y);
          multiply<T>(acc[i][j], r_w[i][1], r_x.z, r_x.w);
        }
      }
    }
    if (next < tiles) keep(next, waiting);
  }

  // Adds the sums of the warps along k, in their order.
  wait_copies<0>();
  __syncthreads();
  float* s_y = reinterpret_cast<float*>(s_memory);
#pragma unroll
  for (int i = 0; i < S::TILES; ++i)
#pragma unroll
    for (int j = 0; j < BM / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i_k * BM + j * 8 + t_quad * 2 + e % 2;
        const int column = (i_n * S::TILES + i) * 16 + quad + e / 2 * 8;
        s_y[row * S::WIDTH + column] = acc[i][j][e];
      }
  __syncthreads();
  if (!g.inside) wait_for_launch_before();
#pragma unroll 1
  for (int o = tid; o < g.m * BN; o += THREADS) {
    const int row = o / BN, c = o % BN;
    if (n0 + c >= g.n) continue;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < S::WARPS_K; ++part) sum += s_y[(part * BM + row) * S::WIDTH + c];
    store<T>(g, row, n0 + c, sum, g.h + int64_t(row) * g.r);
  }
}

// One to four rows of fp32. A warp multiplies x with one row of the base.
// limits: registers 64-208, shared 1088-1152, wide 16-, fma 64-
template <int M>
__global__ void __launch_bounds__(THREADS, M == 1 ? 2 : 1) lora_nf4_few_kernel(GemvNf4 g) {
  __shared__ float s_table[16], s_nested[NESTED];
  const int tid = threadIdx.x, lane = tid % 32, n = blockIdx.x * WARPS + tid / 32;
  const Nf4 base = g.base;
  if (tid < 16) s_table[tid] = base.table[tid];
  if (base.nested) s_nested[tid] = base.nested_table[tid];
  __syncthreads();
  if (n >= g.n) return;
  const float offset = base.nested ? *base.offset : 0.0f;
  const float* x = static_cast<const float*>(g.x);
  float sums[M] = {};
#pragma unroll(M > 1 ? 1 : 2)
  for (int k = lane * GROUP; k < g.k; k += 32 * GROUP) {
    const int64_t at = int64_t(n) * g.k + k;
    const uint4 codes = load_once(static_cast<const void*>(base.codes + at / 2));
    const float absmax = absmax_of(base, load_scale(base, at), s_nested, offset);
    const uint32_t words[] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float r_w[8], r_x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e)
        r_w[e] = __fmul_rn(s_table[words[q] >> (e ^ 1) * 4 & 15], absmax);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        widen(r_x, load(x + int64_t(min(i, g.m - 1)) * g.k + k + q * 8));
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[i] += r_w[e] * r_x[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < M; ++i) sums[i] = warp_sum(sums[i]);
  if (!g.inside) wait_for_launch_before();
#pragma unroll
  for (int i = 0; i < M; ++i)
    if (lane == i && i < g.m) store<float>(g, i, n, sums[i], g.h + int64_t(i) * g.r);
}

// Launches the kernel of this shape.
template <int BM, int BN, class T>
int start(const GemvNf4& g, uintptr_t stream) {
  const dim3 blocks((g.n + BN - 1) / BN);
  return launch(lora_nf4_kernel<BM, BN, T>, blocks, THREADS, Shape<BM, BN>::SHARED, stream,
                !g.inside, g);
}

// A block makes 64 columns if that leaves two blocks for every multiprocessor, or, for more
// than eight rows, one block for every second multiprocessor. Else it makes 32.
template <class T>
int choose(const GemvNf4& g, int processors, uintptr_t stream) {
  const int tiles = (g.n + 63) / 64;
  if (g.m <= 8)
    return tiles >= 2 * processors ? start<8, 64, T>(g, stream) : start<8, 32, T>(g, stream);
  const bool wide = 2 * tiles > processors;
  if (g.m <= 32) return wide ? start<32, 64, T>(g, stream) : start<32, 32, T>(g, stream);
  return wide ? start<64, 64, T>(g, stream) : start<64, 32, T>(g, stream);
}

}  // namespace

// 64 rows at most, or four of fp32.
int launch_lora_nf4(const GemvNf4& g, Dtype dtype, int processors, uintptr_t stream) {
  if (g.k % GROUP || g.m > (dtype == Dtype::f32 ? 4 : 64)) return cudaErrorInvalidValue;
  if (dtype == Dtype::f16) return choose<__half>(g, processors, stream);
  if (dtype == Dtype::bf16) return choose<__nv_bfloat16>(g, processors, stream);
  const dim3 blocks((g.n + WARPS - 1) / WARPS);
  return launch(g.m == 1 ? lora_nf4_few_kernel<1> : lora_nf4_few_kernel<4>, blocks, THREADS, 0,
                stream, !g.inside, g);
}

}  // namespace peftops::cuda
