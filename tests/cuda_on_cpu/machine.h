// What translated kernels call for memory and for what a thread does together with others.
// arithmetic.h and hopper.h hold the rest.
//
// An address says which memory space it belongs to:
// - A shared address is a host pointer below 4 GiB, so that it fits into 32 bits.
// - A generic address of shared memory is the shared address plus a constant.
// - Any other address is a host pointer to global or local memory.
//
// This file is compiled with the sanitizers, which see a kernel's own loads and stores. The
// .cpp files, where threads wait, are compiled without.
#pragma once
#include "arithmetic.h"

namespace emulator {

struct Dim {
  u32 x;
  u32 y;
  u32 z;
};
struct Thread {
  Dim tid;   // the index within the block
  u32 lane;  // the index within the warp
  u32 warp;  // the index of the warp within the block
};
struct Launch {
  Dim blocks;   // the size of the grid
  Dim threads;  // the size of a block
  Dim block;    // the index of the block that runs
};
struct Shared {  // a variable in shared memory
  u32* address;  // receives the variable's address
  u32 align;
  u32 size;
};
struct Parameter {
  u32 offset;  // in bytes from the first parameter
  u32 size;
};
struct Kernel {
  void (*body)(const unsigned char* parameters);  // what one thread does
  std::vector<Shared> shared;
  std::vector<Parameter> parameters;
  bool asynchronous;  // uses mbarriers, tensor maps or wgmma
};
struct Schedule {
  std::string order = "forward";  // of threads and of blocks: forward, reverse or random
  // true: cp.async copies when a thread waits for it, and a launch that may overlap the one
  // before it does so. false: copies and launches run at once.
  bool lazy = true;
};
struct Counts {
  u64 launches;
  u64 blocks;
  u64 mma;
  u64 wgmma;
  u64 matrices;   // loaded by ldmatrix
  u64 conflicts;  // bank conflicts of ldmatrix
};
extern Thread* self;
extern Launch launch;
extern u64 dynamic_shared;
extern Schedule schedule;
extern int shared_limit;  // bytes of shared memory that a block may have
extern Counts counts;

std::map<std::string, Kernel>& kernels();  // by their names

// Runs a launch. Returns an empty string or an error. Calls `launch_before` when a thread first
// executes griddepcontrol.wait. dynamic_bytes: the size of dynamic shared memory
std::string run(const Kernel& kernel, Dim blocks, Dim threads, size_t dynamic_bytes,
                const std::vector<unsigned char>& parameters,
                std::function<std::string()> launch_before);
std::string finish();  // runs the launches that have been postponed
[[noreturn]] void fail(const std::string& error);

// Memory. `site` is the file and line of the instruction, here and below.

enum class Space { generic, global, shared, local };

// The host pointer of an address. Fails if the address is of another space, or if it is not a
// multiple of `size`.
u64 checked(Space space, u64 address, u32 size, const char* site);
u64 from_shared(u64 address);  // the generic address of a shared address

template <class T, int N>
std::array<T, N> load(Space space, u64 address, const char* site) {
  const T* source = reinterpret_cast<const T*>(checked(space, address, N * sizeof(T), site));
  std::array<T, N> values;
  for (int i = 0; i < N; ++i) values[i] = source[i];
  return values;
}

template <class T, int N>
void store(Space space, u64 address, const T (&values)[N], const char* site) {
  T* target = reinterpret_cast<T*>(checked(space, address, N * sizeof(T), site));
  for (int i = 0; i < N; ++i) target[i] = values[i];
}

template <class T, int N>
std::array<T, N> parameter(const unsigned char* source) {
  std::array<T, N> values;
  memcpy(values.data(), source, sizeof values);
  return values;
}

// Replaces the value at an address by update(value). No other fiber runs in between, since
// fibers switch only where they wait.
template <class T, class F>
T atomic(Space space, u64 address, const char* site, F update) {
  T* target = reinterpret_cast<T*>(checked(space, address, sizeof(T), site));
  T old;
  __atomic_load(target, &old, __ATOMIC_RELAXED);
  T updated = T(update(old));
  __atomic_store(target, &updated, __ATOMIC_RELAXED);
  return old;
}

#define ATOMIC(name, result)                                                      \
  template <class T>                                                              \
  T atomic_##name(Space space, u64 address, const char* site, Any a, Any b = 0) { \
    const auto update = [x = as<T>(a), y = as<T>(b)](T old) {                     \
      (void)y;                                                                    \
      return result;                                                              \
    };                                                                            \
    return atomic<T>(space, address, site, update);                               \
  }
ATOMIC(add, old + x)
ATOMIC(min, std::min(old, x))
ATOMIC(max, std::max(old, x))
ATOMIC(and, (old & x))
ATOMIC(or, old | x)
ATOMIC(exch, x)
ATOMIC(cas, old == x ? y : old)
#undef ATOMIC

// cp.async

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  u32 size;    // bytes to write
  u32 filled;  // bytes to read; zeros replace the others
};
bool postpone(Copy copy);  // returns false if the caller has to perform the copy at once
void commit_copies();
// Sets `copy` to the next copy to perform. Returns false if there is none.
bool next_due_copy(u32 groups_left, Copy& copy);

inline void perform(Copy copy) {
  for (u32 i = 0; i < copy.size; ++i) copy.target[i] = i < copy.filled ? copy.source[i] : 0;
}

inline void copy_async(u32 size, u64 target, u64 source, Any filled, const char* site) {
  const u32 bytes = as<u32>(filled);
  if (bytes > size) fail(std::string("cp.async reads more than it writes at ") + site);
  const u64 from = bytes ? checked(Space::global, source, size, site) : 0;
  const u64 to = checked(Space::shared, target, size, site);
  const Copy copy{.target = reinterpret_cast<unsigned char*>(to),
                  .source = reinterpret_cast<unsigned char*>(from),
                  .size = size,
                  .filled = bytes};
  if (!postpone(copy)) perform(copy);
}

inline void wait_copies(u32 groups_left) {
  Copy copy;
  while (next_due_copy(groups_left, copy)) perform(copy);
}

// What threads do together

void sync_block(Any barrier, Any threads, const char* site);  // threads: their count; 0: all
void arrive_block(Any barrier, Any threads, const char* site);
void sync_warp(Any mask, const char* site);
void wait_for_launch_before();

// The values of all lanes in the mask, and 0 for the other lanes.
std::array<u64, 32> gather(Any mask, u64 value, const char* site);

// The source lane's value, and whether the source lies inside the segment.
// mode: the first letter of up, down, bfly or idx
std::array<u64, 2> shuffle(char mode, Any value, Any lane, Any clamp, Any mask,
                           const char* site);

// mma.m16n8k16 of bfloat16 factors (is_bf16) or of half factors.
std::array<f32, 4> multiply(bool is_bf16, const Any (&a)[4], const Any (&b)[2],
                            const Any (&c)[4], const char* site);

// ldmatrix. row: what this lane has loaded from `address`
void distribute_matrices(int count, bool transposed, u64 address, const u16* row, u32* out,
                         const char* site);

inline u32 vote_ballot(Any value, Any mask, const char* site) {
  u32 votes = 0;
  const auto values = gather(mask, as<bool>(value), site);
  for (int i = 0; i < 32; ++i) votes |= u32(values[i]) << i;
  return votes;
}

inline bool vote_any(Any value, Any mask, const char* site) {
  return vote_ballot(value, mask, site);
}

inline bool vote_all(Any value, Any mask, const char* site) {
  return !vote_ballot(!as<bool>(value), mask, site);
}

template <class T, class F>
T reduce(Any value, Any mask, const char* site, F combine) {
  const auto values = gather(mask, value.bits, site);
  T result = as<T>(value);
  for (u32 i = 0; i < 32; ++i)
    if (mask.bits >> i & 1 && i != self->lane) result = combine(result, as<T>(values[i]));
  return result;
}

#define REDUCE(name, result)                                                 \
  template <class T>                                                         \
  T reduce_##name(Any value, Any mask, const char* site) {                   \
    return reduce<T>(value, mask, site, [](T a, T b) { return T(result); }); \
  }
REDUCE(add, a + b)
REDUCE(min, std::min(a, b))
REDUCE(max, std::max(a, b))
REDUCE(and, (a & b))
REDUCE(or, a | b)
#undef REDUCE

template <int COUNT, bool TRANSPOSED>
std::array<u32, COUNT> load_matrices(u64 address, const char* site) {
  // The load stands here, where the sanitizers see it. Only the first 8 * COUNT lanes name a
  // row.
  std::array<u16, 8> row{};
  if (self->lane < 8 * COUNT) row = load<u16, 8>(Space::shared, address, site);
  std::array<u32, COUNT> out;
  distribute_matrices(COUNT, TRANSPOSED, address, row.data(), out.data(), site);
  return out;
}

}  // namespace emulator
