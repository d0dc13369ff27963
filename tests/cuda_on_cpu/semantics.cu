// The kernels of test_emulator.py: one for each question to the emulator.
//
// The meaning of `n` differs: see each kernel.
#include <cuda_fp16.h>

#include <string_view>

#include "ops.h"
#include "ptx.cuh"

namespace peftops::cuda {
namespace {

struct Arguments {
  float* out;
  const float* in;
  const uint32_t* bits;
  int n;
};

// n: a lane
__global__ void shuffles(Arguments args) {
  const int thread = threadIdx.x;
  args.out[thread] = __shfl_xor_sync(~0u, args.in[thread], 5);
  args.out[32 + thread] = __shfl_down_sync(~0u, args.in[thread], 3);
  args.out[64 + thread] = __shfl_up_sync(~0u, args.in[thread], 3, 8);
  args.out[96 + thread] = __shfl_sync(~0u, args.in[thread], thread * 7 % 32);
  args.out[128 + thread] = __ballot_sync(~0u, args.in[thread] > 0);
  args.out[160 + thread] =
      __any_sync(~0u, thread == args.n) + 2 * __all_sync(~0u, thread < args.n);
  args.out[192 + thread] =
      __reduce_add_sync(~0u, unsigned(thread)) + __reduce_max_sync(~0u, unsigned(thread));
}

__global__ void bits(Arguments args) {
  const int thread = threadIdx.x;
  const uint32_t a = args.bits[2 * thread];
  const uint32_t b = args.bits[2 * thread + 1];
  uint32_t* out = reinterpret_cast<uint32_t*>(args.out) + 10 * thread;
  uint32_t logic;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(logic) : "r"(a), "r"(b), "r"(a * b));
  out[0] = logic;
  out[1] = __byte_perm(a, b, 0x5140);
  out[2] = __funnelshift_l(a, b, 7);
  out[3] = __popc(a) * 64 + __clz(b);
  out[4] = __brev(a);
  out[5] = __umulhi(a, b);
  asm("bfe.u32 %0, %1, 5, 9;" : "=r"(out[6]) : "r"(a));
  asm("bfi.b32 %0, %1, %2, 11, 6;" : "=r"(out[7]) : "r"(a), "r"(b));
  out[8] = uint32_t(int32_t(a) >> 3) + uint32_t(int64_t(int32_t(a)) * int32_t(b) >> 32);
  out[9] = uint32_t(int(a % 1000) / -7) + (float(b) > 2e9f);
}

__global__ void roundings(Arguments args) {
  const int thread = threadIdx.x;
  const float value = args.in[thread];
  args.out[thread] = __half2float(__float2half_rn(value));
  args.out[32 + thread] = __bfloat162float(__float2bfloat16_rn(value));
  const __half2 pair = __hfma2(__floats2half2_rn(value, 1), __floats2half2_rn(2, 3),
                               __floats2half2_rn(0.5f, value));
  args.out[64 + thread] = __low2float(pair);
  args.out[96 + thread] = __high2float(pair);
  args.out[128 + thread] = rintf(value) + floorf(value) + int(value);
  args.out[160 + thread] =
      sqrtf(fabsf(value)) + fmaxf(value, 0) + rsqrtf(fabsf(value) + 1) + 1 / value;
}

// n: whether there is a barrier
__global__ void barriers(Arguments args) {
  __shared__ float values[256];
  const int thread = threadIdx.x;
  values[thread] = args.in[thread];
  if (args.n) __syncthreads();
  args.out[thread] = values[255 - thread];
}

// n: whether the lanes of the warp wait for each other
__global__ void warps(Arguments args) {
  __shared__ float values[32];
  const int thread = threadIdx.x;
  values[thread] = args.in[thread];
  if (args.n) __syncwarp();
  args.out[thread] = values[31 - thread];
}

__global__ void atomics(Arguments args) {
  const int thread = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&args.out[0], 1.0f);
  int* integers = reinterpret_cast<int*>(args.out);
  atomicAdd(&integers[1], thread);
  atomicMax(&integers[2], thread);
  atomicCAS(&integers[3], 0, thread + 1);
}

// n: whether the threads wait for their copies
__global__ void copies(Arguments args) {
  __shared__ __align__(16) float values[32][4];
  const int thread = threadIdx.x;
  copy_async(values[thread], args.in + 4 * thread, thread % 4 == 3 ? 8 : 16);
  commit_copies();
  if (args.n) wait_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) args.out[4 * thread + i] = values[31 - thread][i];
}

// A product of A (16, 16) and B (16, 8), plus C (16, 8). args.bits and args.in hold the
// registers of every lane.
template <class T>
__device__ void product(Arguments args) {
  const int thread = threadIdx.x;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = args.bits[4 * thread + i];
  for (int i = 0; i < 2; ++i) b[i] = args.bits[128 + 2 * thread + i];
  for (int i = 0; i < 4; ++i) d[i] = args.in[4 * thread + i];
  multiply<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) args.out[4 * thread + i] = d[i];
}
__global__ void product_bf16(Arguments args) { product<__nv_bfloat16>(args); }
__global__ void product_f16(Arguments args) { product<__half>(args); }

// ldmatrix of four 8x8 matrices. n: words from one row of 16 bytes to the next
__global__ void matrices(Arguments args) {
  __shared__ __align__(16) uint32_t values[32 * 8];
  const int thread = threadIdx.x;
  for (int i = 0; i < 4; ++i) values[thread * args.n + i] = args.bits[4 * thread + i];
  __syncwarp();
  uint32_t registers[4];
  load_matrices(registers, values + thread * args.n);
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<uint32_t*>(args.out)[4 * thread + i] = registers[i];
}

// A barrier that half of the warp misses.
__global__ void divergent(Arguments args) {
  if (threadIdx.x < 16) __syncthreads();
  args.out[threadIdx.x] = 0;
}
__global__ void half_a_mask(Arguments args) {
  args.out[threadIdx.x] = __shfl_xor_sync(0xffffu, args.in[threadIdx.x], 1);
}
__global__ void misaligned(Arguments args) {
  args.out[0] = __ldg(reinterpret_cast<const float4*>(args.in + 1)).x;
}
// n: an address
__global__ void nowhere(Arguments args) {
  args.out[0] = *reinterpret_cast<float*>(uint64_t(args.n));
}
__global__ void past_the_end(Arguments args) {
  __shared__ float values[32];
  values[threadIdx.x + 1] = args.in[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = values[threadIdx.x];
}

__global__ void first_launch(Arguments args) {
  allow_launch_behind();
  args.out[threadIdx.x] = args.in[threadIdx.x];
}
// n: whether it waits for the launch before
__global__ void second_launch(Arguments args) {
  if (args.n) wait_for_launch_before();
  args.out[32 + threadIdx.x] = args.out[threadIdx.x];
}

Arguments make_arguments(uintptr_t out, uintptr_t in, uintptr_t bits, int n) {
  Arguments args;
  args.out = reinterpret_cast<float*>(out);
  args.in = reinterpret_cast<const float*>(in);
  args.bits = reinterpret_cast<const uint32_t*>(bits);
  args.n = n;
  return args;
}

int ask_overlapping(const Arguments& args) {
  first_launch<<<1, 32>>>(args);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, second_launch, args);
}

}  // namespace
}  // namespace peftops::cuda

#define ASK(kernel) \
  if (name == #kernel) kernel<<<blocks, threads>>>(args)

extern "C" int ask(const char* kernel_name, uintptr_t out, uintptr_t in, uintptr_t words, int n,
                   int blocks, int threads) {
  using namespace peftops::cuda;
  const Arguments args = make_arguments(out, in, words, n);
  const std::string_view name = kernel_name;
  ASK(shuffles);
  ASK(bits);
  ASK(roundings);
  ASK(barriers);
  ASK(warps);
  ASK(atomics);
  ASK(copies);
  ASK(product_bf16);
  ASK(product_f16);
  ASK(matrices);
  ASK(divergent);
  ASK(half_a_mask);
  ASK(misaligned);
  ASK(nowhere);
  ASK(past_the_end);
  if (name == "overlapping") return ask_overlapping(args);
  return cudaGetLastError();
}
