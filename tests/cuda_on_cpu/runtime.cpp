// Stands in for the CUDA runtime: what nvcc makes of <<<>>> and the calls of launchers, on the
// fibers of machine.cpp.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "machine.h"

using namespace emulator;

namespace {

struct Call {
  const Kernel* kernel;
  Dim blocks, threads;
  size_t dynamic;
  std::vector<unsigned char> parameters;
  bool overlaps;  // the call before it, where it is allowed to
  std::string run(std::function<std::string()> before) const {
    return emulator::run(*kernel, blocks, threads, dynamic, parameters, before);
  }
};
struct State {
  std::map<const void*, std::string> names;  // of kernels, by their host functions
  std::map<const void*, int> dynamic;        // bytes allowed beyond the default
  cudaLaunchConfig_t configuration;
  cudaError_t last;
  std::string message;
  std::vector<Call>
      postponed;  // a launch, and those behind it that may overlap what is before them
};
State& state() {  // there before any kernel registers itself
  static State all;
  return all;
}

cudaError_t failed(cudaError_t error, const std::string& message) {
  state().message = message;
  return state().last = error;
}

// The last of the calls; those before it run where it waits for them, or first.
std::string run_all(std::vector<Call> calls) {
  if (calls.empty()) return "";
  const Call last = calls.back();
  calls.pop_back();
  if (last.overlaps) return last.run([calls] { return run_all(calls); });
  const std::string error = run_all(calls);
  return error.empty() ? last.run(nullptr) : error;
}

// What may be overlapped runs as late as it can where the schedule is lazy: where the launch
// behind it waits for it.
cudaError_t start(const void* function, const cudaLaunchConfig_t& c, void** arguments) {
  const auto found = kernels().find(state().names[function]);
  if (found == kernels().end()) return failed(cudaErrorInvalidDeviceFunction, "no such kernel");
  const Kernel& kernel = found->second;
  const dim3 b = c.gridDim, t = c.blockDim;
  size_t total = c.dynamicSmemBytes;
  for (const Shared& variable : kernel.shared) total += variable.size;
  if (total > size_t(shared_limit) ||
      c.dynamicSmemBytes > size_t(std::max(48 << 10, state().dynamic[function])))
    return failed(cudaErrorInvalidValue, "more shared memory than allowed");
  Call call{&kernel, {b.x, b.y, b.z}, {t.x, t.y, t.z}, c.dynamicSmemBytes, {}, false};
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    call.parameters.resize(kernel.parameters[i].at + kernel.parameters[i].size);
    memcpy(&call.parameters[kernel.parameters[i].at], arguments[i], kernel.parameters[i].size);
  }
  for (unsigned i = 0; i < c.numAttrs; ++i)
    call.overlaps |= c.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                     c.attrs[i].val.programmaticStreamSerializationAllowed;
  std::string error = call.overlaps ? "" : finish();
  if (error.empty()) state().postponed.push_back(call);
  if (error.empty() && !schedule.lazy) error = finish();
  return error.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, error);
}

cudaError_t start(const void* function, dim3 blocks, dim3 threads, void** arguments,
                  size_t shared) {
  return start(function, cudaLaunchConfig_t{blocks, threads, shared}, arguments);
}

// cuTensorMapEncodeTiled, of matrices: it refuses what the driver does, and what hopper.h knows
// nothing of.
CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                    const cuuint64_t* size, const cuuint64_t* pitch, const cuuint32_t* box,
                    const cuuint32_t* step, CUtensorMapInterleave interleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                    CUtensorMapFloatOOBfill fill) {
  const std::map<int, u32> sizes{
      {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1},    {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2},
      {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4},   {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2},
      {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2}, {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4}};
  if (rank != 2 || !sizes.contains(type) || u64(map) % 64 || u64(base) % 16)
    return CUDA_ERROR_INVALID_VALUE;
  bool right =
      interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (int i = 0; i < 2; ++i)
    right &= size[i] && size[i] <= 1ull << 32 && box[i] && box[i] <= 256 && step[i] == 1;
  const u32 bytes = sizes.at(type), width = box[0] * bytes;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  right &= pitch[0] % 16 == 0 && pitch[0] < 1ull << 40 && pitch[0] >= size[0] * bytes &&
           width % 16 == 0;
  right &= swizzled ? width == 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  static_assert(sizeof(Map) <= sizeof *map);
  const auto start = static_cast<unsigned char*>(base);
  *reinterpret_cast<Map*>(map) = {MAP,   start, size[0], size[1], pitch[0],
                                  bytes, width, box[1],  swizzled};
  return CUDA_SUCCESS;
}

cudaError_t entry_point(const std::string& name, void** function,
                        cudaDriverEntryPointQueryResult* found) {
  const bool known = name == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_map) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // namespace

int emulator::shared_limit = 227 << 10;

std::string emulator::finish() { return run_all(std::exchange(state().postponed, {})); }

extern "C" {
void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  state().names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared,
                                     cudaStream_t stream) {
  return state().configuration = {blocks, threads, shared, stream}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* shared,
                                       void* stream) {
  const auto& c = state().configuration;
  *blocks = c.gridDim, *threads = c.blockDim, *shared = c.dynamicSmemBytes,
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  return *kernel = cudaKernel_t(f), cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 b, dim3 t, void** a, size_t s, cudaStream_t) {
  return start(f, b, t, a, s);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 b, dim3 t, void** a, size_t s,
                               cudaStream_t) {
  return start(f, b, t, a, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  return start(f, *c, a);
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) state().dynamic[f] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {}, cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(state().last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return state().last; }
const char* cudaGetErrorString(cudaError_t error) {
  return error ? state().message.c_str() : "no error";
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
  return entry_point(name, function, found);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  return entry_point(name, function, found);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                   int) {  // of a Hopper GPU of four multiprocessors
  const std::map<int, int> values{{cudaDevAttrMultiProcessorCount, 4},
                                  {cudaDevAttrComputeCapabilityMajor, 9},
                                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_limit}};
  return *value = values.contains(attribute) ? values.at(attribute) : 0, cudaSuccess;
}
}
