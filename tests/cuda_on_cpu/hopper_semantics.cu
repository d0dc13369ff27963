// What test_hopper.py asks of the emulator: a kernel for each of Hopper's instructions. n = 1
// makes no mistake.
#include <cuda_fp16.h>

#include "hopper_ptx.cuh"

namespace peftops::cuda {
namespace {

struct Question {
  float* out;
  const void *a, *b;
  int n;
};

// A warp fills what another reads, five times. n: 0 does not wait for it, 2 gives it back
// before it is read, 3 expects one thread more to give it back, 4 one less
__global__ void phases(Question q) {
  __shared__ uint64_t full, empty;
  __shared__ float s[32];
  const int t = threadIdx.x % 32;
  if (threadIdx.x == 0)
    init(full, 32), init(empty, q.n == 3 ? 33 : q.n == 4 ? 31 : 32), fence_init();
  __syncthreads();
  for (int round = 0; round < 5; ++round) {
    if (threadIdx.x < 32) {
      wait(empty, round % 2 ^ 1);
      s[t] = static_cast<const float*>(q.a)[t] + round;
      arrive(full);
    } else {
      if (q.n != 0) wait(full, round % 2);
      if (q.n == 2) arrive(empty);
      q.out[32 * round + t] = s[31 - t];
      if (q.n != 2) arrive(empty);
    }
  }
}

// A thread asks, arrives itself, and asks again; then the barrier is another. n = 0 arrives at
// none
__global__ void tries(Question q) {
  __shared__ uint64_t bar;
  if (q.n) init(bar, 1);
  q.out[0] = test(bar, 0);
  q.out[1] = test(bar, 1);  // the phase before the first is over
  arrive(bar);
  q.out[2] = test(bar, 0);
  q.out[3] = test(bar, 1);
  inval(bar);
  init(bar, 2);
  q.out[4] = test(bar, 0);
}

// Two warps swap what they hold while a third is elsewhere, and then tell the third. n = 0
// forgets the first barrier, 2 the second, 3 names another count
__global__ void named(Question q) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  if (t < 64) {
    s[t] = static_cast<const float*>(q.a)[t];
    if (q.n) meet<1>(q.n == 3 && t < 32 ? 96 : 64);
    q.out[t] = s[63 - t];
    leave<2>(96);
  } else {
    if (q.n != 2) meet<2>(96);
    q.out[t] = s[t - 64] + s[t - 32];
  }
}

// Two boxes of 16 rows of a matrix (20, 72) of bfloat16, one of 8 x 16 of a matrix (10, 20) of
// float. n: 0 does not wait, 2 expects too little, 3 too much, 4 has a base between, 5 nobody's
// barrier, 6 no map, 7 arrives twice where once is expected
__global__ void tiles(Question q, const __grid_constant__ CUtensorMap wide,
                      const __grid_constant__ CUtensorMap plain) {
  __shared__ alignas(1024) uint32_t s[2 * 512 + 128 + 32];
  __shared__ uint64_t bars[2];
  const int t = threadIdx.x;
  if (t == 0) init(bars[0], q.n == 7 ? 1 : 2), fence_init();
  __syncthreads();
  if (t == 0) {
    expect(bars[0], 4096 - 128 * (q.n == 2) + 128 * (q.n == 3));
    fetch(s + 32 * (q.n == 4), q.n == 6 ? *static_cast<const CUtensorMap*>(q.a) : wide, 40, 12,
          bars[q.n == 5]);
    fetch(s + 512, wide, -8, -3, bars[0]);
    expect(bars[0], 512);
    fetch(s + 1024, plain, 8, 4, bars[0]);
  }
  if (q.n) wait(bars[0], 0);
  for (int i = t; i < 1152; i += 32) reinterpret_cast<uint32_t*>(q.out)[i] = s[i];
}

// Rows of 32 floats to (6, 2) of a matrix (8, 36), and memory filled anew. n: 0 does not wait,
// 2 forgets the fence
__global__ void stores(Question q, const __grid_constant__ CUtensorMap map) {
  __shared__ alignas(1024) float s[8][32];
  const int t = threadIdx.x;
  for (int r = 0; r < 8; ++r)
    s[r][(t / 4 ^ r) * 4 + t % 4] = static_cast<const float*>(q.a)[32 * r + t];
  if (q.n != 2) fence_async();
  __syncwarp();
  if (t == 0) {
    send(map, 6, 2, s);
    commit_tiles();
    if (q.n) wait_tiles_read();
  }
  __syncwarp();
  for (int r = 0; r < 8; ++r) s[r][t] = -1;
}

DEVICE int place(int row, int column) {
  return row * 64 + (column / 8 ^ row % 8) * 8 + column % 8;
}

enum class Form { plain, turned_b, turned_a, held };

// Every thread's sums of a (64, 64) · b (72, 64)ᵀ. n: 0 forgets to wait, 2 the fence, 3 has
// another stride, 4 another swizzle, 5 tells warps apart, 6 forgets the barrier, 7 has a base
// between, 8 waits after reading, 9 is one warp short; 10 meets at an mbarrier and makes no
// mistake, 11 forgets the fence before that
template <class T, Form FORM>
DEVICE void product(Question q) {
  __shared__ alignas(1024) uint16_t a[64 * 64], b[2 * 64 * 64];
  __shared__ uint64_t bar;
  constexpr bool TURNED_A = FORM == Form::turned_a, TURNED_B = FORM == Form::turned_b;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const uint16_t *from_a = static_cast<const uint16_t*>(q.a),
                 *from_b = static_cast<const uint16_t*>(q.b);
  if (t == 0) init(bar, 128);
  __syncthreads();
  for (int e = t; e < 64 * 64; e += blockDim.x)
    a[TURNED_A ? place(e % 64, e / 64) : place(e / 64, e % 64)] = from_a[e];
  for (int e = t; e < 72 * 64; e += blockDim.x)
    b[TURNED_B ? e / 64 / 64 * 4096 + place(e % 64, e / 64 % 64) : place(e / 64, e % 64)] =
        from_b[e];
  if (q.n != 2 && q.n != 11) fence_async();
  if (q.n >= 10) arrive(bar), wait(bar, 0);
  if (q.n < 10 && q.n != 6) __syncthreads();
  const int stride = q.n == 3 ? 2048 : 1024, swizzle = q.n == 4 ? 2 : 1;
  const uint16_t* start_b = b + 64 * (q.n == 7) + 16 * (q.n == 5 && warp == 2);
  float d[36];
  for (int i = 0; i < 36; ++i) d[i] = __int_as_float(-1);
  fence_registers();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint64_t db = descriptor(start_b + (TURNED_B ? 1024 : 16) * s, 8192, stride, swizzle);
    if constexpr (FORM == Form::held) {
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + lane / 4 + i % 2 * 8, k = 16 * s + lane % 4 * 2 + i / 2 * 8;
        r[i] = *reinterpret_cast<const uint32_t*>(from_a + row * 64 + k);
      }
      multiply_held(d, r, db, s > 0);
    } else {
      multiply<T, TURNED_A, TURNED_B>(
          d, descriptor(a + (TURNED_A ? 1024 : 16) * s, 8192, 1024, 1), db, s > 0);
    }
  }
  commit_products();
  if (q.n && q.n != 8) wait_products<0>();
  for (int i = 0; i < 36; ++i) q.out[36 * t + i] = d[i];
  if (q.n == 8) wait_products<0>();
}
__global__ void product_bf16(Question q) { product<__nv_bfloat16, Form::plain>(q); }
__global__ void product_f16(Question q) { product<__half, Form::plain>(q); }
__global__ void product_turned_a(Question q) { product<__nv_bfloat16, Form::turned_a>(q); }
__global__ void product_turned_b(Question q) { product<__nv_bfloat16, Form::turned_b>(q); }
__global__ void product_held(Question q) { product<__nv_bfloat16, Form::held>(q); }

struct Name {
  const char* text;
};
bool operator==(const Name& name, const char* other) {
  const char* mine = name.text;
  while (*mine && *mine == *other) ++mine, ++other;
  return *mine == *other;
}

int ask_tiles(const Question& q) {
  CUtensorMap wide, plain;
  int error = encode(wide, q.b, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 20, 72, 144, 16, 64});
  if (!error)
    error = encode(
        plain, q.a,
        {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 10, 20, 80, 8, 16, CU_TENSOR_MAP_SWIZZLE_NONE});
  tiles<<<1, 32>>>(q, wide, plain);
  return error;
}

int ask_stores(const Question& q) {
  CUtensorMap map;
  const int error = encode(map, q.out, {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 8, 36, 144, 8, 32});
  stores<<<1, 32>>>(q, map);
  return error;
}

int ask_map(const Question& q) {  // rows, columns, pitch, height and width of a box, swizzle,
                                  // rank, and a base
  const int* v = static_cast<const int*>(q.a);
  CUtensorMap map;
  return encode(
      map, static_cast<const char*>(q.b) + v[7],
      {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, uint64_t(v[0]), uint64_t(v[1]), uint64_t(v[2]),
       uint32_t(v[3]), uint32_t(v[4]), CUtensorMapSwizzle(v[5]), uint32_t(v[6])});
}

}  // namespace
}  // namespace peftops::cuda

#define ASK(kernel) \
  if (name == #kernel) kernel<<<blocks, threads>>>(q)

extern "C" int ask(const char* kernel_name, uintptr_t out, uintptr_t a, uintptr_t b, int n,
                   int blocks, int threads) {
  using namespace peftops::cuda;
  const Question q{reinterpret_cast<float*>(out), reinterpret_cast<const void*>(a),
                   reinterpret_cast<const void*>(b), n};
  const Name name{kernel_name};
  ASK(phases);
  ASK(tries);
  ASK(named);
  ASK(product_bf16);
  ASK(product_f16);
  ASK(product_turned_a);
  ASK(product_turned_b);
  ASK(product_held);
  if (name == "tiles") return ask_tiles(q) ? cudaErrorInvalidValue : cudaGetLastError();
  if (name == "stores") return ask_stores(q) ? cudaErrorInvalidValue : cudaGetLastError();
  if (name == "map") return ask_map(q) ? cudaErrorInvalidValue : cudaSuccess;
  if (name == "pipeline" || name == "pipeline_turned")
    return hopper_product(q.out, q.a, q.b, name == "pipeline_turned", n, blocks);
  return cudaGetLastError();
}
