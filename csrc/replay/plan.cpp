// How a plan is read from what Python noted, and how it is played.
#include "plan.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

namespace peftops {

namespace {

using Driver = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned, unsigned shared, void* stream, void** parameters,
                       void** extra);

// cuLaunchKernel of the driver, which Triton has loaded before.
Driver driver() {
  static const auto launch = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    return library ? (Driver)dlsym(library, "cuLaunchKernel") : nullptr;
  }();
  if (!launch) throw std::runtime_error("peftops: libcuda.so.1 has no cuLaunchKernel");
  return launch;
}

// The handle of the current stream. A replay asks torch for it once.
const py::object& stream(const Slots& slots) {
  if (!slots.stream) {
    const Torch& torch = Torch::get();
    const auto function = own(PyObject_GetAttr(torch.inside.ptr(), torch.stream.ptr()));
    slots.stream =
        own(PyObject_CallOneArg(function.ptr(), own(PyLong_FromLong(slots.device[1])).ptr()));
  }
  return slots.stream;
}

// tensor: null for a part of a scratch
void add(Slots& slots, PyObject* tensor, char* start) {
  if (slots.count == Slots::MOST)
    throw std::runtime_error("peftops: a plan of too many tensors");
  slots.tensors[slots.count] = tensor;
  slots.starts[slots.count++] = start;
}

}  // namespace

Operand::Operand(const py::tuple& spec) {
  static const std::map<std::string, Source> sources = {
      {"constant", CONSTANT}, {"slot", SLOT}, {"turned", TURNED},
      {"strided", STRIDED},   {"list", LIST}, {"stream", STREAM}};
  source = sources.at(spec[0].cast<std::string>());
  if (source == CONSTANT) constant = spec[1];
  if (source == SLOT || source == TURNED || source == STRIDED) slot = spec[1].cast<int>();
  if (source == STRIDED) constant = spec[2];
  if (source == LIST)
    for (const auto item : spec[1]) items.emplace_back(item.cast<py::tuple>());
}

py::object Operand::make(const Slots& slots) const {
  const Torch& torch = Torch::get();
  switch (source) {
    case SLOT:
      return py::reinterpret_borrow<py::object>(slots.tensors[slot]);
    case TURNED:
      return own(PyObject_GetAttr(slots.tensors[slot], torch.turned.ptr()));
    case STRIDED: {
      const auto tuple = constant.ptr();
      return own(PyObject_CallFunctionObjArgs(
          torch.as_strided.ptr(), slots.tensors[slot], PyTuple_GET_ITEM(tuple, 0),
          PyTuple_GET_ITEM(tuple, 1), PyTuple_GET_ITEM(tuple, 2), nullptr));
    }
    case LIST: {
      auto list = own(PyList_New(items.size()));
      for (size_t i = 0; i < items.size(); ++i)
        PyList_SET_ITEM(list.ptr(), i, items[i].make(slots).release().ptr());
      return list;
    }
    case STREAM:
      return stream(slots);
    default:
      return constant;
  }
}

Call::Call(const py::tuple& spec) : function(spec[1]), names(spec[3]) {
  for (const auto operand : spec[2]) operands.emplace_back(operand.cast<py::tuple>());
}

void Call::run(const Slots& slots) const {
  std::vector<py::object> made;
  std::vector<PyObject*> args;
  made.reserve(operands.size());
  args.reserve(operands.size());
  for (const auto& operand : operands) {
    made.push_back(operand.make(slots));
    args.push_back(made.back().ptr());
  }
  PyObject* named = names.is_none() ? nullptr : names.ptr();
  const size_t positional = args.size() - (named ? PyTuple_GET_SIZE(named) : 0);
  own(PyObject_Vectorcall(function.ptr(), args.data(), positional, named));
}

Launch::Launch(const py::tuple& spec) {
  function = (void*)spec[1].cast<uint64_t>();
  for (int i = 0; i < 3; ++i) grid[i] = spec[2].cast<py::tuple>()[i].cast<unsigned>();
  threads = spec[3].cast<unsigned>();
  shared = spec[4].cast<unsigned>();
  values = spec[5].cast<std::vector<uint64_t>>();
  if (values.size() > MOST)
    throw std::runtime_error("peftops: a kernel of too many parameters");
  for (const auto pointer : spec[6]) {
    const auto [parameter, slot, offset] = pointer.cast<std::tuple<int, int, int64_t>>();
    pointers.push_back({parameter, slot, offset});  // in the order of the fields
  }
}

void Launch::run(const Slots& slots) const {
  uint64_t held[MOST];
  void* parameters[MOST];
  for (size_t i = 0; i < values.size(); ++i) {
    held[i] = values[i];
    parameters[i] = held + i;
  }
  for (const auto& pointer : pointers)
    held[pointer.parameter] = (uint64_t)slots.starts[pointer.slot] + pointer.offset;
  void* handle = PyLong_AsVoidPtr(stream(slots).ptr());
  const auto launch = driver();
  PyThreadState* state = PyEval_SaveThread();  // the driver waits if its queue is full
  const int code = launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, handle,
                          parameters, nullptr);
  PyEval_RestoreThread(state);
  if (code)
    throw std::runtime_error("peftops: a launch failed with CUDA error " +
                             std::to_string(code));
}

Fresh::Fresh(const py::object& spec) {
  if (!py::isinstance<py::tuple>(spec)) {
    shared = spec;
    return;
  }
  const auto pair = spec.cast<py::tuple>();
  place = pair[0];
  options = pair[1];
}

py::object Fresh::make() const {
  if (shared) return shared;
  return own(PyObject_Call(Torch::get().empty.ptr(), place.ptr(), options.ptr()));
}

Plan::Plan(py::list outputs, bool single, py::list temporaries, py::object scratch,
           py::list steps, py::object unless, py::object kept)
    : outputs(outputs.size()), single(single), unless(unless), kept(kept) {
  for (const auto& specs : {outputs, temporaries})
    for (const auto spec : specs) fresh.emplace_back(py::reinterpret_borrow<py::object>(spec));
  if (!scratch.is_none()) {
    const auto pair = scratch.cast<py::tuple>();
    fresh.emplace_back(pair[0]);
    offsets = pair[1].cast<std::vector<int64_t>>();
  }
  for (const auto step : steps) {
    const auto spec = step.cast<py::tuple>();
    if (spec[0].cast<std::string>() == "call")
      this->steps.push_back(std::make_unique<Call>(spec));
    else
      this->steps.push_back(std::make_unique<Launch>(spec));
  }
}

bool Plan::allowed() const {
  if (unless.is_none()) return true;
  const auto answer = own(PyObject_CallNoArgs(unless.ptr()));
  return answer.ptr() == Py_False;
}

py::object Plan::play(const Arguments& arguments) const {
  Slots slots;
  slots.device = arguments.device;
  for (int i = 0; i < arguments.count; ++i)
    add(slots, arguments.tensors[i], arguments.starts[i]);
  std::vector<py::object> made;
  made.reserve(fresh.size());
  for (const auto& tensor : fresh) {
    made.push_back(tensor.make());
    DLTensor t;
    if (Torch::get().exchange->look(made.back().ptr(), &t)) throw py::error_already_set();
    const bool is_scratch = !offsets.empty() && made.size() == fresh.size();
    if (is_scratch)
      for (const int64_t offset : offsets) add(slots, nullptr, t.start() + offset);
    else
      add(slots, made.back().ptr(), t.start());
  }
  for (const auto& step : steps) step->run(slots);
  if (single) return made[0];
  if (!outputs) return py::none();
  auto result = own(PyTuple_New(outputs));
  for (size_t i = 0; i < outputs; ++i)
    PyTuple_SET_ITEM(result.ptr(), i, made[i].release().ptr());
  return result;
}

}  // namespace peftops
