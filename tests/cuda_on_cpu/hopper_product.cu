// A product in Hopper's way: a warp fetches tiles through two stages, two warpgroups multiply
// them.
#include "hopper_ptx.cuh"

namespace peftops::cuda {
namespace {

constexpr int M = 150, N = 136, K = 200;
constexpr int ROWS = 128, COLUMNS = 72, DEPTH = 64, STAGES = 2, THREADS = 2 * 128 + 32;
constexpr int TILE_A = ROWS * DEPTH * 2,
              TILE_B = 2 * DEPTH * 128;  // b's is two tiles of 64 columns where its rows are k

struct Stage {
  unsigned char a[TILE_A], b[TILE_B];
};
struct Pipeline {
  Stage stages[STAGES];
  uint64_t full[STAGES], empty[STAGES];
};
struct Turn {  // of the stages
  int stage = 0, parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <bool TURNED>
DEVICE void fill(Pipeline& p, const CUtensorMap& a, const CUtensorMap& b, int mistake) {
  constexpr int BYTES = TILE_A + (TURNED ? TILE_B : COLUMNS * DEPTH * 2);
  constexpr int TILES_N = (N + COLUMNS - 1) / COLUMNS, TILES = (M + ROWS - 1) / ROWS * TILES_N;
  Turn turn;
  for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x)
    for (int k = 0; k < K; k += DEPTH, turn.next()) {
      Stage& s = p.stages[turn.stage];
      uint64_t& full = p.full[turn.stage];
      if (mistake != 7) wait(p.empty[turn.stage], turn.parity ^ 1);
      expect(full, BYTES - 128 * (mistake == 3));
      fetch(s.a, a, k, tile / TILES_N * ROWS, full);
      const int column = tile % TILES_N * COLUMNS;
      fetch(s.b, b, TURNED ? column : k, TURNED ? k : column, full);
      if (TURNED) fetch(s.b + DEPTH * 128, b, column + 64, k, full);
    }
}

template <bool TURNED>
DEVICE void multiply_stage(float (&d)[36], Stage& s, int half, bool add, int mistake) {
  fence_registers();
#pragma unroll
  for (int i = 0; i < DEPTH / 16; ++i)
    multiply<__nv_bfloat16, false, TURNED>(
        d, descriptor(s.a + half * 64 * 128 + 32 * i, 16, mistake == 5 ? 512 : 1024),
        descriptor(s.b + (TURNED ? 2048 : 32) * i, DEPTH * 128, 1024), add || i);
  commit_products();
}

template <bool TURNED>
DEVICE void consume(Pipeline& p, float* c, int mistake) {
  constexpr int TILES_N = (N + COLUMNS - 1) / COLUMNS, TILES = (M + ROWS - 1) / ROWS * TILES_N;
  const int half = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  Turn turn;
  float d[36];
  for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x) {
    int held = -1;  // the stage whose product is under way
    for (int k = 0; k < K; k += DEPTH, turn.next()) {
      if (mistake != 6) wait(p.full[turn.stage], turn.parity);
      multiply_stage<TURNED>(d, p.stages[turn.stage], half, k, mistake);
      if (mistake == 2)
        wait_products<2>();
      else
        wait_products<1>();
      if (held >= 0 && leader) arrive(p.empty[held]);
      held = turn.stage;
    }
    if (mistake) wait_products<0>();
    if (leader) arrive(p.empty[held]);
    const int row = tile / TILES_N * ROWS + half * 64 + warp * 16 + lane / 4,
              column = tile % TILES_N * COLUMNS;
#pragma unroll
    for (int i = 0; i < 36; ++i) {
      const int r = row + i / 2 % 2 * 8, j = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (r < M && j < N) c[r * N + j] = d[i];
    }
  }
}

// mistake: 0 forgets the last wait for products, 2 gives a stage back while it is read, 3
// expects too few bytes, 4 too many arrivals, 5 has another stride, 6 does not wait for tiles,
// 7 not for a stage to be given back
template <bool TURNED>
__global__ void __launch_bounds__(THREADS)
    product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
            float* c, int mistake) {
  extern __shared__ unsigned char memory[];
  Pipeline& p =
      *reinterpret_cast<Pipeline*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) init(p.full[s], 1), init(p.empty[s], mistake == 4 ? 3 : 2);
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    consume<TURNED>(p, c, mistake);
  } else if (threadIdx.x == 256) {
    fill<TURNED>(p, a, b, mistake);
  }
}

}  // namespace

int hopper_product(float* c, const void* a, const void* b, bool turned, int mistake,
                   int blocks) {
  constexpr auto TYPE = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr int BYTES = sizeof(Pipeline) + 1024;
  CUtensorMap map_a, map_b;
  if (encode(map_a, a, {TYPE, M, K, K * 2, ROWS, DEPTH})) return cudaErrorInvalidValue;
  if (turned ? encode(map_b, b, {TYPE, K, N, N * 2, DEPTH, 64})
             : encode(map_b, b, {TYPE, N, K, K * 2, COLUMNS, DEPTH}))
    return cudaErrorInvalidValue;
  const auto kernel = turned ? product<true> : product<false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  kernel<<<blocks, THREADS, BYTES>>>(map_a, map_b, c, mistake);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
