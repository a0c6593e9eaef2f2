// Updates an average in one call while nothing but values changes: the average and the model hold the tensors that they held
// at the last update, and models are counted on the host. Everything else is left to Python.
#pragma once
#include <unordered_set>

#include "quick.h"

namespace {

// The parameters, buffers and modules below a module, each module once, in the order of `Module.modules()`.
class Tree {
 public:
  explicit Tree(PyObject* held) : held_(held) {}  // names of a module's dicts of parameters, of buffers and of modules
  // Remembers the tree, and adds its objects to `seen`. False if a module keeps them in other ways than torch.nn.Module.
  bool note(PyObject* root, std::unordered_set<PyObject*>& seen) {
    seen.insert(root);
    return walk(root, [&](PyObject* object, int kind) {
      found_.push_back({object, kind, seen.insert(object).second && kind == kModules ? kEnter : kGoOn});
      return found_.back().next;
    });
  }
  // Whether the tree has the same objects as in `note`. They are looked up again, so a dead object is never compared.
  bool is_same(PyObject* root) const {
    size_t at = 0;
    return walk(root, [&](PyObject* object, int kind) {
             if (at == found_.size() || found_[at].object != object || found_[at].kind != kind) return kStop;
             return found_[at++].next;
           }) && at == found_.size();
  }

 private:
  enum Next { kStop, kGoOn, kEnter };
  static constexpr int kModules = 2;
  struct Found {
    PyObject* object;
    int kind;  // index into `held_`
    Next next;
  };

  template <class Visit>
  bool walk(PyObject* module, const Visit& visit) const {
    const Owned attributes(PyObject_GenericGetDict(module, nullptr));
    for (int kind = 0; kind <= kModules; kind++) {
      PyObject* held = attributes ? PyDict_GetItemWithError(attributes, PyTuple_GET_ITEM(held_, kind)) : nullptr;
      if (!held || !PyDict_CheckExact(held)) return false;
      PyObject *name, *object;
      Py_ssize_t at = 0;
      while (PyDict_Next(held, &at, &name, &object)) {
        if (object == Py_None) continue;
        const Next next = visit(object, kind);
        if (next == kStop || (next == kEnter && !walk(object, visit))) return false;
      }
    }
    return true;
  }

  PyObject* held_;
  std::vector<Found> found_;
};

// The arguments of `quick_average`, and the trees that it found. It owns no tensor: an update uses a tensor only after it
// has found it in the tree again.
struct QuickAverage {
  Plan* plan;
  PyObject *held, *settings, *watched, *weight, *contexts;
  Tree average{held}, model{held};
  std::vector<std::pair<PyObject*, PyObject*>> copies;  // buffers of the average and of the model
  Inputs inputs;
  bool is_running = false;
};

// Where a count of models is stored; nullptr if the object is not a count in host memory.
int64_t* count_in(PyObject* object) {
  const auto* tensor = object ? unpack(object) : nullptr;
  const auto* t = tensor ? tensor->unsafeGetTensorImpl() : nullptr;
  const bool is_count = t && on_host(t) && tensor->scalar_type() == at::kLong && t->numel() == 1 && is_whole(t);
  return is_count ? reinterpret_cast<int64_t*>(address(t)) : nullptr;
}

bool can_copy(PyObject* target, PyObject* source) {
  const auto *to = unpack(target), *from = unpack(source);
  if (!to || !from) return false;
  const auto *t = to->unsafeGetTensorImpl(), *s = from->unsafeGetTensorImpl();
  return on_host(t) && t->is_non_overlapping_and_dense() && fits(on_host, s, to->scalar_type(), t) && is_whole(t) &&
         is_whole(s);
}

void copy(PyObject* target, PyObject* source) {
  auto *to = unpack(target)->unsafeGetTensorImpl(), *from = unpack(source)->unsafeGetTensorImpl();
  const auto itemsize = static_cast<int64_t>(to->itemsize());
  const Range written = range(to, to->numel(), itemsize, false), read = range(from, to->numel(), itemsize, true);
  to->bump_version();
  if (to->numel()) std::memmove(const_cast<char*>(written.begin), read.begin, read.end - read.begin);
}

// False if Python has to update the average, or after a Python error. Then nothing was written.
bool update_average(QuickAverage& quick, PyObject* average, PyObject* model) {
  static PyObject* const n_averaged = interned("n_averaged");
  const Owned attributes(PyObject_GenericGetDict(average, nullptr));
  auto count = [&]() -> PyObject* {
    PyObject* buffers = attributes ? PyDict_GetItemWithError(attributes, PyTuple_GET_ITEM(quick.held, 1)) : nullptr;
    return buffers && PyDict_Check(buffers) ? PyDict_GetItemWithError(buffers, n_averaged) : nullptr;
  };
  const int64_t* before = count_in(count());
  const int64_t n = before ? *before : 0;
  if (n <= 0) return false;  // the first model is copied
  const Owned given(PyLong_FromLongLong(n)), weight(given ? PyObject_CallOneArg(quick.weight, given) : nullptr);
  auto& inputs = quick.inputs;
  inputs.scalars.table.clear();
  inputs.contexts.clear();
  if (!weight || !append_number(inputs.scalars.table, weight) || !read_contexts(quick.contexts, inputs.contexts)) return false;
  auto is_set = [&](PyObject* setting) {
    return PyDict_GetItemWithError(attributes, PyTuple_GET_ITEM(setting, 0)) == PyTuple_GET_ITEM(setting, 1);
  };
  if (!all_of(quick.settings, is_set) || !all_of(quick.watched, is_as_allowed)) return false;
  // From here on Python runs only in other threads, while a long launch has released the lock. What is written after the
  // launch is therefore kept alive and checked again.
  const Owned counter = Owned::borrowed(count());
  const int64_t* now = count_in(counter);
  if (!now || *now != n || !quick.average.is_same(average) || !quick.model.is_same(model)) return false;
  std::vector<std::pair<Owned, Owned>> copies;
  for (const auto& [target, source] : quick.copies) {
    if (!can_copy(target, source)) return false;
    copies.emplace_back(Owned::borrowed(target), Owned::borrowed(source));
  }
  if (take_step(quick.plan, inputs)) return false;
  for (const auto& [target, source] : copies) {
    if (!can_copy(target, source)) throw std::runtime_error("a buffer changed while its model was averaged");
    copy(target, source);
  }
  if (!count_in(counter)) throw std::runtime_error("n_averaged changed while a model was averaged");
  unpack(counter)->unsafeGetTensorImpl()->bump_version();
  *count_in(counter) = n + 1;
  return true;
}

// update(average, model): whether the average was updated. Python raises a failed look-up again, in better words.
PyObject* quick_update(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "update takes 2 arguments, got %zd", count);
  auto* quick = static_cast<QuickAverage*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(self, 0), "compiled_optim.average"));
  if (!quick) return nullptr;
  if (quick->is_running) Py_RETURN_FALSE;  // its weight updates the average, or another thread does
  struct Running {
    bool& flag;
    ~Running() { flag = false; }
  } running{quick->is_running = true};
  return guarded([&]() -> PyObject* {
    const bool updated = update_average(*quick, args[0], args[1]);
    if (!PyErr_Occurred()) return PyBool_FromLong(updated);
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
    PyErr_Clear();
    Py_RETURN_FALSE;
  });
}

constexpr int64_t kMostCopied = 1 << 20;  // bytes of buffers that one thread copies; more is left to torch

void drop_average(PyObject* capsule) {
  delete static_cast<QuickAverage*>(PyCapsule_GetPointer(capsule, "compiled_optim.average"));
}

// quick_average(plan, average, model, averaged, models, copies, state, held, settings, watched, weight, contexts): a function
// that updates the average in one call, or returns False and leaves that to `run`. None if it could never do so.
//   averaged, models: the tensors of the average, in the order of the plan, and those of the model.
//   copies: [(buffer of the average, buffer of the model)], whose values are copied.
//   held: names of a module's dicts of parameters, of buffers and of modules.
//   settings: ((attribute of the average, the value that it must have), ...); watched, contexts: as in `quick`.
//   weight(n): the scalar of the update after n models.
PyObject* quick_average(PyObject*, PyObject* args) {
  static PyMethodDef method = {"update", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(quick_update)), METH_FASTCALL,
                               nullptr};
  PyObject *capsule, *average, *model, *averaged, *models, *copies, *state, *held, *settings, *watched, *weight, *contexts;
  if (!PyArg_ParseTuple(args, "OOOO!O!O!O!O!O!O!OO!", &capsule, &average, &model, &PyList_Type, &averaged, &PyList_Type,
                        &models, &PyList_Type, &copies, &PyDict_Type, &state, &PyTuple_Type, &held, &PyTuple_Type, &settings,
                        &PyTuple_Type, &watched, &weight, &PyTuple_Type, &contexts))
    return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    auto quick = std::make_unique<QuickAverage>(QuickAverage{plan, held, settings, watched, weight, contexts});
    auto& inputs = quick->inputs;
    inputs.scalars.rows = plan->expected;
    inputs.scalars.columns = 1;
    inputs.scalars.addresses = {nullptr};
    inputs.scalars.ends = {1};
    inputs.lists.push_back(Owned::borrowed(averaged));
    inputs.state = state;
    std::unordered_set<PyObject*> own, others;
    bool offered = plan->expected.rows() == 1 && PyList_GET_SIZE(averaged) == PyList_GET_SIZE(models) &&
                   quick->average.note(average, own) && quick->model.note(model, others);
    for (Py_ssize_t i = 0; offered && i < PyList_GET_SIZE(models); i++) {
      PyObject *target = PyList_GET_ITEM(averaged, i), *source = PyList_GET_ITEM(models, i);
      offered = own.count(target) && others.count(source);
      inputs.substitutes[target] = {source};
    }
    int64_t bytes = 0;
    for (Py_ssize_t i = 0; offered && i < PyList_GET_SIZE(copies); i++) {
      PyObject *pair = PyList_GET_ITEM(copies, i), *target, *source;
      if (!PyTuple_Check(pair)) throw std::invalid_argument("a copy must be a tuple");
      if (!PyArg_ParseTuple(pair, "OO", &target, &source)) return nullptr;
      offered = own.count(target) && others.count(source) && can_copy(target, source) &&
                (bytes += static_cast<int64_t>(unpack(target)->nbytes())) <= kMostCopied;
      quick->copies.emplace_back(target, source);
    }
    if (PyErr_Occurred()) return nullptr;
    if (!offered) Py_RETURN_NONE;
    const Owned holder(PyCapsule_New(quick.get(), "compiled_optim.average", drop_average));
    if (!holder) return nullptr;
    quick.release();
    // The objects that `quick` points to live as long as the function.
    const Owned self(PyTuple_Pack(8, holder.get(), capsule, state, held, settings, watched, weight, contexts));
    return self ? PyCFunction_New(&method, self) : nullptr;
  });
}

}  // namespace
