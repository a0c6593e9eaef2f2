// Python's objects in C++.
#pragma once
#include <Python.h>

#include <new>
#include <utility>

namespace {

// Holds a reference; none after a Python error.
class Owned {
 public:
  Owned() = default;
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  Owned& operator=(Owned other) {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() { Py_XDECREF(object_); }
  static Owned borrowed(PyObject* object) { return Owned(Py_XNewRef(object)); }
  operator PyObject*() const { return object_; }
  PyObject* get() const { return object_; }  // for macros
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

template <class Condition>
bool all_of(PyObject* tuple, Condition holds) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
    if (!holds(PyTuple_GET_ITEM(tuple, i))) return false;
  return true;
}

PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (!string) throw std::bad_alloc();
  return string;
}

}  // namespace
