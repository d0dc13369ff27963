// The kernels of test_hopper.py: one for each of Hopper's instructions.
//
// Each kernel makes the mistake whose number it gets. 1 means no mistake.
#include <cuda_fp16.h>

#include <string_view>

#include "hopper_ptx.cuh"

namespace peftops::cuda {
namespace {

struct Arguments {
  float* out;
  const void* a;
  const void* b;
  int mistake;
};

// One warp writes values that another warp reads, five times.
// mistake 0: the reader does not wait for the values
// mistake 2: the reader gives the memory back before it has read
// mistake 3: to give the memory back, one thread more has to arrive than there are
// mistake 4: one thread less has to arrive
__global__ void phases(Arguments args) {
  __shared__ uint64_t full;
  __shared__ uint64_t empty;
  __shared__ float values[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    int readers = 32;
    if (args.mistake == 3) readers = 33;
    if (args.mistake == 4) readers = 31;
    init(full, 32);
    init(empty, readers);
    fence_init();
  }
  __syncthreads();
  for (int round = 0; round < 5; ++round) {
    if (threadIdx.x < 32) {
      wait(empty, round % 2 ^ 1);
      values[lane] = static_cast<const float*>(args.a)[lane] + round;
      arrive(full);
    } else {
      if (args.mistake != 0) wait(full, round % 2);
      if (args.mistake == 2) arrive(empty);
      args.out[32 * round + lane] = values[31 - lane];
      if (args.mistake != 2) arrive(empty);
    }
  }
}

// One thread asks a barrier whether its phases are over, before and after it arrives. Then it
// makes the barrier anew.
// mistake 0: asks a barrier that nobody made
__global__ void tries(Arguments args) {
  __shared__ uint64_t barrier;
  if (args.mistake) init(barrier, 1);
  args.out[0] = test(barrier, 0);
  args.out[1] = test(barrier, 1);  // the phase before the first is over
  arrive(barrier);
  args.out[2] = test(barrier, 0);
  args.out[3] = test(barrier, 1);
  inval(barrier);
  init(barrier, 2);
  args.out[4] = test(barrier, 0);
}

// Two warps swap values at barrier 1 while a third warp waits at barrier 2. At barrier 2 the
// third warp learns that it may read the values. mistake 0: nobody waits at barrier 1 mistake
// 2: nobody waits at barrier 2 mistake 3: the two warps name different counts of threads
__global__ void named(Arguments args) {
  __shared__ float values[64];
  const int thread = threadIdx.x;
  if (thread < 64) {
    values[thread] = static_cast<const float*>(args.a)[thread];
    if (args.mistake) meet<1>(args.mistake == 3 && thread < 32 ? 96 : 64);
    args.out[thread] = values[63 - thread];
    leave<2>(96);
  } else {
    if (args.mistake != 2) meet<2>(96);
    args.out[thread] = values[thread - 64] + values[thread - 32];
  }
}

// Fetches two boxes (16, 64) of a matrix (20, 72) of bfloat16, and a box (8, 16) of a matrix
// (10, 20) of float.
// mistake 0: nobody waits for the boxes
// mistake 2: expects too few bytes
// mistake 3: expects too many bytes
// mistake 4: a box does not start at a multiple of 1024 bytes
// mistake 5: names a barrier that nobody made
// mistake 6: names something else as a tensor map
// mistake 7: arrives twice where one arrival is expected
__global__ void tiles(Arguments args, const __grid_constant__ CUtensorMap swizzled,
                      const __grid_constant__ CUtensorMap plain) {
  __shared__ alignas(1024) uint32_t words[2 * 512 + 128 + 32];
  __shared__ uint64_t barriers[2];
  const int mistake = args.mistake;
  const int thread = threadIdx.x;
  if (thread == 0) {
    init(barriers[0], mistake == 7 ? 1 : 2);
    fence_init();
  }
  __syncthreads();
  if (thread == 0) {
    expect(barriers[0], 4096 - 128 * (mistake == 2) + 128 * (mistake == 3));
    const CUtensorMap& map = mistake == 6 ? *static_cast<const CUtensorMap*>(args.a) : swizzled;
    fetch(words + 32 * (mistake == 4), map, 40, 12, barriers[mistake == 5]);
    fetch(words + 512, swizzled, -8, -3, barriers[0]);
    expect(barriers[0], 512);
    fetch(words + 1024, plain, 8, 4, barriers[0]);
  }
  if (mistake) wait(barriers[0], 0);
  for (int i = thread; i < 1152; i += 32) reinterpret_cast<uint32_t*>(args.out)[i] = words[i];
}

// Sends a box (8, 32) to row 2 and column 6 of a matrix (8, 36), and then overwrites the box in
// shared memory.
// mistake 0: overwrites it before it has been read
// mistake 2: forgets fence.proxy.async
__global__ void stores(Arguments args, const __grid_constant__ CUtensorMap map) {
  __shared__ alignas(1024) float box[8][32];
  const int lane = threadIdx.x;
  for (int row = 0; row < 8; ++row)
    box[row][(lane / 4 ^ row) * 4 + lane % 4] =
        static_cast<const float*>(args.a)[32 * row + lane];
  if (args.mistake != 2) fence_async();
  __syncwarp();
  if (lane == 0) {
    send(map, 6, 2, box);
    commit_stores();
    if (args.mistake) wait_stores_read();
  }
  __syncwarp();
  for (int row = 0; row < 8; ++row) box[row][lane] = -1;
}

// The index of a 16-bit element in a swizzled tile of 64 columns.
DEVICE int swizzled_index(int row, int column) {
  return row * 64 + (column / 8 ^ row % 8) * 8 + column % 8;
}

enum class Form { plain, transposed_b, transposed_a, a_in_registers };

template <bool TRANSPOSED>
DEVICE void copy_a(uint16_t* tile, const uint16_t* a) {
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const int row = i / 64;
    const int k = i % 64;
    tile[TRANSPOSED ? swizzled_index(k, row) : swizzled_index(row, k)] = a[i];
  }
}

template <bool TRANSPOSED>
DEVICE void copy_b(uint16_t* tile, const uint16_t* b) {
  for (int i = threadIdx.x; i < 72 * 64; i += blockDim.x) {
    const int column = i / 64;
    const int k = i % 64;
    const int transposed = column / 64 * 64 * 64 + swizzled_index(k, column % 64);
    tile[TRANSPOSED ? transposed : swizzled_index(column, k)] = b[i];
  }
}

// Writes every thread's sums of a (64, 64) · b (72, 64)ᵀ.
// mistake 0: nobody waits for the product
// mistake 2: forgets fence.proxy.async
// mistake 3: a wrong stride
// mistake 4: an unknown swizzle
// mistake 5: one warp names another tile
// mistake 6: forgets __syncthreads()
// mistake 7: a tile does not start at a multiple of 1024 bytes
// mistake 8: reads the sums before it waits for them
// mistake 9: the warpgroup lacks a warp
// mistake 10: no mistake: threads meet at an mbarrier instead of __syncthreads()
// mistake 11: like 10, but forgets fence.proxy.async
template <class T, Form FORM>
DEVICE void product(Arguments args) {
  constexpr bool TRANSPOSED_A = FORM == Form::transposed_a;
  constexpr bool TRANSPOSED_B = FORM == Form::transposed_b;
  __shared__ alignas(1024) uint16_t tile_a[64 * 64];
  __shared__ alignas(1024) uint16_t tile_b[2 * 64 * 64];
  __shared__ uint64_t barrier;
  const int mistake = args.mistake;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const uint16_t* a = static_cast<const uint16_t*>(args.a);
  if (thread == 0) init(barrier, 128);
  __syncthreads();
  copy_a<TRANSPOSED_A>(tile_a, a);
  copy_b<TRANSPOSED_B>(tile_b, static_cast<const uint16_t*>(args.b));
  if (mistake != 2 && mistake != 11) fence_async();
  if (mistake >= 10) {
    arrive(barrier);
    wait(barrier, 0);
  }
  if (mistake < 10 && mistake != 6) __syncthreads();
  const int stride = mistake == 3 ? 2048 : 1024;
  const int swizzle = mistake == 4 ? 2 : 1;
  const uint16_t* start_b = tile_b + 64 * (mistake == 7) + 16 * (mistake == 5 && warp == 2);
  float d[36];
  for (int i = 0; i < 36; ++i) d[i] = __int_as_float(-1);
  fence_registers();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t descriptor_b =
        descriptor(start_b + (TRANSPOSED_B ? 1024 : 16) * step, 8192, stride, swizzle);
    if constexpr (FORM == Form::a_in_registers) {
      uint32_t registers[4];
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + lane / 4 + i % 2 * 8;
        const int k = 16 * step + lane % 4 * 2 + i / 2 * 8;
        registers[i] = *reinterpret_cast<const uint32_t*>(a + row * 64 + k);
      }
      multiply_registers(d, registers, descriptor_b, step > 0);
    } else {
      const uint64_t descriptor_a =
          descriptor(tile_a + (TRANSPOSED_A ? 1024 : 16) * step, 8192, 1024, 1);
      multiply<T, TRANSPOSED_A, TRANSPOSED_B>(d, descriptor_a, descriptor_b, step > 0);
    }
  }
  commit_products();
  if (mistake && mistake != 8) wait_products<0>();
  for (int i = 0; i < 36; ++i) args.out[36 * thread + i] = d[i];
  if (mistake == 8) wait_products<0>();
}
__global__ void product_bf16(Arguments args) { product<__nv_bfloat16, Form::plain>(args); }
__global__ void product_f16(Arguments args) { product<__half, Form::plain>(args); }
__global__ void product_transposed_a(Arguments args) {
  product<__nv_bfloat16, Form::transposed_a>(args);
}
__global__ void product_transposed_b(Arguments args) {
  product<__nv_bfloat16, Form::transposed_b>(args);
}
__global__ void product_a_in_registers(Arguments args) {
  product<__nv_bfloat16, Form::a_in_registers>(args);
}

int ask_tiles(const Arguments& args) {
  Matrix bf16_matrix;
  bf16_matrix.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  bf16_matrix.rows = 20;
  bf16_matrix.columns = 72;
  bf16_matrix.row_pitch = 144;
  bf16_matrix.box_rows = 16;
  bf16_matrix.box_columns = 64;
  Matrix float_matrix;
  float_matrix.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  float_matrix.rows = 10;
  float_matrix.columns = 20;
  float_matrix.row_pitch = 80;
  float_matrix.box_rows = 8;
  float_matrix.box_columns = 16;
  float_matrix.swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap swizzled;
  CUtensorMap plain;
  int error = encode(swizzled, args.b, bf16_matrix);
  if (!error) error = encode(plain, args.a, float_matrix);
  tiles<<<1, 32>>>(args, swizzled, plain);
  return error;
}

int ask_stores(const Arguments& args) {
  Matrix matrix;
  matrix.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  matrix.rows = 8;
  matrix.columns = 36;
  matrix.row_pitch = 144;
  matrix.box_rows = 8;
  matrix.box_columns = 32;
  CUtensorMap map;
  const int error = encode(map, args.out, matrix);
  stores<<<1, 32>>>(args, map);
  return error;
}

// Encodes a map of what MAP of test_hopper.py names, in its order.
int ask_map(const Arguments& args) {
  const int* values = static_cast<const int*>(args.a);
  Matrix matrix;
  matrix.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  matrix.rows = values[0];
  matrix.columns = values[1];
  matrix.row_pitch = values[2];
  matrix.box_rows = values[3];
  matrix.box_columns = values[4];
  matrix.swizzle = CUtensorMapSwizzle(values[5]);
  matrix.rank = values[6];
  CUtensorMap map;
  return encode(map, static_cast<const char*>(args.b) + values[7], matrix);
}

int result(int encode_error) {
  return encode_error ? cudaErrorInvalidValue : cudaGetLastError();
}

}  // namespace
}  // namespace peftops::cuda

#define ASK(kernel) \
  if (name == #kernel) kernel<<<blocks, threads>>>(args)

extern "C" int ask(const char* kernel_name, uintptr_t out, uintptr_t a, uintptr_t b,
                   int mistake, int blocks, int threads) {
  using namespace peftops::cuda;
  Arguments args;
  args.out = reinterpret_cast<float*>(out);
  args.a = reinterpret_cast<const void*>(a);
  args.b = reinterpret_cast<const void*>(b);
  args.mistake = mistake;
  const std::string_view name = kernel_name;
  ASK(phases);
  ASK(tries);
  ASK(named);
  ASK(product_bf16);
  ASK(product_f16);
  ASK(product_transposed_a);
  ASK(product_transposed_b);
  ASK(product_a_in_registers);
  if (name == "tiles") return result(ask_tiles(args));
  if (name == "stores") return result(ask_stores(args));
  if (name == "map") return result(ask_map(args));
  if (name == "pipeline" || name == "pipeline_transposed")
    return hopper_product(args.out, args.a, args.b, name == "pipeline_transposed", mistake,
                          blocks);
  return cudaGetLastError();
}
