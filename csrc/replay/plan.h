// A plan: what an op's launcher did for one set of arguments, as steps that run without the
// launcher. peftops/_replay.py notes the steps and makes the plan.
#pragma once
#include <memory>
#include <vector>

#include "arguments.h"

namespace peftops {

// The tensors of one replay, by number: the op's arguments, its outputs, temporaries that calls
// need, and parts of a scratch. A part of a scratch has a start but no tensor object.
struct Slots {
  static constexpr int MOST = 128;
  PyObject* tensors[MOST];  // borrowed references
  char* starts[MOST];       // the first element of each
  int count = 0;
  const int32_t* device;      // DLPack's type and index
  mutable py::object stream;  // the current stream; null until a step asks for it
};

// An argument of a Python call. It is made anew in each replay.
struct Operand {
  enum Source {
    CONSTANT,  // the same object in every replay
    SLOT,      // the tensor of a slot
    TURNED,    // its transpose
    STRIDED,   // a view of it by torch.as_strided
    LIST,      // a list of operands
    STREAM     // the handle of the current stream
  } source;
  int slot = 0;
  py::object constant;         // of STRIDED: (size, stride, offset) in elements
  std::vector<Operand> items;  // of LIST

  // spec: (source's name, what it needs)
  explicit Operand(const py::tuple& spec);
  py::object make(const Slots& slots) const;
};

// Something that the launcher did.
struct Step {
  virtual ~Step() = default;
  virtual void run(const Slots& slots) const = 0;
};

// A Python call function(*operands), whose last operands are passed by name.
struct Call : Step {
  py::object function;
  py::object names;  // of the last operands; None if there are none
  std::vector<Operand> operands;

  // spec: ("call", function, operands, names)
  explicit Call(const py::tuple& spec);
  void run(const Slots& slots) const override;
};

// The launch of a Triton kernel by the CUDA driver.
struct Launch : Step {
  static constexpr int MOST = 96;  // parameters of a kernel
  // A parameter that points into the memory of a slot.
  struct Pointer {
    int parameter;   // its number
    int slot;        // whose start it is relative to
    int64_t offset;  // in bytes
  };
  void* function;  // the driver's handle of the kernel
  unsigned grid[3];
  unsigned threads;              // of a block
  unsigned shared;               // bytes of shared memory
  std::vector<uint64_t> values;  // of parameters, 8 bytes each; those of pointers are replaced
  std::vector<Pointer> pointers;

  // spec: ("launch", function, grid, threads, shared, values, pointers)
  explicit Launch(const py::tuple& spec);
  void run(const Slots& slots) const override;
};

// A tensor that torch.empty_strided makes in each replay. A tensor without elements is shared
// by all replays instead.
struct Fresh {
  py::object place;    // (shape, strides)
  py::object options;  // dtype and device, by name
  py::object shared;   // the tensor that all replays share, or null

  // spec: (place, options) or the shared tensor
  explicit Fresh(const py::object& spec);
  py::object make() const;
};

class Plan {
 public:
  // outputs, temporaries: lists of what Fresh takes.
  // single: the op returns its one output instead of a tuple; one without outputs returns None.
  // scratch: None, or (what Fresh takes, the offsets of its parts in bytes).
  // steps: list of what Call and Launch take.
  // unless: None, or a function that returns True if something has to see the launches, such as
  // a profiler's hook.
  // kept: an object that has to stay alive as long as the plan.
  Plan(py::list outputs, bool single, py::list temporaries, py::object scratch, py::list steps,
       py::object unless, py::object kept);
  bool allowed() const;                               // whether the plan may be played now
  py::object play(const Arguments& arguments) const;  // returns what the op returns

 private:
  std::vector<Fresh> fresh;      // outputs, then temporaries, then the scratch if there is one
  size_t outputs;                // how many of them are outputs
  bool single;                   // see the constructor
  std::vector<int64_t> offsets;  // of the scratch's parts; empty if there is no scratch
  std::vector<std::unique_ptr<Step>> steps;
  py::object unless;
  py::object kept;
};

}  // namespace peftops
