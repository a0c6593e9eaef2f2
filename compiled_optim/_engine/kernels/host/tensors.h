// Reading torch's tensors from C++ without pybind11: what a tensor is, whether a kernel can walk it, where it lies.
#pragma once
#include <ATen/core/TensorBase.h>

#include "objects.h"

namespace {

// The layout that torch/csrc/autograd/python_variable.h declares: to include it would take 17 s instead of 2. `start`
// compares it with a tensor whose shape and address Python knows.
struct PyTensor {
  PyObject_HEAD
  at::TensorBase tensor;
};

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

// The dispatch keys that torch gives to every strided tensor of a device, whatever mode is on while one is looked at
// here. A lazy conjugate or negation, a subclass, a level of functorch and inference mode each add or remove one.
c10::DispatchKeySet plain_keys(c10::BackendComponent device) {
  return c10::DispatchKeySet(c10::DispatchKey::Dense) | c10::DispatchKeySet(device) |
         c10::getAutocastRelatedKeySetFromBackend(device) | c10::getAutogradRelatedKeySetFromBackend(device);
}

const c10::DispatchKeySet host_keys = plain_keys(c10::BackendComponent::CPUBit);

// nullptr for anything but a Tensor or Parameter: a subclass may mean something else by its elements.
const at::TensorBase* unpack(PyObject* object) {
  auto* type = Py_TYPE(object);
  return type == tensor_type || type == parameter_type ? &reinterpret_cast<PyTensor*>(object)->tensor : nullptr;
}

// The tensors that one kernel can walk: plain ones of one device.
struct Plain {
  c10::DispatchKeySet keys = host_keys;
  c10::Device device = c10::kCPU;

  Plain() = default;
  explicit Plain(const c10::TensorImpl* like)
      : keys(plain_keys(like->key_set().highestBackendKey())), device(like->device()) {}
  bool operator()(const c10::TensorImpl* t) const { return t->key_set() == keys && t->device() == device; }
};

const Plain on_host;

// Whether a tensor, which may have a lazy conjugate or be an inference tensor, has memory of its own.
bool in_memory(const c10::TensorImpl* t) {
  const auto plain = plain_keys(t->key_set().highestBackendKey());
  const auto keys = t->key_set().remove(c10::DispatchKey::Conjugate).remove(c10::DispatchKey::Negative);
  return (keys | plain) == plain && t->has_storage() && t->device().type() != c10::kMeta;
}

// Also of a subclass; nullptr for what has no memory of its own.
const c10::TensorImpl* in_memory(PyObject* object) {
  if (!object || !PyObject_TypeCheck(object, tensor_type)) return nullptr;
  const auto& tensor = reinterpret_cast<PyTensor*>(object)->tensor;
  return tensor.defined() && in_memory(tensor.unsafeGetTensorImpl()) ? tensor.unsafeGetTensorImpl() : nullptr;
}

// Same memory order for the same sizes; a dimension of size one may have any stride.
bool same_layout(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  const auto sizes = a->sizes(), others = b->sizes(), x = a->strides(), y = b->strides();
  if (sizes.size() != others.size()) return false;
  for (size_t d = 0; d < sizes.size(); d++)
    if (sizes[d] != others[d] || (x[d] != y[d] && sizes[d] != 1)) return false;
  return true;
}

bool fits(const Plain& plain, const c10::TensorImpl* t, at::ScalarType type, const c10::TensorImpl* like) {
  return plain(t) && c10::typeMetaToScalarType(t->dtype()) == type && same_layout(like, t);
}

const c10::TensorImpl* gradient(const c10::TensorImpl* param) {
  const auto& grad = reinterpret_cast<const at::TensorBase&>(param->grad());
  return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
}

char* address(const c10::TensorImpl* t) {
  return static_cast<char*>(const_cast<c10::TensorImpl*>(t)->mutable_data());
}

// The number of elements from the first in memory to the last, gaps included.
int64_t reach(const c10::TensorImpl* t) {
  if (!t->numel()) return 0;
  int64_t elements = 1;
  for (size_t d = 0; d < t->sizes().size(); d++) elements += (t->sizes()[d] - 1) * t->strides()[d];
  return elements;
}

// The bytes of storage that a tensor of this reach needs. The caller passes `itemsize`, which costs a call into torch.
int64_t bytes_needed(const c10::TensorImpl* t, int64_t elements, int64_t itemsize) {
  return elements ? (t->storage_offset() + elements) * itemsize : 0;
}

// Whether the storage still holds the tensor: a storage can be resized while tensors use it.
bool is_whole(const c10::TensorImpl* t, int64_t elements, int64_t itemsize) {
  return bytes_needed(t, elements, itemsize) <= static_cast<int64_t>(t->storage().unsafeGetStorageImpl()->nbytes());
}

bool is_whole(const c10::TensorImpl* t) { return is_whole(t, reach(t), static_cast<int64_t>(t->itemsize())); }

// Whether this is a number where it has to lie: most step counts lie on the host, whatever the device of the parameter.
bool is_number(const at::TensorBase* t, const Plain& plain) {
  return t && plain(t->unsafeGetTensorImpl()) && t->numel() == 1 &&
         (t->scalar_type() == at::kFloat || t->scalar_type() == at::kDouble);
}

double number_of(const at::TensorBase* t) {
  const void* data = t->const_data_ptr();
  return t->scalar_type() == at::kFloat ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
}

// The address of such a number; its lowest bit tells that it is a float32.
const void* tagged(const void* data, bool is_float) { return static_cast<const char*>(data) + is_float; }

}  // namespace
