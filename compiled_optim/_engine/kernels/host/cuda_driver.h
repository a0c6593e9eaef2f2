// The CUDA driver, opened by name: nothing of CUDA has to be installed where this is built.
#pragma once
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

using Handle = void*;  // the driver's opaque pointers: contexts, libraries, kernels, functions, streams

// A kernel that stores words which come by value in its own parameters: no copy has to wait for pinned memory, and a CUDA
// graph keeps them. The driver copies all parameters of each launch, so there is a kernel for few words and one for many.
struct Writer {
  int64_t words;
  const char* ptx;  // the version of the language
  int driver;       // the oldest that takes so many parameters, such as 12010
  Handle kernel = nullptr;

  std::string source() const {
    return std::string(".version ") + ptx + R"(
.target sm_70
.address_size 64
.visible .entry write(.param .u64 to, .param .u32 count, .param .align 8 .b8 words[)" + std::to_string(8 * words) + R"(])
{
  .reg .b64 %rd<5>;
  .reg .b32 %r<6>;
  .reg .pred %p;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.u32 %r4, %r1, %r2, %r3;
  ld.param.u32 %r5, [count];
  setp.ge.u32 %p, %r4, %r5;
  @%p ret;
  mul.wide.u32 %rd1, %r4, 8;
  mov.u64 %rd2, words;
  add.u64 %rd2, %rd2, %rd1;
  ld.param.u64 %rd3, [%rd2];
  ld.param.u64 %rd4, [to];
  add.u64 %rd4, %rd4, %rd1;
  st.global.u64 [%rd4], %rd3;
  ret;
}
)";
  }
};
constexpr int64_t kMostWords = 4093;  // a kernel takes 32,764 bytes of parameters, 4,096 before CUDA 12.1
constexpr unsigned kWriterThreads = 128;

// A function of the driver; what it returns is thrown.
template <class... Parameters>
struct Call {
  Call(Handle library, const char* name)
      : name(name), function(reinterpret_cast<int (*)(Parameters...)>(dlsym(library, name))),
        text_of(reinterpret_cast<int (*)(int, const char**)>(dlsym(library, "cuGetErrorString"))) {
    if (!function || !text_of)
      throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": CUDA 12.0 or newer is needed");
  }
  void operator()(Parameters... given) const {
    const int error = function(given...);
    if (!error) return;
    const char* text = nullptr;
    text_of(error, &text);
    throw std::runtime_error(std::string(name) + ": " + (text ? text : "CUDA error " + std::to_string(error)));
  }

  const char* name;
  int (*function)(Parameters...);
  int (*text_of)(int, const char**);
};

struct Driver {
  explicit Driver(Handle library) : library(library) {
    init(0);
    get_version(&version);
    for (auto& writer : writers)
      if (writer.driver <= version) writer.kernel = load(writer.source().c_str(), "write");
  }
  Handle load(const void* image, const char* name) const {  // a kernel in a cubin, or in the text of a PTX program
    Handle loaded = nullptr, kernel = nullptr;
    load_data(&loaded, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    get_kernel(&kernel, loaded, name);
    return kernel;
  }
  // A kernel in the current context. This loads it there, which cannot be done while a graph is captured.
  Handle function_of(Handle kernel) const {
    Handle function = nullptr;
    if (kernel) get_function(&function, kernel);
    return function;
  }

  Handle library;
  int version = 0;
  Call<unsigned> init{library, "cuInit"};
  Call<int*> get_version{library, "cuDriverGetVersion"};
  Call<Handle*, const void*, int*, void**, unsigned, int*, void**, unsigned> load_data{library, "cuLibraryLoadData"};
  Call<Handle*, Handle, const char*> get_kernel{library, "cuLibraryGetKernel"};
  Call<Handle*, Handle> get_function{library, "cuKernelGetFunction"};
  Call<int*, int> get_device{library, "cuDeviceGet"};
  Call<Handle*, int> retain{library, "cuDevicePrimaryCtxRetain"};
  Call<int> release{library, "cuDevicePrimaryCtxRelease_v2"};
  Call<Handle*> get_current{library, "cuCtxGetCurrent"};
  Call<Handle> push{library, "cuCtxPushCurrent_v2"};
  Call<Handle*> pop{library, "cuCtxPopCurrent_v2"};
  Call<Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, void**> launch{
      library, "cuLaunchKernel"};
  std::array<Writer, 3> writers{{{62, "7.0", 0}, {510, "7.0", 0}, {kMostWords, "8.1", 12010}}};
};

// The primary context of a device, which torch uses too.
class Context {
 public:
  Context(const Driver& driver, int index) : driver_(driver) {
    driver.get_device(&device_, index);
    driver.retain(&context_, device_);
  }
  Context(const Context&) = delete;
  ~Context() { driver_.release.function(device_); }

  // Calls a function while this context is current.
  template <class Body>
  void with(Body body) const {
    Handle current = nullptr;
    driver_.get_current(&current);
    if (current == context_) return body();
    driver_.push(context_);
    struct Pop {
      const Driver& driver;
      ~Pop() {
        Handle popped;
        driver.pop.function(&popped);
      }
    } pop{driver_};
    body();
  }

 private:
  const Driver& driver_;
  int device_ = 0;
  Handle context_ = nullptr;
};

}  // namespace
