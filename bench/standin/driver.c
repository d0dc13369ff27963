// A libcuda.so.1 that does nothing and reports success. It answers what Triton's driver asks as
// an H200 would, so that launches can be timed and compared on a machine without a GPU. It can
// note what is launched, with the parameters.
#include <stdint.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default")))

enum {
  CUDA_OK = 0,
  KERNELS = 512,   // that can be known
  MOST = 96,       // parameters of a kernel
  WORDS = 1 << 16  // of notes
};

static struct {
  void* function;
  int parameters;            // how many
  unsigned char size[MOST];  // bytes of each parameter
} known[KERNELS];
static int count;              // of known kernels
static int noting;             // whether launches are noted
static int filled;             // words of notes
static uint64_t notes[WORDS];  // see standin_noted
static long nanoseconds;       // that a launch takes
static unsigned long launches, modules;
static void* context;

// Sets how long a launch takes.
API void standin_cost(long ns) { nanoseconds = ns; }
API unsigned long standin_launches(void) { return launches; }

// Tells how many bytes each parameter of a function has. Else its parameters are not noted.
API void standin_tell(void* function, int parameters, const unsigned char* size) {
  for (int i = 0; i < count; ++i)
    if (known[i].function == function) return;
  if (count == KERNELS || parameters > MOST) return;
  known[count].function = function;
  known[count].parameters = parameters;
  memcpy(known[count++].size, size, parameters);
}

// Starts or stops noting, and forgets earlier notes.
API void standin_note(int on) {
  noting = on;
  filled = 0;
}

// Gives the notes and returns how many words they are. A launch has: function, grid (3),
// threads, shared memory, number of parameters, parameters.
API int standin_noted(uint64_t** words) {
  *words = notes;
  return filled;
}

static void launched(void* function, const unsigned* grid, unsigned threads, unsigned shared,
                     void** parameters) {
  struct timespec start, now;
  ++launches;
  if (nanoseconds) {
    clock_gettime(CLOCK_MONOTONIC, &start);
    do clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < nanoseconds);
  }
  if (!noting || filled + 7 + MOST > WORDS) return;
  const uint64_t head[] = {(uint64_t)function, grid[0], grid[1], grid[2], threads, shared, 0};
  memcpy(notes + filled, head, sizeof head);
  filled += 7;
  for (int i = 0; i < count; ++i) {
    if (known[i].function != function) continue;
    notes[filled - 1] = known[i].parameters;
    for (int j = 0; j < known[i].parameters; ++j) {
      notes[filled] = 0;
      memcpy(notes + filled++, parameters[j], known[i].size[j]);
    }
  }
}

// CUlaunchConfig of the driver.
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;

API int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  launched(function, config->grid, config->block[0], config->shared, parameters);
  return CUDA_OK;
}

API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned shared, void* stream,
                       void** parameters, void** extra) {
  const unsigned grid[] = {gx, gy, gz};
  launched(function, grid, bx, shared, parameters);
  return CUDA_OK;
}

API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;    // shared memory of a block
    case 97: *value = 232448; break;  // the same, asked for
    case 81: *value = 233472; break;  // of a multiprocessor
    case 12: *value = 65536; break;   // registers
    case 16: *value = 132; break;     // multiprocessors
    case 10: *value = 32; break;      // threads of a warp
    case 75: *value = 9; break;       // compute capability
    case 76: *value = 0; break;
    default: *value = 1000000;
  }
  return CUDA_OK;
}

API int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 128 : 0;  // threads of a block, registers
  return CUDA_OK;
}

API int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)(0x1000 + ++modules);
  return CUDA_OK;
}

API int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)(0x100000 + 16 * (uintptr_t)module);
  return CUDA_OK;
}

API int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return CUDA_OK;
}

API int cuInit(unsigned flags) { return CUDA_OK; }
API int cuDriverGetVersion(int* version) { return *version = 13000, CUDA_OK; }
API int cuDeviceGetCount(int* devices) { return *devices = 1, CUDA_OK; }
API int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, CUDA_OK; }
API int cuDevicePrimaryCtxRetain(void** made, int device) { return *made = (void*)0x10, CUDA_OK; }
API int cuCtxGetCurrent(void** current) { return *current = context, CUDA_OK; }
API int cuCtxSetCurrent(void* wanted) { return context = wanted, CUDA_OK; }
API int cuCtxGetDevice(int* device) { return *device = 0, CUDA_OK; }
API int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, CUDA_OK; }
API int cuCtxSetLimit(int limit, size_t value) { return CUDA_OK; }
API int cuModuleUnload(void* module) { return CUDA_OK; }
API int cuFuncSetAttribute(void* function, int attribute, int value) { return CUDA_OK; }
API int cuFuncSetCacheConfig(void* function, int config) { return CUDA_OK; }
API int cuGetErrorString(int code, const char** text) { return *text = "none", CUDA_OK; }
API int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  return *clusters = 66, CUDA_OK;
}
API int cuStreamIsCapturing(void* stream, int* capturing) { return *capturing = 0, CUDA_OK; }
API int cuTensorMapEncodeTiled(void* map) { return memset(map, 0, 128), CUDA_OK; }
API int cuTensorMapEncodeIm2col(void* map) { return memset(map, 0, 128), CUDA_OK; }
