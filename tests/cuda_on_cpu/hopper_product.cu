// A product as Hopper's kernels compute it: one warp fetches tiles through two stages, and two
// warpgroups multiply them.
#include "hopper_ptx.cuh"

namespace peftops::cuda {
namespace {

constexpr int M = 150, N = 136, K = 200;
constexpr int ROWS = 128, COLUMNS = 72, DEPTH = 64;  // of a tile
constexpr int TILES_M = (M + ROWS - 1) / ROWS;
constexpr int TILES_N = (N + COLUMNS - 1) / COLUMNS;
constexpr int TILES = TILES_M * TILES_N;
constexpr int STAGES = 2;
constexpr int THREADS = 2 * 128 + 32;
constexpr int BYTES_A = ROWS * DEPTH * 2;
constexpr int BYTES_B = COLUMNS * DEPTH * 2;
constexpr int BYTES_B_TRANSPOSED = 2 * DEPTH * 128;  // two boxes of 64 columns
constexpr int SUMS = 36;                             // of a thread

struct Stage {
  unsigned char a[BYTES_A];
  unsigned char b[BYTES_B_TRANSPOSED];
};
struct Pipeline {
  Stage stages[STAGES];
  uint64_t full[STAGES];
  uint64_t empty[STAGES];
};
struct Turn {  // which stage is next, and the parity of its barriers' phases
  int stage = 0;
  int parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <bool TRANSPOSED>
DEVICE void fetch_tiles(Pipeline& pipeline, const CUtensorMap& a, const CUtensorMap& b,
                        int mistake) {
  constexpr int BYTES = BYTES_A + (TRANSPOSED ? BYTES_B_TRANSPOSED : BYTES_B);
  Turn turn;
  for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x)
    for (int k = 0; k < K; k += DEPTH, turn.next()) {
      Stage& stage = pipeline.stages[turn.stage];
      uint64_t& full = pipeline.full[turn.stage];
      if (mistake != 7) wait(pipeline.empty[turn.stage], turn.parity ^ 1);
      expect(full, BYTES - 128 * (mistake == 3));
      fetch(stage.a, a, k, tile / TILES_N * ROWS, full);
      const int column = tile % TILES_N * COLUMNS;
      fetch(stage.b, b, TRANSPOSED ? column : k, TRANSPOSED ? k : column, full);
      if (TRANSPOSED) fetch(stage.b + DEPTH * 128, b, column + 64, k, full);
    }
}

template <bool TRANSPOSED>
DEVICE void multiply_stage(float (&d)[SUMS], Stage& stage, int warpgroup, bool accumulates,
                           int mistake) {
  const int stride_a = mistake == 5 ? 512 : 1024;
  fence_registers();
#pragma unroll
  for (int i = 0; i < DEPTH / 16; ++i) {
    const uint64_t a = descriptor(stage.a + warpgroup * 64 * 128 + 32 * i, 16, stride_a);
    const uint64_t b = descriptor(stage.b + (TRANSPOSED ? 2048 : 32) * i, DEPTH * 128, 1024);
    multiply<__nv_bfloat16, false, TRANSPOSED>(d, a, b, accumulates || i);
  }
  commit_products();
}

DEVICE void store_sums(float* c, const float (&d)[SUMS], int tile) {
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int first_row = tile / TILES_N * ROWS + warpgroup * 64 + warp * 16 + lane / 4;
  const int first_column = tile % TILES_N * COLUMNS + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const int row = first_row + i / 2 % 2 * 8;
    const int column = first_column + i / 4 * 8 + i % 2;
    if (row < M && column < N) c[row * N + column] = d[i];
  }
}

template <bool TRANSPOSED>
DEVICE void multiply_tiles(Pipeline& pipeline, float* c, int mistake) {
  const int warpgroup = threadIdx.x / 128;
  const bool is_leader = threadIdx.x % 128 == 0;
  Turn turn;
  float d[SUMS];
  for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x) {
    int busy_stage = -1;  // the stage that a product reads
    for (int k = 0; k < K; k += DEPTH, turn.next()) {
      if (mistake != 6) wait(pipeline.full[turn.stage], turn.parity);
      multiply_stage<TRANSPOSED>(d, pipeline.stages[turn.stage], warpgroup, k, mistake);
      if (mistake == 2)
        wait_products<2>();
      else
        wait_products<1>();
      if (busy_stage >= 0 && is_leader) arrive(pipeline.empty[busy_stage]);
      busy_stage = turn.stage;
    }
    if (mistake) wait_products<0>();
    if (is_leader) arrive(pipeline.empty[busy_stage]);
    store_sums(c, d, tile);
  }
}

// mistake 0: nobody waits for the last product
// mistake 2: gives a stage back while a product reads it
// mistake 3: expects too few bytes
// mistake 4: expects an arrival too many
// mistake 5: a wrong stride
// mistake 6: multiplies before the tiles have come
// mistake 7: fetches before a stage has been given back
template <bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS)
    product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
            float* c, int mistake) {
  extern __shared__ unsigned char memory[];
  unsigned char* const aligned = memory + (1024 - shared_address(memory) % 1024) % 1024;
  Pipeline& pipeline = *reinterpret_cast<Pipeline*>(aligned);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init(pipeline.full[stage], 1);
      init(pipeline.empty[stage], mistake == 4 ? 3 : 2);
    }
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    multiply_tiles<TRANSPOSED>(pipeline, c, mistake);
  } else if (threadIdx.x == 256) {
    fetch_tiles<TRANSPOSED>(pipeline, a, b, mistake);
  }
}

Matrix bf16_matrix(int rows, int columns, int box_rows, int box_columns) {
  Matrix matrix;
  matrix.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.row_pitch = columns * 2;
  matrix.box_rows = box_rows;
  matrix.box_columns = box_columns;
  return matrix;
}

}  // namespace

int hopper_product(float* c, const void* a, const void* b, bool transposed, int mistake,
                   int blocks) {
  constexpr int BYTES = sizeof(Pipeline) + 1024;
  const Matrix matrix_a = bf16_matrix(M, K, ROWS, DEPTH);
  const Matrix matrix_b =
      transposed ? bf16_matrix(K, N, DEPTH, 64) : bf16_matrix(N, K, COLUMNS, DEPTH);
  CUtensorMap map_a;
  CUtensorMap map_b;
  if (encode(map_a, a, matrix_a)) return cudaErrorInvalidValue;
  if (encode(map_b, b, matrix_b)) return cudaErrorInvalidValue;
  const auto kernel = transposed ? product<true> : product<false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  kernel<<<blocks, THREADS, BYTES>>>(map_a, map_b, c, mistake);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
