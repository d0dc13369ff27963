// LoRA for five rows and more on tensor cores. Tiles of w and x stream through shared memory by
// asynchronous copies; a block reads each of its tiles once. For up to 16 ranks a block can
// make h from the same tiles of x, which saves a launch.
#include "lora.cuh"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int BK = 128;         // columns of k in a tile
constexpr int CHUNKS = BK / 8;  // 16 bytes each
constexpr int MOST = 16;        // ranks whose h a block can make itself

// A block makes BM rows and BN columns of y. Its eight warps are WARPS_N = BN / 16 along the
// columns times WARPS_K along k, within each tile.
template <int BM, int BN>
struct Shape {
  static constexpr int WARPS_N = BN / 16;
  static constexpr int WARPS_K = THREADS / 32 / WARPS_N;
  static constexpr int STAGES = BN == 64 ? 4 : 6;  // tiles that are on their way or in use
  static constexpr int ROWS = BN + BM;             // of a tile: of w, then of x
  // Floats from a row of sums to the next; + 4, so that no two lanes meet in a bank.
  static constexpr int WIDTH = BN + 4, WIDTH_H = MOST + 4;
  static_assert(STAGES * ROWS * BK * 2 >= 4 * (WARPS_K * BM * (WIDTH + WIDTH_H) + BM * MOST),
                "sums lie where tiles lay");

  // Bytes of shared memory; ranks: rows of a in a tile
  static size_t shared(int ranks) { return size_t(STAGES) * (ROWS + ranks) * BK * 2; }
};

// Where a chunk of eight columns lies in a tile. Rows that ldmatrix reads at once are in
// different banks.
DEVICE int chunk_at(int row, int chunk) { return (row * CHUNKS + (chunk ^ (row & 7))) * 8; }

// A block makes a tile of y (m, n). w is the left operand of the tensor cores, so that columns
// of y fill its sixteen rows.
// limits: registers 48-176, shared 0, mma 4-, ldsm 4-, async 6-
template <int BM, int BN, class T>
__global__ void __launch_bounds__(THREADS, BM == 16 ? 2 : 1) lora_mma_kernel(Routed g) {
  using S = Shape<BM, BN>;
  extern __shared__ __align__(128) unsigned char s_memory[];
  T* s_tiles = reinterpret_cast<T*>(s_memory);
  const int tid = threadIdx.x, lane = tid % 32;
  const int i_n = tid / 32 % S::WARPS_N, i_k = tid / 32 / S::WARPS_N;  // the warp's place
  const int groups = (g.m + BM - 1) / BM;                              // tiles along m
  const int m0 = blockIdx.x % groups * BM, n0 = blockIdx.x / groups * BN;
  const int ranks = g.inside ? MOST : 0;
  const int size = (S::ROWS + ranks) * BK;  // elements of a tile
  const int tiles = (g.k + BK - 1) / BK;
  const T* x = static_cast<const T*>(g.x);
  const T* w = static_cast<const T*>(g.w);
  const T* a = static_cast<const T*>(g.a);
  const int row_a = tid / CHUNKS, chunk_a = tid % CHUNKS;  // the thread's chunk of a tile of a
  static_assert(THREADS == MOST * CHUNKS, "");
  const bool adds = g.inside && g.r > 0;  // h is made here
  const bool copies = adds && !g.wide_a;  // a is copied as it is
  const bool fetches = adds && g.wide_a;  // a is rounded on its way

  // Copies a chunk of row `at` of a matrix, or zeros, into a row of a tile that begins at
  // column k.
  auto copy = [&](T* tile, int row, int chunk, const T* matrix, int64_t at, bool inside,
                  int k) {
    inside &= k + chunk * 8 < g.k;
    copy_async(tile + chunk_at(row, chunk), inside ? matrix + at * g.k + k + chunk * 8 : matrix,
               inside ? 16 : 0);
  };
  // Starts the copies of tile t.
  auto start = [&](int t) {
    T* tile = s_tiles + t % S::STAGES * size;
    const int k = t * BK;
#pragma unroll
    for (int q = 0; q < S::ROWS * CHUNKS / THREADS; ++q) {
      const int row = (tid + q * THREADS) / CHUNKS, chunk = tid % CHUNKS, i = m0 + row - BN;
      if (row < BN)
        copy(tile, row, chunk, w, n0 + row, n0 + row < g.n, k);
      else
        copy(tile, row, chunk, x, i, i < g.m, k);
    }
    if (copies) copy(tile, S::ROWS + row_a, chunk_a, a, row_a, row_a < g.r, k);
  };
  // fp32 rows of a cannot be copied as they are. They wait in registers until the tile before
  // has been multiplied, and are rounded then.
  float waiting[8];
  auto fetch = [&](int t) {
    const int k = t * BK + chunk_a * 8;
    if (row_a < g.r && k < g.k)
      widen(waiting, load(static_cast<const float*>(g.a) + int64_t(row_a) * g.k + k));
    else
      for (int e = 0; e < 8; ++e) waiting[e] = 0;
  };
  auto keep = [&](int t) {
    T* tile = s_tiles + t % S::STAGES * size;
    *reinterpret_cast<uint4*>(tile + chunk_at(S::ROWS + row_a, chunk_a)) = narrow<T>(waiting);
  };

#pragma unroll 1
  for (int t = 0; t < S::STAGES - 1; ++t) {
    if (t < tiles) {
      start(t);
      if (fetches) {
        fetch(t);
        keep(t);
      }
    }
    commit_copies();
  }
  if (g.slots) prefetch_b<T>(g, m0, min(BM, g.m - m0), n0, min(BN, g.n - n0));
  const bool makes_h = adds && i_n == 0;  // one of the warps that read the same rows of x
  float acc[BM / 8][4] = {}, acc_h[BM / 8][4] = {};
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    const int next = t + S::STAGES - 1;
    wait_copies<S::STAGES - 2>();
    __syncthreads();
    if (next < tiles) start(next);
    commit_copies();
    if (fetches && next < tiles) fetch(next);
    const T* tile = s_tiles + t % S::STAGES * size;
#pragma unroll
    for (int kk = 0; kk < BK / 16 / S::WARPS_K; ++kk) {
      const int chunk = (kk * S::WARPS_K + i_k) * 2;
      uint32_t r_w[4], r_a[4];
      load_matrices(r_w, tile + chunk_at(i_n * 16 + lane % 16, chunk + lane / 16));
      if (makes_h) load_matrices(r_a, tile + chunk_at(S::ROWS + lane % 16, chunk + lane / 16));
#pragma unroll
      for (int j = 0; j < BM / 16; ++j) {
        uint32_t r_x[4];
        load_matrices(
            r_x, tile + chunk_at(BN + j * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
        multiply<T>(acc[2 * j], r_w, r_x[0], r_x[1]);
        multiply<T>(acc[2 * j + 1], r_w, r_x[2], r_x[3]);
        if (makes_h) {
          multiply<T>(acc_h[2 * j], r_a, r_x[0], r_x[1]);
          multiply<T>(acc_h[2 * j + 1], r_a, r_x[2], r_x[3]);
        }
      }
    }
    if (fetches && next < tiles) keep(next);
  }

  // Adds the sums of the warps along k, in their order.
  wait_copies<0>();
  __syncthreads();
  float* s_y = reinterpret_cast<float*>(s_memory);
  float* s_parts = s_y + S::WARPS_K * BM * S::WIDTH;  // of h
  float* s_h = s_parts + S::WARPS_K * BM * S::WIDTH_H;
#pragma unroll
  for (int j = 0; j < BM / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = i_k * BM + j * 8 + lane % 4 * 2 + e % 2;
      const int column = i_n * 16 + lane / 4 + e / 2 * 8;
      s_y[row * S::WIDTH + column] = acc[j][e];
      if (makes_h) s_parts[row * S::WIDTH_H + column] = acc_h[j][e];
    }
  __syncthreads();
  auto sum_of = [&](const float* parts, int row, int column, int width) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < S::WARPS_K; ++part)
      sum += parts[(part * BM + row) * width + column];
    return sum;
  };
  const int rows = min(BM, g.m - m0), columns = min(BN, g.n - n0);
  if (g.inside) {
#pragma unroll 1
    for (int o = tid; o < rows * g.r; o += THREADS)
      s_h[o / g.r * MOST + o % g.r] = rounded<T>(sum_of(s_parts, o / g.r, o % g.r, S::WIDTH_H));
    __syncthreads();
  } else {
    wait_for_launch_before();
  }
#pragma unroll 1
  for (int o = tid; o < rows * BN; o += THREADS) {
    const int row = o / BN, c = o % BN;
    const float* h = g.inside ? s_h + row * MOST : g.h + int64_t(m0 + row) * g.r;
    if (c < columns) store<T>(g, m0 + row, n0 + c, sum_of(s_y, row, c, S::WIDTH), h);
  }
}

// An instance of the kernel.
struct Choice {
  void (*kernel)(Routed);
  size_t shared;  // bytes of shared memory
  int bm, bn;     // rows and columns of y that a block makes
};

// most: bytes of shared memory that a block may have
template <class T, int BN>
Choice choose(const Routed& g, int most) {
  const int ranks = g.inside ? MOST : 0;
  const size_t shared = Shape<64, BN>::shared(ranks);
  if (g.m > 16 && shared <= size_t(most)) return {lora_mma_kernel<64, BN, T>, shared, 64, BN};
  return {lora_mma_kernel<16, BN, T>, Shape<16, BN>::shared(ranks), 16, BN};
}

}  // namespace

// A block makes 64 columns if every second multiprocessor gets a block then, else 32. It makes
// as many rows as the device's shared memory allows.
int launch_lora_mma(const Routed& g, Dtype dtype, int processors, uintptr_t stream) {
  if (g.inside && g.r > MOST) return cudaErrorInvalidValue;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const bool wide = 2 * ((g.n + 63) / 64) > processors;
  Choice c;
  if (dtype == Dtype::f16)
    c = wide ? choose<__half, 64>(g, most) : choose<__half, 32>(g, most);
  else
    c = wide ? choose<__nv_bfloat16, 64>(g, most) : choose<__nv_bfloat16, 32>(g, most);
  const int64_t blocks = int64_t((g.m + c.bm - 1) / c.bm) * ((g.n + c.bn - 1) / c.bn);
  return launch(c.kernel, dim3(blocks), THREADS, c.shared, stream, !g.inside, g);
}

}  // namespace peftops::cuda
