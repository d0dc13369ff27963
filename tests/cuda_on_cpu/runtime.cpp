// Stands in for the CUDA runtime: the functions that nvcc calls for <<<>>>, and those that
// launchers call. machine.cpp runs the kernels.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper.h"

using namespace emulator;

namespace {

struct Call {  // one launch
  const Kernel* kernel;
  Dim blocks;
  Dim threads;
  size_t dynamic_bytes;
  std::vector<unsigned char> parameters;
  bool overlaps;  // may begin before the launch before it has ended
  std::string run(std::function<std::string()> launch_before) const {
    return emulator::run(*kernel, blocks, threads, dynamic_bytes, parameters, launch_before);
  }
};
struct State {
  std::map<const void*, std::string> names;   // of kernels, by their host functions
  std::map<const void*, int> dynamic_limits;  // of shared memory in bytes, by host functions
  cudaLaunchConfig_t configuration;           // of the <<<>>> that is being evaluated
  cudaError_t last_error;
  std::string message;          // of the last error
  std::vector<Call> postponed;  // a launch, and those after it that may overlap
};

// A function, so that the state exists before any kernel registers itself.
State& state() {
  static State all;
  return all;
}

cudaError_t report(cudaError_t error, const std::string& message) {
  state().message = message;
  state().last_error = error;
  return error;
}

// Runs calls in order. A call that overlaps begins first, and runs those before it when it
// waits for them.
std::string run_all(std::vector<Call> calls) {
  if (calls.empty()) return "";
  const Call last = calls.back();
  calls.pop_back();
  if (last.overlaps) return last.run([calls] { return run_all(calls); });
  const std::string error = run_all(calls);
  return error.empty() ? last.run(nullptr) : error;
}

std::vector<unsigned char> pack_parameters(const Kernel& kernel, void** arguments) {
  std::vector<unsigned char> packed;
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const Parameter& parameter = kernel.parameters[i];
    packed.resize(parameter.offset + parameter.size);
    memcpy(&packed[parameter.offset], arguments[i], parameter.size);
  }
  return packed;
}

bool allows_overlap(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
        attribute.val.programmaticStreamSerializationAllowed)
      return true;
  }
  return false;
}

Dim dim(dim3 size) { return {.x = size.x, .y = size.y, .z = size.z}; }

// In a lazy schedule, a launch that may be overlapped runs as late as it can: when the launch
// after it waits for it.
cudaError_t start(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  const auto entry = kernels().find(state().names[function]);
  if (entry == kernels().end()) return report(cudaErrorInvalidDeviceFunction, "no such kernel");
  const Kernel& kernel = entry->second;
  const size_t dynamic_bytes = config.dynamicSmemBytes;
  size_t shared_bytes = dynamic_bytes;
  for (const Shared& variable : kernel.shared) shared_bytes += variable.size;
  const int dynamic_limit = std::max(48 << 10, state().dynamic_limits[function]);
  if (shared_bytes > size_t(shared_limit) || dynamic_bytes > size_t(dynamic_limit))
    return report(cudaErrorInvalidValue, "more shared memory than allowed");
  const Call call{.kernel = &kernel,
                  .blocks = dim(config.gridDim),
                  .threads = dim(config.blockDim),
                  .dynamic_bytes = dynamic_bytes,
                  .parameters = pack_parameters(kernel, arguments),
                  .overlaps = allows_overlap(config)};
  std::string error = call.overlaps ? "" : finish();
  if (error.empty()) state().postponed.push_back(call);
  if (error.empty() && !schedule.lazy) error = finish();
  return error.empty() ? cudaSuccess : report(cudaErrorLaunchFailure, error);
}

cudaError_t start(const void* function, dim3 blocks, dim3 threads, void** arguments,
                  size_t dynamic_bytes) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = dynamic_bytes;
  return start(function, config, arguments);
}

// The bytes of an element of a tensor, or 0 if the emulator does not know the type.
u32 element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

// cuTensorMapEncodeTiled for matrices. It refuses what the driver refuses, and what hopper.h
// does not support.
CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                    const cuuint64_t* size, const cuuint64_t* pitch, const cuuint32_t* box,
                    const cuuint32_t* step, CUtensorMapInterleave interleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                    CUtensorMapFloatOOBfill fill) {
  const u32 bytes = element_bytes(type);
  if (rank != 2 || !bytes || u64(map) % 64 || u64(base) % 16) return CUDA_ERROR_INVALID_VALUE;
  bool valid =
      interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (int i = 0; i < 2; ++i) {
    valid &= size[i] && size[i] <= 1ull << 32;
    valid &= box[i] && box[i] <= 256 && step[i] == 1;
  }
  const u64 row_pitch = pitch[0];
  valid &= row_pitch % 16 == 0 && row_pitch < 1ull << 40 && row_pitch >= size[0] * bytes;
  const u32 box_row_bytes = box[0] * bytes;
  valid &= box_row_bytes % 16 == 0;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  valid &= swizzled ? box_row_bytes == 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  static_assert(sizeof(TensorMap) <= sizeof *map);
  *reinterpret_cast<TensorMap*>(map) = {.magic = TENSOR_MAP_MAGIC,
                                        .base = static_cast<unsigned char*>(base),
                                        .columns = size[0],
                                        .rows = size[1],
                                        .row_pitch = row_pitch,
                                        .element_bytes = bytes,
                                        .box_row_bytes = box_row_bytes,
                                        .box_rows = box[1],
                                        .swizzled = swizzled};
  return CUDA_SUCCESS;
}

cudaError_t entry_point(const std::string& name, void** function,
                        cudaDriverEntryPointQueryResult* result) {
  const bool known = name == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_map) : nullptr;
  if (result)
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
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
unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t dynamic_bytes,
                                     cudaStream_t stream) {
  cudaLaunchConfig_t& config = state().configuration;
  config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* dynamic_bytes,
                                       void* stream) {
  const cudaLaunchConfig_t& config = state().configuration;
  *blocks = config.gridDim;
  *threads = config.blockDim;
  *dynamic_bytes = config.dynamicSmemBytes;
  *static_cast<cudaStream_t*>(stream) = config.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = cudaKernel_t(function);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** arguments,
                             size_t dynamic_bytes, cudaStream_t) {
  return start(function, blocks, threads, arguments, dynamic_bytes);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks, dim3 threads, void** arguments,
                               size_t dynamic_bytes, cudaStream_t) {
  return start(kernel, blocks, threads, arguments, dynamic_bytes);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return start(function, *config, arguments);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    state().dynamic_limits[function] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(state().last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return state().last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error ? state().message.c_str() : "no error";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  return entry_point(name, function, result);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  return entry_point(name, function, result);
}
// The device is a Hopper GPU of four multiprocessors.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<int, int> values{{cudaDevAttrMultiProcessorCount, 4},
                                  {cudaDevAttrComputeCapabilityMajor, 9},
                                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_limit}};
  *value = values.contains(attribute) ? values.at(attribute) : 0;
  return cudaSuccess;
}
}
