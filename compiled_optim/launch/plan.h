// The tables of a launch plan, and how they are filled from the live parameters, gradients and state in each step.
#pragma once
#include "rows.h"
#include "steps.h"
#include "tensors.h"

namespace {

using Kernel = void (*)(int64_t, void* const*, const int64_t*, const int32_t*, const double*, int64_t, int);

struct Launch {
  Kernel kernel;
  at::ScalarType param_type;
  std::vector<at::ScalarType> types;  // of each buffer, in the order of `roles`
  std::vector<int> roles;             // which slot of an entry feeds each buffer
  int width;                          // 2 for complex parameters: the kernel sees pairs of reals
  // filled in each step
  std::vector<void*> table;  // [tensor][parameter, gradient, buffers...]
  std::vector<c10::TensorImpl*> tensors;  // the same, for their reference and version counts
  std::vector<int64_t> begins;
  std::vector<int32_t> rows;
};

constexpr int kElsewhere = -1;  // another execution updates this parameter
constexpr int kStateless = -2;  // its state is made when its first gradient arrives

struct Entry {
  PyObject* param;
  int group, launch;
  bool fresh;
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
  bool busy = false;
  size_t counts = 0;  // the first slots are the step count and what is carried beside it, or there are none
  std::vector<std::string> slot_names;
  std::vector<Launch> launches;
  std::vector<Entry> entries;           // parameters in the order of the param groups
  std::vector<int64_t> group_sizes;
  std::vector<Layout> layouts;
  std::vector<Tracked> tracked;         // the optimizer's state, in its order
  std::vector<PyObject*> slots;         // [entry][slot], filled in each step
  Rows rows;                            // of sparse gradients, gathered in each step
  ~Plan() {
    for (auto& layout : layouts)
      for (auto* key : layout.keys) Py_DECREF(key);
  }
};

// Fills `slots` from the live state; false where the state is no longer laid out as it was.
bool collect_state(Plan* plan, PyObject* state) {
  PyObject *key, *value, *name, *tensor;
  Py_ssize_t at = 0;
  size_t i = 0, width = plan->slot_names.size();
  while (PyDict_Next(state, &at, &key, &value)) {
    if (i == plan->tracked.size() || plan->tracked[i].key != key) return false;
    const auto& tracked = plan->tracked[i++];
    if (tracked.entry < 0) continue;
    const auto& layout = plan->layouts[tracked.layout];
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != static_cast<Py_ssize_t>(layout.keys.size())) return false;
    Py_ssize_t inner = 0;
    for (size_t k = 0; PyDict_Next(value, &inner, &name, &tensor); k++) {
      if (layout.keys[k] != name) return false;
      if (layout.slots[k] >= 0) plan->slots[tracked.entry * width + layout.slots[k]] = tensor;
    }
  }
  return i == plan->tracked.size();
}

bool same_params(const Plan* plan, PyObject* groups) {
  if (PyTuple_GET_SIZE(groups) != static_cast<Py_ssize_t>(plan->group_sizes.size())) return false;
  size_t at = 0;
  for (size_t g = 0; g < plan->group_sizes.size(); g++) {
    PyObject* list = PyTuple_GET_ITEM(groups, g);
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != plan->group_sizes[g]) return false;
    for (Py_ssize_t i = 0; i < plan->group_sizes[g]; i++)
      if (PyList_GET_ITEM(list, i) != plan->entries[at++].param) return false;
  }
  return true;
}

// A 0-d state tensor, and the row that has its new value.
struct Count {
  c10::TensorImpl* tensor;
  int32_t row;
  size_t slot;
};

// Fills the tables of all launches. Returns nullptr, or what no longer holds.
const char* fill(Plan* plan, PyObject* state, PyObject* stand_ins, Steps& steps, std::vector<Count>& counters,
                 std::vector<Entry*>& fresh) {
  std::unordered_map<PyObject*, PyObject*> stand_in_of;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(stand_ins); i++) {
    PyObject* tuple = PyList_GET_ITEM(stand_ins, i);
    stand_in_of[PyTuple_GET_ITEM(tuple, 0)] = tuple;
  }
  if (!collect_state(plan, state)) return "the optimizer's state changed";
  const size_t width = plan->slot_names.size();
  std::vector<double> values(steps.width);
  plan->rows.begin();
  for (auto& launch : plan->launches) {
    launch.table.clear();
    launch.tensors.clear();
    launch.begins.assign(1, 0);
    launch.rows.clear();
  }
  for (size_t e = 0; e < plan->entries.size(); e++) {
    auto& entry = plan->entries[e];
    if (entry.launch == kElsewhere) continue;
    const auto* object = unpack(entry.param);
    if (!object) return "a parameter changed its type";
    const auto* param = object->unsafeGetTensorImpl();
    const auto* grad = gradient(param);
    const auto stand_in = stand_in_of.empty() ? stand_in_of.end() : stand_in_of.find(entry.param);
    if (!grad && stand_in == stand_in_of.end()) continue;
    if (entry.launch == kStateless) return "a parameter received its first gradient";
    auto& launch = plan->launches[entry.launch];
    if (!plain(param) || !param->is_non_overlapping_and_dense() ||
        c10::typeMetaToScalarType(param->dtype()) != launch.param_type)
      return "a parameter changed";
    const c10::TensorImpl* indices = nullptr;
    if (stand_in != stand_in_of.end()) {
      grad = unpack(PyTuple_GET_ITEM(stand_in->second, 1))->unsafeGetTensorImpl();
      if (PyTuple_GET_SIZE(stand_in->second) == 3)
        indices = unpack(PyTuple_GET_ITEM(stand_in->second, 2))->unsafeGetTensorImpl();
    }
    if (!(indices ? rows_fit(indices, grad, launch.param_type, param) : fits(grad, launch.param_type, param)))
      return "a gradient changed its layout or dtype";
    values[0] = entry.fresh ? 1 : 2;
    PyObject** slots = plan->slots.data() + e * width;
    for (size_t c = 0; c < plan->counts; c++) {
      const auto* count = slots[c] ? unpack(slots[c]) : nullptr;
      if (!is_count(count)) return "a step count changed";
      counters.push_back({count->unsafeGetTensorImpl(), 0, c});
      values[c] = read_count(counters.back().tensor) + (c == 0);
    }
    const int32_t row = steps.row(entry.group, values.data());
    for (size_t c = 0; c < plan->counts; c++) counters[counters.size() - 1 - c].row = row;
    const size_t first = launch.table.size();
    launch.table.insert(launch.table.end(), {address(param), const_cast<void*>(grad->data())});
    launch.tensors.insert(launch.tensors.end(),
                          {const_cast<c10::TensorImpl*>(param), const_cast<c10::TensorImpl*>(grad)});
    for (size_t b = 0; b < launch.roles.size(); b++) {
      PyObject* slot = slots[launch.roles[b]];
      const auto* buffer = slot ? unpack(slot) : nullptr;
      if (!buffer || !fits(buffer->unsafeGetTensorImpl(), launch.types[b], param)) return "a state tensor changed";
      launch.table.push_back(address(buffer->unsafeGetTensorImpl()));
      launch.tensors.push_back(buffer->unsafeGetTensorImpl());
    }
    if (!indices) {
      launch.begins.push_back(launch.begins.back() + param->numel() * launch.width);
      launch.rows.push_back(row);
    } else {  // one entry of the table for each span of rows
      const std::vector<void*> whole(launch.table.begin() + first, launch.table.end());
      launch.table.resize(first);
      for (const auto& span : plan->rows.gather(indices, grad, param)) {
        for (size_t c = 0; c < whole.size(); c++) {
          const size_t itemsize = c < 2 ? grad->itemsize() : c10::elementSize(launch.types[c - 2]);
          char* at = static_cast<char*>(whole[c]) + span.first * static_cast<int64_t>(itemsize);
          launch.table.push_back(c == 1 ? span.values : at);
        }
        launch.begins.push_back(launch.begins.back() + span.elements);
        launch.rows.push_back(row);
      }
    }
    if (entry.fresh) fresh.push_back(&entry);
  }
  return nullptr;
}

}  // namespace
