// Reading torch's tensors from C++ without pybind11: what a tensor is, whether a kernel can walk it, where it lies.
#pragma once
#include <Python.h>

#include <ATen/core/TensorBase.h>

namespace {

// torch/csrc/autograd/python_variable.h states this layout, and takes 17 s to compile against 2 (issue 2).
// `self_check` compares it with what Python says, once per process.
struct PyTensor {
  PyObject_HEAD
  at::TensorBase tensor;
};

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
c10::DispatchKeySet plain_keys;

const at::TensorBase* unpack(PyObject* object) {
  auto* type = Py_TYPE(object);
  return type == tensor_type || type == parameter_type ? &reinterpret_cast<PyTensor*>(object)->tensor : nullptr;
}

// A strided CPU tensor with no lazy conjugate, negation, subclass, functorch level or inference mode.
bool plain(const c10::TensorImpl* t) {
  return t->key_set() == plain_keys && t->layout() == c10::kStrided;
}

// Same memory order for the same sizes; a dimension of size one may have any stride.
bool same_layout(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  auto sizes = a->sizes();
  if (sizes != b->sizes()) return false;
  auto x = a->strides(), y = b->strides();
  for (size_t d = 0; d < sizes.size(); d++)
    if (x[d] != y[d] && sizes[d] != 1) return false;
  return true;
}

bool fits(const c10::TensorImpl* t, at::ScalarType type, const c10::TensorImpl* like) {
  return plain(t) && c10::typeMetaToScalarType(t->dtype()) == type && same_layout(like, t);
}

const c10::TensorImpl* gradient(const c10::TensorImpl* param) {
  const auto& grad = reinterpret_cast<const at::TensorBase&>(param->grad());
  return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
}

char* address(const c10::TensorImpl* t) {
  return static_cast<char*>(const_cast<c10::TensorImpl*>(t)->mutable_data());
}

double read_count(const c10::TensorImpl* t) {
  return t->dtype() == caffe2::TypeMeta::Make<float>() ? *reinterpret_cast<float*>(address(t))
                                                       : *reinterpret_cast<double*>(address(t));
}

void write_count(const c10::TensorImpl* t, double value) {
  if (t->dtype() == caffe2::TypeMeta::Make<float>()) *reinterpret_cast<float*>(address(t)) = static_cast<float>(value);
  else *reinterpret_cast<double*>(address(t)) = value;
}

bool is_count(const at::TensorBase* t) {
  return t && plain(t->unsafeGetTensorImpl()) && t->numel() == 1 &&
         (t->scalar_type() == at::kFloat || t->scalar_type() == at::kDouble);
}

}  // namespace
