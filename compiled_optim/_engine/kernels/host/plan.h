// A launch plan: which kernel updates which parameters, and the tables that each step fills.
#pragma once
#include "counts.h"
#include "rows.h"

namespace {

// What every backend compiles a rule to: one call updates all tensors of a table, or throws.
//   table: by [tensor][cell] the addresses of parameter, gradient and buffers. The cells of a launch `by_rows` go on with
//     the address of the int64 numbers of the rows that the gradient has, the elements of a row, and the rows that the
//     parameter has; those of a launch `on_device` end in the tagged addresses of the counts.
//   begins: where each tensor begins if all are laid end to end, in elements; and the end. By rows it has the elements of
//     its gradient.
//   rows: which row each tensor takes of `scalars` and `addresses`; ~row for one that is idle, whose cells are null.
//   scalars, addresses: both are `columns` wide, and a row may be longer than what the kernel reads of it. Where there
//     is an address, which is tagged, the number lies there and not in `scalars`. Only rows of launches `on_device` have
//     any: these hold the hyperparameters, then found_inf.
//   context: whatever else the backend needs, such as a number of threads, or a stream and the kernel's own memory.
// A tagged address is that of a float32 if its lowest bit is set, otherwise that of a float64.
using Kernel = void (*)(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                        const double* scalars, const void* const* addresses, int64_t columns, void* context);

struct Table {  // the arguments of one call
  std::vector<void*> cells;
  std::vector<int64_t> begins;
  std::vector<int32_t> rows;
  bool is_idle;  // whether nothing is updated

  void clear() {
    cells.clear();
    begins.assign(1, 0);
    rows.clear();
    is_idle = true;
  }
  void end_tensor(int64_t elements, int32_t row) {
    begins.push_back(begins.back() + elements);
    rows.push_back(row);
    is_idle = false;
  }
  void add_idle(size_t width, int64_t elements, int32_t row) {
    cells.resize(cells.size() + width);
    begins.push_back(begins.back() + elements);
    rows.push_back(~row);
  }
};

struct Launch {
  Kernel kernel;
  Plain plain;                        // what it can walk
  int64_t long_elements;              // a launch of this many is long: other threads run Python meanwhile
  at::ScalarType param_type, grad_type;
  std::vector<at::ScalarType> types;  // of each buffer, in the order of `roles`
  std::vector<int64_t> itemsizes;     // of each buffer, in bytes
  std::vector<size_t> roles;          // the slot that each buffer comes from
  int64_t itemsize, grad_itemsize;    // of a parameter and of a gradient, in bytes
  int width;                          // 2 for complex parameters, which the kernel sees as pairs of reals
  bool off_host;                      // its table should seldom change: parameters without gradient keep their places
  bool on_device;                     // the kernel reads and advances the counts, which lie where the parameters do
  bool by_rows;                       // all gradients are sparse, and the kernel takes their rows as they are
  bool scaled;                        // the kernel writes to the gradients, too
  uint8_t refused;                    // `Sharing` that it does not take
  size_t cells;                       // of a tensor in its table
  Table table;                        Counts expected;  // in the next step, if gradients come as in the last

  // filled in each step
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
  bool idle = false;                         // in this step, in which it has no gradient but a place in a table
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

  Counts expected;  // in the next step, if gradients come as in the last

  // filled in each step
  std::vector<PyObject*> slots;                // [entry][slot]
  std::vector<const c10::TensorImpl*> tensors;  // [entry][cell] with the cells of `Memory`
  std::vector<size_t> listed;                  // entries that have a place in a table
  std::vector<Turn> turns;                     // in the order of the entries
  Counts found;
  std::vector<HostCount> counters;             // that the host advances
  std::vector<double> counts_of_row;           // room for one row
  std::vector<double> next_counts;             // room for all
  TouchedRows touched;                         // by sparse gradients

  size_t cells() const { return Memory::kCounts0 + slot_names.size(); }

  // What stands for the param group in the rows of a launch `on_device`: (code, counts, numbers and tensors), where the
  // counts are zeros. If the state has none, there is the step instead, 1 or 2 as on the host.
  int code(const Entry& entry) const {
    return -1 - (entry.launch * static_cast<int>(group_sizes.size()) + entry.group);
  }
  // The launch of such a row; nullptr for a row of a param group, whose counts the host reads.
  const Launch* launch_of(int code) const {
    if (code >= 0) return nullptr;
    const auto launch = group_sizes.empty() ? launches.size() : static_cast<size_t>(-1 - int64_t{code}) / group_sizes.size();
    if (launch >= launches.size()) throw std::invalid_argument("a row names a launch that there is not");
    return &launches[launch];
  }
  ~Plan() {
    for (auto& known : state_keys)
      for (auto* key : known.keys) Py_DECREF(key);
  }
};

// Sets a Python error and returns nullptr for anything but a plan.
Plan* plan_of(PyObject* capsule) { return static_cast<Plan*>(PyCapsule_GetPointer(capsule, "compiled_optim.plan")); }

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
