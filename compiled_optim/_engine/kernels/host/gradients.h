// The passes of gradients.cpp over those of torch's tensors that they can walk.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "calls.h"
#include "memory.h"

namespace {

using Norm = double (*)(int64_t, char* const*, const int64_t*, const int8_t*, bool, int);
using Zero = void (*)(int64_t, char* const*, const int64_t*, int);

// A type as gradients.cpp numbers it, and how many of it an element has; no numbers of a type that it does not know.
struct Numbers {
  int8_t type = 0;
  int64_t itemsize = 0, width = 0;
};

Numbers numbers_of(const c10::TensorImpl* t) {
  switch (c10::typeMetaToScalarType(t->dtype())) {
    case at::kFloat: return {0, 4, 1};
    case at::kDouble: return {1, 8, 1};
    case at::kBFloat16: return {2, 2, 1};
    case at::kHalf: return {3, 2, 1};
    case at::kComplexFloat: return {0, 4, 2};
    case at::kComplexDouble: return {1, 8, 2};
    default: return {};
  }
}

// Whether autograd has to know when a tensor is written, beside the version.
bool is_followed(const at::TensorBase& tensor) {
  const auto* t = tensor.unsafeGetTensorImpl();
  return t->requires_grad() || reinterpret_cast<const at::TensorBase&>(t->_fw_grad(0, tensor)).defined();
}

// The tensors that one pass takes, laid end to end, and a list of those that it does not take.
struct Walk {
  std::vector<char*> data;
  std::vector<int64_t> begins{0};
  std::vector<const c10::TensorImpl*> tensors;
  PyObject* others = PyList_New(0);
  Held held;

  ~Walk() { Py_XDECREF(others); }
  int64_t count() const { return static_cast<int64_t>(tensors.size()); }

  // Adds what `add`, given a plain dense tensor in memory of the host, returns true for: each tensor of the list, or the
  // gradient `of` each. What has none is left out.
  template <class Add>
  bool collect(PyObject* list, bool of, Add add) {
    if (!others) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
      PyObject* item = PyList_GET_ITEM(list, i);
      const auto* tensor = unpack(item);
      if (tensor && of) {
        tensor = reinterpret_cast<const at::TensorBase*>(&tensor->unsafeGetTensorImpl()->grad());
        if (!tensor->defined()) continue;
      }
      const auto* t = tensor ? tensor->unsafeGetTensorImpl() : nullptr;
      const bool dense = t && in_memory(t) && t->is_cpu() && t->is_non_overlapping_and_dense();
      if (dense && add(*tensor, t)) tensors.push_back(t);
      else if (PyList_Append(others, item) < 0) return false;
    }
    return true;
  }

  // Calls `pass`; a long one lets other threads run Python meanwhile.
  template <class Pass>
  void run(bool is_long, Pass pass) {
    if (!is_long) return pass();
    for (const auto* t : tensors) held.hold(t);
    const Unlocked unlocked;
    pass();
  }
};

// norm(tensors, whether their gradients are meant, address of the function, whether it is the largest absolute value,
// threads, elements of a long pass): the norm of those that can be read here, and a list of the others.
PyObject* norm(PyObject*, PyObject* args) {
  PyObject* list;
  unsigned long long function;
  long long long_elements;
  int of, largest, threads;
  if (!PyArg_ParseTuple(args, "O!pKpiL", &PyList_Type, &list, &of, &function, &largest, &threads, &long_elements))
    return nullptr;
  return guarded([&]() -> PyObject* {
    Walk walk;
    std::vector<int8_t> types;
    const bool collected = walk.collect(list, of, [&](const at::TensorBase&, const c10::TensorImpl* t) {
      const auto numbers = numbers_of(t);
      const int64_t itemsize = numbers.itemsize * numbers.width;
      if (!numbers.width || (largest && numbers.width > 1) || !is_whole(t, t->numel(), itemsize)) return false;
      types.push_back(numbers.type);
      walk.data.push_back(const_cast<char*>(range(t, t->numel(), itemsize, true).begin));
      walk.begins.push_back(walk.begins.back() + t->numel() * numbers.width);
      return true;
    });
    if (!collected) return nullptr;
    double found = 0;
    walk.run(walk.begins.back() >= long_elements, [&] {
      found = reinterpret_cast<Norm>(function)(walk.count(), walk.data.data(), walk.begins.data(), types.data(), largest,
                                               threads);
    });
    return Py_BuildValue("dO", found, walk.others);
  });
}

// zero(tensors, whether their gradients are meant, address of the function, threads, bytes of a long pass): sets those to
// zero that can be written here; returns a list of the others.
PyObject* zero(PyObject*, PyObject* args) {
  PyObject* list;
  unsigned long long function;
  long long long_bytes;
  int of, threads;
  if (!PyArg_ParseTuple(args, "O!pKiL", &PyList_Type, &list, &of, &function, &threads, &long_bytes)) return nullptr;
  return guarded([&]() -> PyObject* {
    Walk walk;
    const bool collected = walk.collect(list, of, [&](const at::TensorBase& tensor, const c10::TensorImpl* t) {
      const auto itemsize = static_cast<int64_t>(t->itemsize());
      if (!on_host(t) || is_followed(tensor) || !is_whole(t, t->numel(), itemsize)) return false;
      walk.data.push_back(const_cast<char*>(range(t, t->numel(), itemsize, false).begin));
      walk.begins.push_back(walk.begins.back() + t->numel() * itemsize);
      return true;
    });
    if (!collected) return nullptr;
    for (const auto* t : walk.tensors) const_cast<c10::TensorImpl*>(t)->bump_version();
    walk.run(walk.begins.back() >= long_bytes, [&] {
      reinterpret_cast<Zero>(function)(walk.count(), walk.data.data(), walk.begins.data(), threads);
    });
    return Py_NewRef(walk.others);
  });
}

}  // namespace
