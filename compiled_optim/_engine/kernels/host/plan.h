// A launch plan: which kernel updates which parameters, and the tables that each step fills.
#pragma once
#include "memory.h"
#include "rows.h"
#include "steps.h"

namespace {

using Kernel = void (*)(int64_t, void* const*, const int64_t*, const int32_t*, const double*, int64_t, int);

struct Table {  // what one call of a kernel updates
  std::vector<void*> cells;     // [tensor][parameter, gradient, buffers...]
  std::vector<int64_t> begins;  // [tensor], and the end
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
  at::ScalarType param_type;
  std::vector<at::ScalarType> types;  // of each buffer, in the order of `roles`
  std::vector<int64_t> itemsizes;     // the same in bytes
  std::vector<size_t> roles;          // which slot of an entry feeds each buffer
  int64_t itemsize;                   // of a parameter, in bytes
  int width;                          // 2 for complex parameters: the kernel sees pairs of reals
  Table table;                        // filled in each step
};

struct Turn {  // a parameter that shares memory, launched by itself
  int launch;
  Table table;
  Range gradient;          // where that must be copied first
  std::vector<char> copy;  // it
};

constexpr int kElsewhere = -1;  // another execution updates this parameter
constexpr int kStateless = -2;  // its state is made when its first gradient arrives

struct Entry {
  PyObject* param;
  int group, launch;
  bool fresh;
  int64_t elements = 0;                      // in this step
  const c10::TensorImpl* indices = nullptr;  // of its gradient in this step, if that is sparse
};

struct Layout {  // the keys of one parameter's state dictionary and the slot each fills (-1: not ours)
  std::vector<PyObject*> keys;
  std::vector<int> slots;
};

struct Tracked {
  PyObject* key;
  int64_t entry;
  int layout;
};

struct Plan {
  bool busy = false, sealed = false;
  size_t counts = 0;  // the first slots are the step count and what is carried beside it, or there are none
  std::vector<std::string> slot_names;
  std::vector<Launch> launches;
  std::vector<Entry> entries;  // parameters in the order of the param groups
  std::vector<int64_t> group_sizes;
  std::vector<Layout> layouts;
  std::vector<Tracked> tracked;  // the optimizer's state, in its order
  Memory memory;

  // filled in each step
  std::vector<PyObject*> slots;                // [entry][slot]
  std::vector<const c10::TensorImpl*> tensors;  // [entry][cell], the cells of `Memory`
  std::vector<size_t> updated;                 // entries
  std::vector<Turn> turns;                     // in the order of the entries
  Rows rows;                                   // of sparse gradients

  size_t cells() const { return Memory::kCounts0 + slot_names.size(); }
  ~Plan() {
    for (auto& layout : layouts)
      for (auto* key : layout.keys) Py_DECREF(key);
  }
};

// Of one that is `in_memory`, such as "the parameter of shape (5, 7) at index 3 of param group 0".
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
