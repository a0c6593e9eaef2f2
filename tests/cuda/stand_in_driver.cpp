// Stands in for libcuda.so.1 where there is none: what host/cuda.cpp calls of the driver, on the memory of the host. A
// launch of `write` does what that kernel does. Any other is handed to a function of the test, or only counted if there
// is none.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Library {
  std::string image;  // a text
};

struct Kernel {
  const Library* library;
  std::string name;
};

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500;
constexpr intptr_t kDevices = 2;

thread_local std::vector<void*> contexts;  // that of device 0 is 1
std::map<std::string, int> failures;       // by function, of its next call
int version = 12040;

// The error that the next call of a function was told to return.
int failure(const char* function) {
  const auto found = failures.find(function);
  if (found == failures.end()) return 0;
  const int error = found->second;
  failures.erase(found);
  return error;
}

}  // namespace

extern "C" {

struct Launch {
  const char *name, *image;
  intptr_t device;  // of the current context
  unsigned grid[3], threads, shared;
  void* stream;
  void** parameters;
};

int (*stand_in_launch)(const Launch*) = nullptr;
int64_t stand_in_launches = 0, stand_in_writes = 0;

void stand_in_fail(const char* function, int error) { failures[function] = error; }
void stand_in_version(int number) { version = number; }
int stand_in_contexts() { return static_cast<int>(contexts.size()); }

int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : "an error of the stand-in";
  return 0;
}
int cuInit(unsigned) { return failure("cuInit"); }
int cuDriverGetVersion(int* number) {
  *number = version;
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < kDevices ? failure("cuDeviceGet") : kInvalidValue;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(device + 1));
  return failure("cuDevicePrimaryCtxRetain");
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return failure("cuCtxPushCurrent");
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}
int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
  *library = new Library{static_cast<const char*>(image)};
  return failure("cuLibraryLoadData");
}
int cuLibraryUnload(void* library) {
  delete static_cast<Library*>(library);
  return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  const auto* from = static_cast<Library*>(library);
  if (from->image.find(name) == std::string::npos) return kNotFound;
  *kernel = new Kernel{from, name};
  return failure("cuLibraryGetKernel");
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return contexts.empty() ? kInvalidContext : failure("cuKernelGetFunction");
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void**) {
  if (const int error = failure("cuLaunchKernel")) return error;
  if (contexts.empty()) return kInvalidContext;
  const auto* kernel = static_cast<Kernel*>(function);
  const bool writes = kernel->name == "write";
  (writes ? stand_in_writes : stand_in_launches)++;
  if (stand_in_launch) {
    const Launch launch{kernel->name.c_str(), kernel->library->image.c_str(), reinterpret_cast<intptr_t>(contexts.back()) - 1,
                        {x, y, z},            threads,                        shared,
                        stream,               parameters};
    return stand_in_launch(&launch);
  }
  if (writes) std::memcpy(*static_cast<void**>(parameters[0]), parameters[2], *static_cast<uint32_t*>(parameters[1]) * 8);
  return 0;
}

}  // extern "C"
