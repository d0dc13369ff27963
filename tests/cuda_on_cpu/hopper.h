// Hopper's instructions: mbarriers, tiles that tensor maps name, and products of a warpgroup.
//
// Part of machine.h. hopper.cpp says which tile or product is due; the loops here touch its
// memory, inlined into the kernel, where sanitizers see them. ThreadSanitizer takes them for
// accesses of others than the thread: a fetch is made by the launch's fetcher after all that
// its thread has seen; a product is read, a quarter at a time, by its warp's reader after what
// the warp's *asynchronous proxies* have seen, and these see the thread's own stores only at
// fence.proxy.async. Hence no local variable here may have an address: the stack is the
// thread's own. A product is complete for all four warps once one thread has waited for it,
// since one of them may give back what all have multiplied; ThreadSanitizer takes that wait for
// a barrier between the four.
#pragma once

#define INLINED \
  inline __attribute__((always_inline))  // so that a report names the kernel's line

// mbarriers

void barrier_init(u64 address, Any count, const char* site);
void barrier_inval(u64 address, const char* site);
u64 barrier_arrive(u64 address, Any bytes, Any count,
                   const char* site);  // and expect so many bytes
void barrier_expect(u64 address, Any bytes, const char* site);
bool barrier_over(u64 address, Any parity, const char* site);
void fence_asynchronous();

// Tiles

struct Map {  // what a CUtensorMap holds here; see runtime.cpp
  u64 magic;
  unsigned char* base;
  u64 columns, rows, pitch;  // in elements, and bytes from row to row
  u32 size, width, height;   // bytes of an element, bytes of a box's row, and its rows
  bool swizzled;
};
constexpr u64 MAP = 0x70616d20726f736e;

struct Tile {
  u64 at;  // in shared memory
  Map map;
  s32 column, row;
  const char* site;
};
struct Place {
  Any column, row;
};

// Of 128-byte rows, eight by eight: the 16-byte chunk c of row r lies at chunk c ^ (r & 7)
inline u64 swizzled(u64 address) { return address ^ (address >> 7 & 7) << 4; }
inline u64 word_at(const Tile& t, u32 row, u32 byte) {
  const u64 address = t.at + row * t.map.width + byte;
  return t.map.swizzled ? swizzled(address) : address;
}
inline unsigned char* byte_at(const Tile& t, u32 row, u32 byte) {  // in global memory, or null
  const s64 r = t.row + s64(row), b = s64(t.column) * t.map.size + byte;
  const bool inside =
      r >= 0 && u64(r) < t.map.rows && b >= 0 && u64(b) < t.map.columns * t.map.size;
  return inside ? t.map.base + r * t.map.pitch + b : nullptr;
}
inline void bring(const Tile& t) {
  for (u32 row = 0; row < t.map.height; ++row)
    for (u32 byte = 0; byte < t.map.width; byte += 8) {
      u64 word = 0;
      for (u32 i = 0; i < 8; ++i)
        if (const unsigned char* from = byte_at(t, row, byte + i)) word |= u64(*from) << 8 * i;
      *reinterpret_cast<u64*>(word_at(t, row, byte)) = word;
    }
}
inline void send(const Tile& t) {
  for (u32 row = 0; row < t.map.height; ++row)
    for (u32 byte = 0; byte < t.map.width; byte += 8) {
      const u64 word = *reinterpret_cast<const u64*>(word_at(t, row, byte));
      for (u32 i = 0; i < 8; ++i)
        if (unsigned char* to = byte_at(t, row, byte + i)) *to = word >> 8 * i;
    }
}

const Tile* fetch(u64 to, u64 map, Place place, u64 barrier,
                  const char* site);  // which is due at once, or null
const Tile* due_fetch(u64 barrier, Any parity,
                      const char* site);  // before this barrier may be asked
void fetched();
INLINED void fetch_tile(u64 to, u64 map, Place place, u64 barrier, const char* site) {
  if (const Tile* tile = fetch(to, map, place, barrier, site)) bring(*tile), fetched();
}
// The phase of this parity is over. The thread waits until it is, or is told that it is not
// where nothing else can happen.
INLINED bool barrier_passed(u64 address, Any parity, const char* site) {
  while (const Tile* tile = due_fetch(address, parity, site)) bring(*tile), fetched();
  return barrier_over(address, parity, site);
}

const Tile* postpone_store(u64 map, Place place, u64 from, const char* site);
const Tile* due_store(u32 groups_left);
void stored();
void commit_tiles();
INLINED void store_tile(u64 map, Place place, u64 from, const char* site) {
  if (const Tile* tile = postpone_store(map, place, from, site)) send(*tile), stored();
}
INLINED void wait_tiles(u32 groups_left) {
  while (const Tile* tile = due_store(groups_left)) send(*tile), stored();
}

// Products of a warpgroup

struct Product {
  u64 a, b;     // descriptors
  u32 columns;  // of b, and of the sums
  bool add, brain, held, turned_a,
      turned_b;  // held: a lies in registers; turned: rows of the tile are k
  const char* site;
  bool operator==(const Product&) const = default;
};
const Product* issue(const Product& product, u32* const* sums,
                     u32* const* held);  // which is due at once, or null
const Product* due_product(u32 groups_left, const char* site);
u32 first_row();  // of the quarter that is due
u64 tile_address(u64 descriptor);
void hold(bool of_a, u32 i, u32 k, u16 element);  // what is read for the product that is due
void multiplied();
void commit_products();

// Where element k of row i lies under a descriptor of 128-byte swizzled rows; or, turned,
// element i of row k
inline u64 element_at(u64 descriptor, bool turned, u32 i, u32 k) {
  const u64 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff)
                                                                 << 4;
  return swizzled(tile_address(descriptor) +
                  (turned ? i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                          : i / 8 * stride + i % 8 * 128 + k * 2));
}
inline void read_factor(bool of_a, u64 descriptor, bool turned, u32 first, u32 rows,
                        const char* site) {
  for (u32 i = 0; i < rows; ++i)
    for (u32 k = 0; k < 16; ++k) {
      const u64 address =
          checked(Space::shared, element_at(descriptor, turned, first + i, k), 2, site);
      hold(of_a, i, k, *reinterpret_cast<const u16*>(address));
    }
}
INLINED void read_factors(const Product& p) {
  if (!p.held) read_factor(true, p.a, p.turned_a, first_row(), 16, p.site);
  read_factor(false, p.b, p.turned_b, 0, p.columns, p.site);
  multiplied();
}
INLINED void multiply_later(const Product& product, u32* const* sums, u32* const* held) {
  if (const Product* due = issue(product, sums, held)) read_factors(*due);
}
INLINED void wait_products(u32 groups_left, const char* site) {
  while (const Product* due = due_product(groups_left, site)) read_factors(*due);
}
