// A device for torch that computes nothing. Dispatcher, autograd, autocast and allocation of
// tensors are torch's own, so that the host's time can be measured without a GPU. The launch of
// a kernel and a matrix product take as long as costs() says: they wait for the clock. Values
// are never read, since memory consists of addresses that mean nothing.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <time.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using std::optional;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

long launch_ns = 0, product_ns = 0;  // how long they take
long launches = 0, products = 0;     // how many there were
bool holding = false;                // memory that is given back is not handed out again
// Of products, while holding: how many launches came before, then address, rows and strides of
// a, b and out.
std::vector<std::vector<int64_t>> notes;

void spin(long ns) {
  if (!ns) return;
  struct timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  do clock_gettime(CLOCK_MONOTONIC, &now);
  while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < ns);
}

void launch() {
  ++launches;
  spin(launch_ns);
}

void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  ++products;
  spin(product_ns);
  if (!holding) return;
  static const auto counted = (unsigned long (*)())dlsym(RTLD_DEFAULT, "standin_launches");
  std::vector<int64_t> note = {(int64_t)counted()};
  for (const Tensor& t : {a, b, out})
    note.insert(note.end(), {(int64_t)t.data_ptr(), t.size(0), t.stride(0), t.stride(1)});
  notes.push_back(note);
}

// Hands out addresses, and hands them out again by size under a lock, as a caching allocator
// does.
struct Pool final : c10::Allocator {
  std::mutex lock;
  std::unordered_map<size_t, std::vector<void*>> idle;
  std::unordered_map<void*, size_t> sizes;
  uintptr_t next = 0x7f0000000000;

  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(TYPE, 0);
    if (!bytes) return {nullptr, nullptr, &give_back, device};
    std::lock_guard<std::mutex> guard(lock);
    bytes = (bytes + 511) / 512 * 512;
    auto& same = idle[bytes];
    void* start = reinterpret_cast<void*>(next);
    if (same.empty()) {
      next += bytes;
      sizes[start] = bytes;
    } else {
      start = same.back();
      same.pop_back();
    }
    return {start, start, &give_back, device};
  }
  static void give_back(void* start);
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void*, const void*, size_t) const override {}
};

Pool pool;

void Pool::give_back(void* start) {
  if (!start || holding) return;
  std::lock_guard<std::mutex> guard(pool.lock);
  pool.idle[pool.sizes[start]].push_back(start);
}

REGISTER_ALLOCATOR(TYPE, &pool);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TYPE;
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return {TYPE, 0}; }
  c10::Device getDevice() const override { return {TYPE, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {TYPE, 0});
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
Hooks hooks;

Tensor fresh(IntArrayRef size, ScalarType type) {
  return at::detail::empty_generic(size, &pool, KEYS, type, std::nullopt);
}

Tensor empty(IntArrayRef size, optional<ScalarType> type, optional<at::Layout>,
             optional<at::Device>, optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &pool, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<ScalarType> type,
                     optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &pool, KEYS,
                                           c10::dtype_or_default(type));
}

Tensor as_strided(const Tensor& a, IntArrayRef size, IntArrayRef stride,
                  optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(a, size, stride, offset);
}
Tensor view(const Tensor& a, IntArrayRef size) { return at::native::view(a, size); }
Tensor reshape_alias(const Tensor& a, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(a, size, stride);
}
const Tensor& resize_(const Tensor& a, IntArrayRef, optional<at::MemoryFormat>) { return a; }

Tensor of_product(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "mm: shapes");
  const Tensor out = fresh({a.size(0), b.size(1)}, a.scalar_type());
  return product(a, b, out), out;
}
Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  return product(a, b, out), out;
}
Tensor addmm(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  return of_product(a, b);
}
Tensor& addmm_out(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&,
                  Tensor& out) {
  return product(a, b, out), out;
}

Tensor of_two(const Tensor& a, const Tensor& b, ScalarType type) {
  launch();
  return fresh(a.sizes() == b.sizes() || !b.dim()
                   ? a.sizes()
                   : IntArrayRef(at::infer_size(a.sizes(), b.sizes())),
               type);
}
Tensor add(const Tensor& a, const Tensor& b, const Scalar&) {
  return of_two(a, b, at::result_type(a, b));
}
Tensor& add_out(const Tensor&, const Tensor&, const Scalar&, Tensor& out) {
  return launch(), out;
}
Tensor& add_(Tensor& a, const Tensor&, const Scalar&) { return launch(), a; }
Tensor multiply(const Tensor& a, const Tensor& b) {
  return of_two(a, b, at::result_type(a, b));
}
Tensor& multiply_out(const Tensor&, const Tensor&, Tensor& out) { return launch(), out; }
Tensor& multiply_(Tensor& a, const Tensor&) { return launch(), a; }
Tensor of_one(const Tensor& a) { return launch(), fresh(a.sizes(), a.scalar_type()); }
Tensor equal(const Tensor& a, const Scalar&) { return launch(), fresh(a.sizes(), at::kBool); }
Tensor masked_fill(const Tensor& a, const Tensor&, const Scalar&) { return of_one(a); }
Tensor& fill_(Tensor& a, const Scalar&) { return launch(), a; }
Tensor& zero_(Tensor& a) { return launch(), a; }
Tensor& random_from(Tensor& a, int64_t, optional<int64_t>, optional<at::Generator>) {
  return launch(), a;
}
Tensor& random_to(Tensor& a, int64_t, optional<at::Generator>) { return launch(), a; }
Tensor copy_from(const Tensor&, const Tensor& to, bool) { return launch(), to; }
Tensor copy_from_and_resize(const Tensor&, const Tensor& to) { return launch(), to; }
std::tuple<Tensor, Tensor> dropout(const Tensor& a, double, optional<bool>) {
  return {of_one(a), fresh(a.sizes(), at::kBool)};
}
Tensor dropout_backward(const Tensor& gradient, const Tensor&, double) {
  return of_one(gradient);
}
Scalar item(const Tensor&) { return 0; }
Tensor eye(int64_t n, optional<ScalarType> type, optional<at::Layout>, optional<at::Device>,
           optional<bool>) {
  return launch(), fresh({n, n}, c10::dtype_or_default(type));
}

Tensor of_sum(const Tensor& a, at::OptionalIntArrayRef dims, bool keep,
              optional<ScalarType> type) {
  auto size = a.sizes().vec();
  std::vector<bool> summed(size.size(), !dims.has_value() || dims->empty());
  if (dims.has_value())
    for (const int64_t dim : *dims) summed[dim < 0 ? dim + a.dim() : dim] = true;
  std::vector<int64_t> left;
  for (size_t i = 0; i < size.size(); ++i)
    if (!summed[i] || keep) left.push_back(summed[i] ? 1 : size[i]);
  launch();
  return fresh(left, type.value_or(a.scalar_type()));
}
Tensor& sum_out(const Tensor&, at::OptionalIntArrayRef, bool, optional<ScalarType>,
                Tensor& out) {
  return launch(), out;
}
Tensor norm(const Tensor& a, const Scalar&, at::OptionalIntArrayRef dims, bool keep,
            optional<ScalarType> type) {
  return of_sum(a, dims, keep, type);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("mm", of_product);
  m.impl("mm.out", mm_out);
  m.impl("addmm", addmm);
  m.impl("addmm.out", addmm_out);
  m.impl("add.Tensor", add);
  m.impl("add.out", add_out);
  m.impl("add_.Tensor", add_);
  m.impl("sub.Tensor", add);
  m.impl("mul.Tensor", multiply);
  m.impl("mul.out", multiply_out);
  m.impl("mul_.Tensor", multiply_);
  m.impl("div.Tensor", multiply);
  m.impl("neg", of_one);
  m.impl("eq.Scalar", equal);
  m.impl("masked_fill.Scalar", masked_fill);
  m.impl("fill_.Scalar", fill_);
  m.impl("zero_", zero_);
  m.impl("random_.from", random_from);
  m.impl("random_.to", random_to);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("native_dropout", dropout);
  m.impl("native_dropout_backward", dropout_backward);
  m.impl("sum.dim_IntList", of_sum);
  m.impl("sum.IntList_out", sum_out);
  m.impl("linalg_vector_norm", norm);
  m.impl("_local_scalar_dense", item);
  m.impl("eye", eye);
}

}  // namespace

namespace at::autocast {

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}

}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("costs", [](long launch, long product) {
    launch_ns = launch;
    product_ns = product;
  });
  m.def("counts", [] { return std::make_tuple(launches, products); });
  m.def("launch", launch);
  m.def("hold", [](bool on) {
    holding = on;
    notes.clear();
  });
  m.def("noted", [] { return notes; });
}
