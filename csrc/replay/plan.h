// A plan: what an op's launcher did for one kind of arguments, as steps that run without it.
#pragma once
#include <memory>
#include <vector>

#include "arguments.h"

namespace peftops {

// Tensors by number: the op's own, its outputs, temporaries that calls need, and parts of a
// scratch, which have a start alone.
struct Slots {
  static constexpr int MOST = 128;
  PyObject* tensors[MOST];  // borrowed
  char* starts[MOST];
  int count = 0;
  const int32_t* device;
  mutable py::object stream;  // of this replay, once somebody has asked for it
};

// An argument of a call, made anew for each.
struct Operand {
  enum Kind { CONSTANT, SLOT, TURNED, STRIDED, LIST, STREAM } kind;
  int slot = 0;
  py::object constant;  // of STRIDED: (size, stride, offset) in elements
  std::vector<Operand> items;

  explicit Operand(const py::tuple& told);
  py::object make(const Slots& slots) const;
};

struct Step {
  virtual ~Step() = default;
  virtual void run(const Slots& slots) const = 0;
};

// function(*operands), the last of which have names.
struct Call : Step {
  py::object function, names;
  std::vector<Operand> operands;

  explicit Call(const py::tuple& told);
  void run(const Slots& slots) const override;
};

// A kernel's launch by the driver.
struct Launch : Step {
  static constexpr int MOST = 96;
  struct Pointer {
    int parameter, slot;
    int64_t offset;
  };
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<uint64_t> values;  // 8 bytes for each parameter
  std::vector<Pointer> pointers;

  explicit Launch(const py::tuple& told);
  void run(const Slots& slots) const override;
};

// A tensor that torch.empty_strided makes in each replay, or one that all replays share, as it
// has no elements.
struct Fresh {
  py::object place, options, shared;  // place: (shape, strides)

  explicit Fresh(const py::object& told);
  py::object make() const;
};

class Plan {
 public:
  // outputs, temporaries: [((shape, strides), options) or a tensor]; scratch: None, or a
  // temporary and the offsets of its parts. steps: [("call", function, operands, names) or
  // ("launch", function, grid, threads, shared, values, pointers)]. unless: None, or a function
  // that says whether somebody has to see the launches; kept: what has to stay alive.
  Plan(py::list outputs, bool single, py::list temporaries, py::object scratch, py::list steps,
       py::object unless, py::object kept);
  bool allowed() const;
  py::object play(const Arguments& given) const;

 private:
  std::vector<Fresh> fresh;  // outputs, temporaries, scratch
  size_t outputs;
  bool single;
  std::vector<int64_t> parts;  // of the scratch, which is the last of fresh where there are any
  std::vector<std::unique_ptr<Step>> steps;
  py::object unless, kept;
};

}  // namespace peftops
