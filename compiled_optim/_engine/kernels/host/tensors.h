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

// As torch gives them to every tensor on the CPU, whatever mode is on while one is looked at here.
const c10::DispatchKeySet plain_keys = c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                       c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
                                       c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);

// nullptr for anything but a Tensor or Parameter: a subclass may mean something else by its elements.
const at::TensorBase* unpack(PyObject* object) {
  auto* type = Py_TYPE(object);
  return type == tensor_type || type == parameter_type ? &reinterpret_cast<PyTensor*>(object)->tensor : nullptr;
}

// A strided CPU tensor with no lazy conjugate, negation, subclass, functorch level or inference mode.
bool plain(const c10::TensorImpl* t) {
  return t->key_set() == plain_keys && t->layout() == c10::kStrided;
}

// Whether a tensor, which may have a lazy conjugate or be an inference tensor, has memory of its own on the CPU.
bool in_memory(const c10::TensorImpl* t) {
  const auto keys = t->key_set().remove(c10::DispatchKey::Conjugate).remove(c10::DispatchKey::Negative);
  return (keys | plain_keys) == plain_keys && t->has_storage();
}

// Also of a subclass; nullptr for what has no memory of its own on the CPU.
const c10::TensorImpl* in_memory(PyObject* object) {
  if (!object || !PyObject_TypeCheck(object, tensor_type)) return nullptr;
  const auto& tensor = reinterpret_cast<PyTensor*>(object)->tensor;
  return tensor.defined() && in_memory(tensor.unsafeGetTensorImpl()) ? tensor.unsafeGetTensorImpl() : nullptr;
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

// How many elements lie from its first to its last, of any strides.
int64_t reach(const c10::TensorImpl* t) {
  if (!t->numel()) return 0;
  int64_t elements = 1;
  for (size_t d = 0; d < t->sizes().size(); d++) elements += (t->sizes()[d] - 1) * t->strides()[d];
  return elements;
}

// The bytes of storage that a tensor of this reach needs. Its `itemsize()` costs a call into torch.
int64_t bytes_needed(const c10::TensorImpl* t, int64_t elements, int64_t itemsize) {
  return elements ? (t->storage_offset() + elements) * itemsize : 0;
}

// Whether its storage holds it, which can be resized under its tensors.
bool is_whole(const c10::TensorImpl* t, int64_t elements, int64_t itemsize) {
  return bytes_needed(t, elements, itemsize) <= static_cast<int64_t>(t->storage().unsafeGetStorageImpl()->nbytes());
}

bool is_whole(const c10::TensorImpl* t) { return is_whole(t, reach(t), static_cast<int64_t>(t->itemsize())); }

bool is_count(const at::TensorBase* t) {
  return t && plain(t->unsafeGetTensorImpl()) && t->numel() == 1 &&
         (t->scalar_type() == at::kFloat || t->scalar_type() == at::kDouble);
}

}  // namespace
