// What a step does before it writes: it takes every tensor from where Python keeps it now, checks it, and fills the
// tables.
#pragma once
#include "steps.h"

namespace {

// Fills `slots` from the live state. Returns false if the keys of the state are no longer the same.
bool collect_state(Plan* plan, PyObject* state) {
  PyObject *key, *value, *name, *tensor;
  Py_ssize_t at = 0;
  size_t i = 0, width = plan->slot_names.size();
  while (PyDict_Next(state, &at, &key, &value)) {
    if (i == plan->tracked.size() || plan->tracked[i].key != key) return false;
    const auto& tracked = plan->tracked[i++];
    if (tracked.entry < 0) continue;
    const auto& known = plan->state_keys[tracked.keys];
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != static_cast<Py_ssize_t>(known.keys.size())) return false;
    Py_ssize_t inner = 0;
    for (size_t k = 0; k < known.keys.size(); k++) {
      if (!PyDict_Next(value, &inner, &name, &tensor) || known.keys[k] != name) return false;
      if (known.slots[k] >= 0) plan->slots[tracked.entry * width + known.slots[k]] = tensor;
    }
  }
  return i == plan->tracked.size();
}

bool same_params(const Plan* plan, const std::vector<Owned>& lists) {
  if (lists.size() != plan->group_sizes.size()) return false;
  size_t at = 0;
  for (size_t g = 0; g < lists.size(); g++) {
    PyObject* list = lists[g];
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != plan->group_sizes[g]) return false;
    for (Py_ssize_t i = 0; i < plan->group_sizes[g]; i++)
      if (PyList_GET_ITEM(list, i) != plan->entries[at++].param) return false;
  }
  return true;
}

struct Substitute {
  PyObject* gradient;
  PyObject* indices = nullptr;  // of a sparse one
};
using SubstituteGrads = std::unordered_map<PyObject*, Substitute>;  // by parameter

bool read_substitutes(PyObject* list, SubstituteGrads& found) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
    PyObject* tuple = PyList_GET_ITEM(list, i);
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < 2 || PyTuple_GET_SIZE(tuple) > 3) return false;
    found[PyTuple_GET_ITEM(tuple, 0)] = {PyTuple_GET_ITEM(tuple, 1),
                                         PyTuple_GET_SIZE(tuple) == 3 ? PyTuple_GET_ITEM(tuple, 2) : nullptr};
  }
  return true;
}

// Not inlined, so that it takes no room in what runs in each step.
[[noreturn, gnu::cold, gnu::noinline]] void throw_short(const Plan* plan, size_t entry, const c10::TensorImpl* t,
                                                        size_t cell, const char* what = "gradient") {
  const int64_t needed = bytes_needed(t, reach(t), static_cast<int64_t>(t->itemsize()));
  const std::string part = cell == Memory::kGradient ? what
                           : cell == Memory::kParam  ? "data"
                                                     : "state '" + plan->slot_names[cell - Memory::kCounts0] + "'";
  throw std::runtime_error("the " + part + " of " + name(plan, entry) + " needs a storage of " +
                           std::to_string(needed) + " bytes, and its storage has " +
                           std::to_string(t->storage().nbytes()));
}

// Notes where a tensor lies, and throws if its storage does not hold it. Resizing a storage moves it, so a tensor that
// has not moved is not asked again; only a gradient is, because it may be another tensor in each step.
[[gnu::always_inline]] inline void note(Plan* plan, size_t entry, size_t cell, const c10::TensorImpl* t,
                                        int64_t elements, int64_t itemsize) {
  const Range now = range(t, elements, itemsize, cell == Memory::kGradient);
  const bool has_moved = !(now == plan->memory.at(entry, cell));
  if ((has_moved || cell == Memory::kGradient) && !is_whole(t, elements, itemsize)) throw_short(plan, entry, t, cell);
  if (!has_moved) return;
  plan->memory.note(entry, cell, now, cell == Memory::kGradient && is_sole_owner(const_cast<c10::TensorImpl*>(t)));
}

void note(Plan* plan, size_t entry, size_t cell, const c10::TensorImpl* t) {
  note(plan, entry, cell, t, reach(t), static_cast<int64_t>(t->itemsize()));
}

// Notes where the tensors lie of a parameter that is updated after the launch.
void note_eager(Plan* plan, size_t e, PyObject* given) {
  const auto* param = in_memory(plan->entries[e].param);
  const auto* grad = given ? in_memory(given) : param ? gradient(param) : nullptr;
  if (!param || !grad) return plan->memory.skip(e);
  note(plan, e, Memory::kParam, param);
  if (in_memory(grad)) note(plan, e, Memory::kGradient, grad);
  PyObject** slots = plan->slots.data() + e * plan->slot_names.size();
  for (size_t s = 0; s < plan->slot_names.size(); s++)
    if (const auto* t = in_memory(slots[s])) note(plan, e, Memory::kCounts0 + s, t);
}

// Why a gradient no longer fits; throws if its storage does not hold it, because Python then does not copy it.
const char* odd_gradient(const Plan* plan, size_t entry, const c10::TensorImpl* grad) {
  if (in_memory(grad) && !is_whole(grad)) throw_short(plan, entry, grad, Memory::kGradient);
  return "a gradient changed its layout or dtype";
}

// Checks all that this step updates and notes where it lies. Returns nullptr, or why the plan no longer fits.
const char* collect(Plan* plan, PyObject* state, const SubstituteGrads& substitutes) {
  if (!collect_state(plan, state)) return "the optimizer's state changed";
  const size_t slot_count = plan->slot_names.size(), cells = plan->cells();
  plan->listed.clear();
  for (size_t e = 0; e < plan->entries.size(); e++) {
    auto& entry = plan->entries[e];
    const Substitute* substitute = nullptr;
    if (!substitutes.empty())
      if (auto found = substitutes.find(entry.param); found != substitutes.end()) substitute = &found->second;
    if (entry.launch == kNoLaunch) {
      note_eager(plan, e, substitute ? substitute->gradient : nullptr);
      continue;
    }
    const auto* object = unpack(entry.param);
    if (!object) return "a parameter changed its type";
    const auto* param = object->unsafeGetTensorImpl();
    const auto* grad = gradient(param);
    entry.indices = nullptr;
    if (substitute) {
      const auto* values = unpack(substitute->gradient);
      const auto* indices = substitute->indices ? unpack(substitute->indices) : nullptr;
      if (!values || (substitute->indices && !indices)) return "a gradient changed its type";
      grad = values->unsafeGetTensorImpl();
      if (indices) entry.indices = indices->unsafeGetTensorImpl();
    }
    entry.idle = !grad;
    if (!grad) {
      plan->memory.skip(e);
      if (entry.launch >= 0 && plan->launches[entry.launch].off_host) plan->listed.push_back(e);
      continue;
    }
    if (entry.launch == kNoState) return "a parameter received its first gradient";
    const auto& launch = plan->launches[entry.launch];
    if (!entry.indices && launch.by_rows) return "a gradient became dense";
    if (entry.indices && !launch.by_rows && launch.off_host) return "a gradient became sparse";
    if (!launch.plain(param) || !param->is_non_overlapping_and_dense() ||
        c10::typeMetaToScalarType(param->dtype()) != launch.param_type)
      return "a parameter changed";
    if (!(entry.indices ? rows_fit(launch.plain, entry.indices, grad, launch.grad_type, param, launch.by_rows)
                        : fits(launch.plain, grad, launch.grad_type, param)))
      return odd_gradient(plan, e, grad);
    // An entry fills the same cells in each step. Its tensors have no gaps, so their reach is their number of elements.
    const auto** tensors = plan->tensors.data() + e * cells;
    auto take = [&](size_t cell, const c10::TensorImpl* t, int64_t elements, int64_t itemsize) __attribute__((always_inline)) {
      tensors[cell] = t;
      note(plan, e, cell, t, elements, itemsize);
    };
    const int64_t elements = param->numel();
    const int64_t given = entry.indices ? grad->numel() : elements;
    entry.elements = launch.by_rows ? given : elements;
    take(Memory::kParam, param, elements, launch.itemsize);
    if (launch.scaled) address(grad);  // memory of its own, because it is written to
    take(Memory::kGradient, grad, given, launch.grad_itemsize);
    if (entry.indices && !is_whole(entry.indices)) throw_short(plan, e, entry.indices, Memory::kGradient, "gradient's index");
    PyObject** slots = plan->slots.data() + e * slot_count;
    for (size_t c = 0; c < plan->counts; c++) {
      const auto* count = slots[c] ? unpack(slots[c]) : nullptr;
      if (!is_number(count, launch.on_device ? launch.plain : on_host)) return "a step count changed";
      take(Memory::kCounts0 + c, count->unsafeGetTensorImpl(), 1, count->scalar_type() == at::kFloat ? 4 : 8);
    }
    for (size_t b = 0; b < launch.roles.size(); b++) {
      PyObject* slot = slots[launch.roles[b]];
      const auto* buffer = slot ? unpack(slot) : nullptr;
      if (!buffer || !fits(launch.plain, buffer->unsafeGetTensorImpl(), launch.types[b], param)) return "a state tensor changed";
      take(Memory::kCounts0 + launch.roles[b], buffer->unsafeGetTensorImpl(), elements, launch.itemsizes[b]);
    }
    plan->listed.push_back(e);
  }
  return nullptr;
}

// The step count as the parameters before leave it: two parameters may share one.
double counted(const Plan* plan, const HostCount& count) {
  for (auto c = plan->counters.rbegin(); c != plan->counters.rend(); c++)
    if (c->slot == 0 && c->at == count.at) return count.rounded(plan->found.of(c->row)[0]);
  return count.read();
}

// The row that an entry takes. What the host reads for it is added to the counters.
inline int32_t row_of(Plan* plan, size_t e, bool shares_count) {
  const auto& entry = plan->entries[e];
  double* counts = plan->counts_of_row.data();
  counts[0] = entry.fresh ? 1 : 2;
  if (plan->launches[entry.launch].on_device) {
    if (plan->counts) std::fill_n(counts, plan->found.width, 0);
    return plan->found.row(plan->code(entry), counts);
  }
  if (entry.idle) return 0;  // any: a launch of which nothing is updated is left out
  for (size_t c = 0; c < plan->counts; c++) {
    const HostCount count{plan->memory.at(e, Memory::kCounts0 + c), 0, c};
    counts[c] = shares_count && c == 0 ? counted(plan, count) : count.read();
    counts[c] += c == 0;
  }
  const int32_t row = plan->found.row(entry.group, counts);
  for (size_t c = 0; c < plan->counts; c++) plan->counters.push_back({plan->memory.at(e, Memory::kCounts0 + c), row, c});
  return row;
}

// Fills the tables of all launches. Returns nullptr, or why the plan no longer fits.
const char* tabulate(Plan* plan) {
  plan->found.clear();
  plan->counters.clear();
  plan->touched.begin();
  plan->turns.clear();
  for (auto& launch : plan->launches) launch.table.clear();
  const auto& sharing = plan->memory.sharing();
  for (const size_t e : plan->listed) {
    const auto& entry = plan->entries[e];
    const auto& launch = plan->launches[entry.launch];
    if (!entry.idle && sharing[e] & launch.refused) return "tensors came to share memory";
    const int32_t row = row_of(plan, e, sharing[e] & kCounted);
    if (entry.idle) {
      plan->launches[entry.launch].table.add_idle(launch.cells, entry.elements * launch.width, row);
      continue;
    }
    Range gradient = plan->memory.at(e, Memory::kGradient);
    const bool in_turn = sharing[e] & (kInTurn | kCopied);
    if (in_turn) {
      auto& turn = plan->turns.emplace_back(Turn{entry.launch});
      turn.table.clear();
      if (sharing[e] & kCopied) {
        turn.gradient = gradient;
        turn.copy.assign(gradient.begin, gradient.end);
        gradient.begin = turn.copy.data();
      }
    }
    Table& table = in_turn ? plan->turns.back().table : plan->launches[entry.launch].table;
    const size_t first = table.cells.size();
    table.cells.push_back(plan->memory.address(e, Memory::kParam));
    table.cells.push_back(const_cast<char*>(gradient.begin));
    for (const size_t role : launch.roles) table.cells.push_back(plan->memory.address(e, Memory::kCounts0 + role));
    const auto** tensors = plan->tensors.data() + e * plan->cells();
    const auto *values = tensors[Memory::kGradient], *param = tensors[Memory::kParam];
    if (launch.by_rows) {
      const auto split = param->sizes().begin() + sparse_dims(values, param);
      table.cells.push_back(const_cast<void*>(entry.indices->data()));
      const int64_t width = c10::multiply_integers(split, param->sizes().end()) * launch.width;
      table.cells.push_back(reinterpret_cast<void*>(width));
      table.cells.push_back(reinterpret_cast<void*>(c10::multiply_integers(param->sizes().begin(), split)));
    }
    for (size_t c = 0; launch.on_device && c < plan->counts; c++) {
      const Range count = plan->memory.at(e, Memory::kCounts0 + c);
      table.cells.push_back(const_cast<void*>(tagged(count.begin, count.is_float())));
    }
    if (!entry.indices || launch.by_rows) {
      table.end_tensor(entry.elements * launch.width, row);
      continue;
    }
    const std::vector<void*> whole(table.cells.begin() + first, table.cells.end());
    table.cells.resize(first);
    for (const auto& span : plan->touched.gather(entry.indices, values, static_cast<char*>(whole[1]), param)) {
      for (size_t c = 0; c < whole.size(); c++) {  // each span is a tensor of the table
        const int64_t itemsize = c < 2 ? launch.itemsize : launch.itemsizes[c - 2];
        table.cells.push_back(c == 1 ? span.values : static_cast<char*>(whole[c]) + span.first * itemsize);
      }
      table.end_tensor(span.elements, row);
    }
  }
  return nullptr;
}

}  // namespace
