// A launch plan: which kernel updates which parameters, and the tables that each step fills.
#pragma once
#include "memory.h"
#include "rows.h"
#include "steps.h"

namespace {

// What every backend compiles a rule to: one call updates all tensors of a table.
//   table: addresses by [tensor][parameter, gradient, buffers...].
//   begins: where each tensor begins if all are laid end to end, in elements; and the end.
//   rows: which row of `scalars` each tensor takes. A row is `columns` wide and may hold more than the kernel reads.
//   context: whatever else the backend needs, such as a number of threads, or a stream and the kernel's own memory.
using Kernel = void (*)(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                        const double* scalars, int64_t columns, void* context);

struct Table {  // the arguments of one call
  std::vector<void*> cells;
  std::vector<int64_t> begins;
  std::vector<int32_t> rows;

  void clear() {
    cells.clear();
    begins.assign(1, 0);
    rows.clear();
  }
  void end_tensor(int64_t elements, int32_t row) {
    begins.push_back(begins.back() + elements);
    rows.push_back(row);
  }
};

struct Launch {
  Kernel kernel;
  Plain plain;                        // what it can walk
  int64_t long_elements;              // a launch of this many is long: other threads run Python meanwhile
  at::ScalarType param_type;
  std::vector<at::ScalarType> types;  // of each buffer, in the order of `roles`
  std::vector<int64_t> itemsizes;     // of each buffer, in bytes
  std::vector<size_t> roles;          // the slot that each buffer comes from
  int64_t itemsize;                   // of a parameter, in bytes
  int width;                          // 2 for complex parameters, which the kernel sees as pairs of reals
  Table table;                        // filled in each step
  void* context = nullptr;            // set in each step
};

struct Turn {  // a parameter that shares memory and is launched by itself
  int launch;
  Table table;
  Range gradient;          // is copied first, if it has elements
  std::vector<char> copy;  // of the gradient
};

// What an entry has instead of the index of a launch.
constexpr int kNoLaunch = -1;  // it is updated without a kernel
constexpr int kNoState = -2;   // it had no gradient yet, so it has no state

struct Entry {
  PyObject* param;
  int group, launch;
  bool fresh;
  int64_t elements = 0;                      // in this step
  const c10::TensorImpl* indices = nullptr;  // of a gradient that is sparse in this step
};

struct StateKeys {  // the keys of one parameter's state dictionary and the slot that each fills (-1: none)
  std::vector<PyObject*> keys;
  std::vector<int> slots;
};

struct Tracked {
  PyObject* key;
  int64_t entry;
  int keys;  // the index of its StateKeys
};

struct Plan {
  bool busy = false, sealed = false;
  size_t counts = 0;  // how many of the first slots are the step count and recurrent scalars
  std::vector<std::string> slot_names;
  std::vector<Launch> launches;
  std::vector<Entry> entries;  // parameters in the order of the param groups
  std::vector<int64_t> group_sizes;
  std::vector<StateKeys> state_keys;
  std::vector<Tracked> tracked;  // the keys of the optimizer's state, in its order
  Memory memory;

  // filled in each step
  std::vector<PyObject*> slots;                // [entry][slot]
  std::vector<const c10::TensorImpl*> tensors;  // [entry][cell] with the cells of `Memory`
  std::vector<size_t> updated;                 // entries
  std::vector<Turn> turns;                     // in the order of the entries
  TouchedRows touched;                         // by sparse gradients

  size_t cells() const { return Memory::kCounts0 + slot_names.size(); }
  ~Plan() {
    for (auto& known : state_keys)
      for (auto* key : known.keys) Py_DECREF(key);
  }
};

// Of a parameter that is `in_memory`, such as "the parameter of shape (5, 7) at index 3 of param group 0".
std::string name(const Plan* plan, size_t entry) {
  const auto& e = plan->entries[entry];
  for (int g = 0; g < e.group; g++) entry -= plan->group_sizes[g];
  std::string shape;
  const auto sizes = in_memory(e.param)->sizes();
  for (auto size : sizes) shape += std::to_string(size) + ", ";
  if (!sizes.empty()) shape.resize(shape.size() - (sizes.size() > 1 ? 2 : 1));  // as Python writes a tuple
  return "the parameter of shape (" + shape + ") at index " + std::to_string(entry) + " of param group " +
         std::to_string(e.group);
}

}  // namespace
