// Hopper's instructions: mbarriers, tiles that a tensor map describes, and wgmma.
//
// hopper.cpp decides which tile is due, and wgmma.cpp which product. The loops over their
// elements are here. They are inlined into the kernel, so that the sanitizers see the memory
// accesses.
//
// On a GPU the asynchronous proxy makes these accesses, not the thread. ThreadSanitizer learns
// this from fibers of its own:
// - Fetches belong to the launch's fetcher. A fetch comes after everything that the thread has
//   seen when it begins the fetch.
// - Stores belong to the thread's asynchronous proxy.
// - Products belong to the warp's reader. It comes after what the asynchronous proxies of the
//   warp's lanes have seen.
// - An asynchronous proxy sees the thread's own stores only after fence.proxy.async.
// So no local variable here may have an address, since the stack belongs to the thread.
//
// A thread that has waited for a product may give back memory that all four warps of the
// warpgroup have read. So each wait covers all four warps, and ThreadSanitizer takes it for a
// barrier between them.
#pragma once
#include "machine.h"

// Reports of a sanitizer then name the kernel's line.
#define INLINED inline __attribute__((always_inline))

namespace emulator {

// mbarriers

void barrier_init(u64 address, Any count, const char* site);
void barrier_inval(u64 address, const char* site);
// Adds `bytes` to the expected bytes, and arrives `count` times. Returns the phase.
u64 barrier_arrive(u64 address, Any bytes, Any count, const char* site);
void barrier_expect(u64 address, Any bytes, const char* site);
bool is_phase_over(u64 address, Any parity, const char* site);
void fence_async_proxy();

// Tiles

struct TensorMap {  // what a CUtensorMap contains here; runtime.cpp encodes it
  u64 magic;        // TENSOR_MAP_MAGIC
  unsigned char* base;
  u64 columns;
  u64 rows;
  u64 row_pitch;  // bytes from row to row
  u32 element_bytes;
  u32 box_row_bytes;
  u32 box_rows;
  bool swizzled;  // by 128 bytes
};
constexpr u64 TENSOR_MAP_MAGIC = 0x70616d20726f736e;

struct Coordinates {
  Any column;
  Any row;
};
struct Tile {
  u64 address;  // in shared memory
  TensorMap map;
  s32 column;
  s32 row;
  const char* site;
};

// The 128-byte swizzle: chunk c (16 bytes) of row r (128 bytes) lies at chunk c ^ (r & 7).
inline u64 swizzled(u64 address) { return address ^ (address >> 7 & 7) << 4; }

// The address in shared memory of a byte of the tile.
inline u64 shared_address(const Tile& tile, u32 row, u32 byte) {
  const u64 address = tile.address + row * tile.map.box_row_bytes + byte;
  return tile.map.swizzled ? swizzled(address) : address;
}

// The address in global memory of a byte of the tile, or null outside of the matrix.
inline unsigned char* global_address(const Tile& tile, u32 tile_row, u32 tile_byte) {
  const TensorMap& map = tile.map;
  const s64 row = tile.row + s64(tile_row);
  const s64 byte = s64(tile.column) * map.element_bytes + tile_byte;
  const bool row_exists = row >= 0 && u64(row) < map.rows;
  const bool byte_exists = byte >= 0 && u64(byte) < map.columns * map.element_bytes;
  return row_exists && byte_exists ? map.base + row * map.row_pitch + byte : nullptr;
}

inline void copy_to_shared(const Tile& tile) {
  for (u32 row = 0; row < tile.map.box_rows; ++row)
    for (u32 byte = 0; byte < tile.map.box_row_bytes; byte += 8) {
      u64 word = 0;
      for (u32 i = 0; i < 8; ++i)
        if (const unsigned char* source = global_address(tile, row, byte + i))
          word |= u64(*source) << 8 * i;
      *reinterpret_cast<u64*>(shared_address(tile, row, byte)) = word;
    }
}

inline void copy_to_global(const Tile& tile) {
  for (u32 row = 0; row < tile.map.box_rows; ++row)
    for (u32 byte = 0; byte < tile.map.box_row_bytes; byte += 8) {
      const u64 word = *reinterpret_cast<const u64*>(shared_address(tile, row, byte));
      for (u32 i = 0; i < 8; ++i)
        if (unsigned char* target = global_address(tile, row, byte + i))
          *target = word >> 8 * i;
    }
}

// Adds a fetch. Returns its tile if the caller has to copy it at once, else null.
const Tile* add_fetch(u64 target, u64 map, Coordinates start, u64 barrier, const char* site);
// The next tile to copy before the thread may look at the barrier, or null.
const Tile* next_due_fetch(u64 barrier, Any parity, const char* site);
void finish_fetch();

INLINED void fetch_tile(u64 target, u64 map, Coordinates start, u64 barrier, const char* site) {
  if (const Tile* tile = add_fetch(target, map, start, barrier, site)) {
    copy_to_shared(*tile);
    finish_fetch();
  }
}

// mbarrier.try_wait and mbarrier.test_wait: whether the phase of this parity is over. If it is
// not, the thread waits until it is. The answer is false only when no other thread can run and
// no fetch is under way.
INLINED bool wait_barrier(u64 address, Any parity, const char* site) {
  while (const Tile* tile = next_due_fetch(address, parity, site)) {
    copy_to_shared(*tile);
    finish_fetch();
  }
  return is_phase_over(address, parity, site);
}

// Adds a store. Returns its tile if the caller has to copy it at once, else null.
const Tile* add_store(u64 map, Coordinates start, u64 source, const char* site);
// The next tile to copy before no more than `groups_left` groups of stores are left, or null.
const Tile* next_due_store(u32 groups_left);
void finish_store();
void commit_stores();

INLINED void store_tile(u64 map, Coordinates start, u64 source, const char* site) {
  if (const Tile* tile = add_store(map, start, source, site)) {
    copy_to_global(*tile);
    finish_store();
  }
}

INLINED void wait_stores(u32 groups_left) {
  while (const Tile* tile = next_due_store(groups_left)) {
    copy_to_global(*tile);
    finish_store();
  }
}

// Products of a warpgroup

struct Product {  // wgmma.mma_async: sums (64, columns) = a (64, 16) · b (columns, 16)ᵀ
  u64 a;          // descriptors of the factors
  u64 b;
  u32 columns;
  bool accumulates;     // adds to the sums
  bool is_bf16;         // the type of the factors; else half
  bool a_in_registers;  // instead of shared memory
  bool a_transposed;    // row k of the tile in shared memory holds a[:, k]
  bool b_transposed;
  const char* site;
  bool operator==(const Product&) const = default;
};
// Adds this lane to a product. Returns the product if the caller has to read its factors at
// once, else null. sums, a_registers: the addresses of the registers
const Product* add_product(const Product& product, u32* const* sums, u32* const* a_registers);
// The next product to perform before no more than `groups_left` groups are left, or null.
const Product* next_due_product(u32 groups_left, const char* site);
u32 first_row();  // the first row of a that the due product reads
u64 tile_address(u64 descriptor);
void set_element(bool of_a, u32 i, u32 k, u16 element);  // of the due product's factor
void finish_product();
void commit_products();

// The address of element (i, k) of a factor. The descriptor says that 128-byte rows are
// swizzled.
inline u64 element_address(u64 descriptor, bool transposed, u32 i, u32 k) {
  const u64 leading = (descriptor >> 16 & 0x3fff) << 4;
  const u64 stride = (descriptor >> 32 & 0x3fff) << 4;
  const u64 offset = transposed ? i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                                : i / 8 * stride + i % 8 * 128 + k * 2;
  return swizzled(tile_address(descriptor) + offset);
}

inline void read_factor(bool of_a, u64 descriptor, bool transposed, u32 first, u32 rows,
                        const char* site) {
  for (u32 i = 0; i < rows; ++i)
    for (u32 k = 0; k < 16; ++k) {
      const u64 element = element_address(descriptor, transposed, first + i, k);
      const u64 address = checked(Space::shared, element, 2, site);
      set_element(of_a, i, k, *reinterpret_cast<const u16*>(address));
    }
}

INLINED void perform(const Product& product) {
  if (!product.a_in_registers)
    read_factor(true, product.a, product.a_transposed, first_row(), 16, product.site);
  read_factor(false, product.b, product.b_transposed, 0, product.columns, product.site);
  finish_product();
}

INLINED void multiply_async(const Product& product, u32* const* sums, u32* const* a_registers) {
  if (const Product* due = add_product(product, sums, a_registers)) perform(*due);
}

INLINED void wait_products(u32 groups_left, const char* site) {
  while (const Product* due = next_due_product(groups_left, site)) perform(*due);
}

}  // namespace emulator
