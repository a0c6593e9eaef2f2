// What the functions that Python calls have in common: exceptions, and letting other threads run Python.
#pragma once
#include <exception>
#include <utility>
#include <vector>

#include "tensors.h"

namespace {

template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Keeps the memory of tensors while other threads run Python. They may give a tensor another storage, so the storage is
// held. Resizing a storage would free its memory nevertheless, so it raises until the pass is over.
class Held {
 public:
  void hold(const c10::TensorImpl* t) {
    auto* storage = t->storage().unsafeGetStorageImpl();
    held_.push_back({t->storage(), storage->resizable()});
    storage->set_resizable(false);
  }
  ~Held() {
    for (auto& [storage, resizable] : held_)
      if (resizable) storage.unsafeGetStorageImpl()->set_resizable(true);
  }

 private:
  std::vector<std::pair<c10::Storage, bool>> held_;
};

// Lets other threads run Python, and has the lock again when it goes, also where a pass throws.
struct Unlocked {
  PyThreadState* thread = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(thread); }
};

}  // namespace
