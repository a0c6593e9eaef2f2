// Devices that stand in for GPUs: tensors there are not on the CPU, but their memory is the host's. Operations are
// implemented in Python (stand_in.py). `tensors.h` is that of the engine's host module.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "tensors.h"

PyObject* THPVariable_Wrap(const at::TensorBase&);  // torch/csrc/autograd/python_variable.h

namespace {

constexpr auto kStandIn = c10::DeviceType::PrivateUse1;

thread_local c10::DeviceIndex current_device = 0;

c10::Device device(int index) {
  return index < 0 ? c10::Device(c10::kCPU) : c10::Device(kStandIn, static_cast<c10::DeviceIndex>(index));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kStandIn; }
  c10::Device exchangeDevice(c10::Device d) const override {
    const auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {kStandIn, current_device}; }
  void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.has_index()) current_device = d.index();
  }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  // Autograd would start a thread for each, and a process with such threads cannot fork.
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetAllocator(c10::kCPU)->allocate(bytes);
    data.unsafe_set_device(device(current_device));
    return data;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;

// A tensor of these sizes in the storage of another.
PyObject* tensor_in(c10::Storage storage, c10::DispatchKey key, const c10::TensorImpl* like, c10::IntArrayRef sizes,
                    c10::IntArrayRef strides, int64_t offset) {
  auto tensor = at::detail::make_tensor_base<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like->dtype());
  auto* t = tensor.unsafeGetTensorImpl();
  t->set_storage_offset(offset);
  t->set_sizes_and_strides(sizes, strides);
  return THPVariable_Wrap(tensor);
}

const c10::TensorImpl* impl(PyObject* object) {
  return reinterpret_cast<PyTensor*>(object)->tensor.unsafeGetTensorImpl();
}

// A pointer to the memory of a storage, for another device; it keeps the storage alive.
c10::DataPtr seen_from(int index, const c10::Storage& storage) {
  auto keep = [storage](void*) {};
  return c10::InefficientStdFunctionContext::makeDataPtr(storage.mutable_data(), keep, device(index));
}

// alias(tensor, index of a device or -1 for the CPU): the same memory, seen as a tensor of that device.
PyObject* alias(PyObject*, PyObject* args) {
  PyObject* object;
  int index;
  if (!PyArg_ParseTuple(args, "Oi", &object, &index)) return nullptr;
  const auto* t = impl(object);
  const auto& storage = t->storage();
  auto* resizes = index < 0 ? c10::GetAllocator(c10::kCPU) : nullptr;
  c10::Storage seen(c10::Storage::use_byte_size_t(), storage.nbytes(), seen_from(index, storage), resizes, resizes);
  const auto key = index < 0 ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1;
  return tensor_in(seen, key, t, t->sizes(), t->strides(), t->storage_offset());
}

// adopt(tensor, host): the tensor takes memory and sizes of its alias on the host, which an operation has resized.
PyObject* adopt(PyObject*, PyObject* args) {
  PyObject *object, *host;
  if (!PyArg_ParseTuple(args, "OO", &object, &host)) return nullptr;
  auto* t = const_cast<c10::TensorImpl*>(impl(object));
  const auto* h = impl(host);
  auto* storage = t->storage().unsafeGetStorageImpl();
  storage->set_data_ptr(seen_from(t->device().index(), h->storage()));
  storage->set_nbytes(h->storage().nbytes());
  t->set_sizes_and_strides(h->sizes(), h->strides(), h->storage_offset());
  Py_RETURN_NONE;
}

PyObject* set_device(PyObject*, PyObject* index) {
  current_device = static_cast<c10::DeviceIndex>(PyLong_AsLong(index));
  Py_RETURN_NONE;
}

PyObject* get_device(PyObject*, PyObject*) { return PyLong_FromLong(current_device); }

PyMethodDef methods[] = {{"alias", alias, METH_VARARGS, nullptr},
                         {"adopt", adopt, METH_VARARGS, nullptr},
                         {"set_device", set_device, METH_O, nullptr},
                         {"get_device", get_device, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "stand_in_device", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

PyMODINIT_FUNC PyInit_stand_in_device() {
  c10::SetAllocator(kStandIn, &allocator);
  return PyModule_Create(&module);
}
