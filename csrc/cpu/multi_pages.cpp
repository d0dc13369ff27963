// Puts adapters into the pages of pools, and looks for NaN and infinity in them.
#include <type_traits>

#include "multi.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

// A layer's adapter, as a row of int64.
struct Job {
  int64_t a_to, b_to;      // addresses of the layer's pools (R, k) and (R, n)
  int64_t a_from, b_from;  // of lora_A (r, k) and lora_B (n, r)
  int64_t k, n, r;
};

// out (columns,) = in, rounded to To.
template <class To, class From>
void convert(const From* in, int64_t columns, To* out) {
  if constexpr (std::is_same_v<To, From>) {
    copy_past_caches(out, in, columns * int64_t(sizeof(To)));
  } else {
    for (int64_t c = 0; c < columns; c += LANES)
      store(out + c, load(in + c, columns - c), columns - c);
  }
}

// row(j) (n,) = column j of in (n, r), rounded to To, for each j.
template <class To, class From, class F>
void convert_turned(const From* in, int64_t r, int64_t n, F row) {
  constexpr int64_t width = 16;  // floats of a cache line
  float tile[LANES * width];
  for (int64_t j = 0; j < r; j += LANES) {
    const int64_t count = min(LANES, r - j);
    To* out[LANES];
    for (int64_t e = 0; e < count; ++e) out[e] = row(j + e);
    for (int64_t i = 0; i < n; i += width) {
      const int64_t some = min(width, n - i);
      for (int64_t c = 0; c < some; c += LANES)
        transpose_into<float>(in + (i + c) * r + j, r, min(LANES, some - c), count, tile + c,
                              width);
      for (int64_t e = 0; e < count; ++e) convert(tile + e * width, some, out[e] + i);
    }
  }
}

template <class To, class From>
void put(const Job& job, const int32_t* pages) {
  const auto row = [&](int64_t to, int64_t columns, int64_t j) {
    return (To*)to + (PAGE * pages[j / PAGE] + j % PAGE) * columns;
  };
  const From* a = (const From*)job.a_from;
  for (int64_t j = 0; j < job.r; j += PAGE)
    convert(a + j * job.k, min(PAGE, job.r - j) * job.k, row(job.a_to, job.k, j));
  convert_turned<To>((const From*)job.b_from, job.r, job.n,
                     [&](int64_t j) { return row(job.b_to, job.n, j); });
  finish_copies();
}

// The bits of an element, as an unsigned integer, and those of its exponent. All of them are
// set in NaN and infinity.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type exponent = 0x7f800000;
};
template <>
struct Bits<fp16> {
  using type = uint16_t;
  static constexpr type exponent = 0x7c00;
};
template <>
struct Bits<bf16> {
  using type = uint16_t;
  static constexpr type exponent = 0x7f80;
};

template <class T>
bool all_finite(const void* data, int64_t count) {
  using U = typename Bits<T>::type;
  const U* bits = static_cast<const U*>(data);
  constexpr U exponent = Bits<T>::exponent;
  U largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const U magnitude = bits[i] & exponent;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < exponent;
}

}  // namespace

void multi_put(Tensor to, Tensor from, Tensor jobs, Tensor pages) {
  const Job* job = as<Job>(jobs);
#pragma omp parallel for num_threads(threads_for(1000 * jobs.shape[0])) schedule(dynamic)
  for (int64_t i = 0; i < jobs.shape[0]; ++i)
    with_type(to.dtype, [&](auto t) {
      with_type(from.dtype,
                [&](auto f) { put<decltype(t), decltype(f)>(job[i], as<int32_t>(pages)); });
    });
}

void multi_finite(Tensor finite, Tensor from, Tensor pieces) {
  struct Piece {
    int64_t address, count;
  };
  const Piece* piece = as<Piece>(pieces);
#pragma omp parallel for num_threads(threads_for(1000 * pieces.shape[0])) schedule(dynamic)
  for (int64_t i = 0; i < pieces.shape[0]; ++i)
    with_type(from.dtype, [&](auto f) {
      as<uint8_t>(finite)[i] =
          all_finite<decltype(f)>((const void*)piece[i].address, piece[i].count);
    });
}

}  // namespace peftops::ISA
