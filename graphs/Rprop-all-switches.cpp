// launches per step: 1, bytes per element: 28
// Rprop(maximize)[float32]
// inputs: param, grad, prev, step_size, shrink, grow, least, most
#include <torch/csrc/inductor/cpp_prefix.h>

// Inductor points a process-wide flag at a local of each call; calls from several threads would race on it.
static thread_local std::atomic<int>* division_flag;
#define inductor_cpu_integer_div_error_flag division_flag

#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void C10_ALWAYS_INLINE_ATTRIBUTE kernel(const float* in_ptr0,
                       const float* in_ptr1,
                       const float* in_ptr2,
                       const float* in_ptr3,
                       const float* in_ptr4,
                       const float* in_ptr5,
                       const float* in_ptr6,
                       const float* in_ptr7,
                       float* out_ptr3,
                       float* out_ptr4,
                       float* out_ptr5,
                       const int64_t ks0)
{
    std::atomic<int> inductor_cpu_integer_div_error{0};
    inductor_cpu_integer_div_error_flag = &inductor_cpu_integer_div_error;
    {
        for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(ks0); x0+=static_cast<int64_t>(8L))
        {
            {
                if(C10_LIKELY(x0 >= static_cast<int64_t>(0) && x0 < static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L))))))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp2 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp8 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp9 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp13 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp18 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp21 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp24 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = tmp0.neg();
                    auto tmp3 = tmp1 * tmp2;
                    auto tmp4 =
                    [&]()
                    {
                        auto left = decltype(tmp3)::blendv(decltype(tmp3)(0), decltype(tmp3)(1), decltype(tmp3)(0) < tmp3);
                        auto right = decltype(tmp3)::blendv(decltype(tmp3)(0), decltype(tmp3)(1), tmp3 < decltype(tmp3)(0));
                        return left - right;
                    }
                    ()
                    ;
                    auto tmp5 = static_cast<float>(0.0);
                    auto tmp6 = at::vec::Vectorized<float>(tmp5);
                    auto tmp7 = at::vec::VecMask<float,1>(tmp4 < tmp6);
                    auto tmp10 = at::vec::Vectorized<float>(tmp9);
                    auto tmp11 = tmp8 * tmp10;
                    auto tmp12 = at::vec::VecMask<float,1>(tmp4 > tmp6);
                    auto tmp14 = at::vec::Vectorized<float>(tmp13);
                    auto tmp15 = tmp8 * tmp14;
                    auto tmp16 = decltype(tmp15)::blendv(tmp8, tmp15, tmp12.template cast<float,1>());
                    auto tmp17 = decltype(tmp11)::blendv(tmp16, tmp11, tmp7.template cast<float,1>());
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = at::vec::maximum(tmp17, tmp19);
                    auto tmp22 = at::vec::Vectorized<float>(tmp21);
                    auto tmp23 = at::vec::minimum(tmp20, tmp22);
                    auto tmp25 = decltype(tmp6)::blendv(tmp1, tmp6, tmp7.template cast<float,1>());
                    auto tmp26 =
                    [&]()
                    {
                        auto left = decltype(tmp25)::blendv(decltype(tmp25)(0), decltype(tmp25)(1), decltype(tmp25)(0) < tmp25);
                        auto right = decltype(tmp25)::blendv(decltype(tmp25)(0), decltype(tmp25)(1), tmp25 < decltype(tmp25)(0));
                        return left - right;
                    }
                    ()
                    ;
                    auto tmp27 = tmp26 * tmp23;
                    auto tmp28 = tmp24 - tmp27;
                    tmp25.store(out_ptr3 + static_cast<int64_t>(x0));
                    tmp28.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp23.store(out_ptr5 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp2 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp8 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp9 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp13 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp18 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp21 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp24 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = tmp0.neg();
                    auto tmp3 = tmp1 * tmp2;
                    auto tmp4 =
                    [&]()
                    {
                        auto left = decltype(tmp3)::blendv(decltype(tmp3)(0), decltype(tmp3)(1), decltype(tmp3)(0) < tmp3);
                        auto right = decltype(tmp3)::blendv(decltype(tmp3)(0), decltype(tmp3)(1), tmp3 < decltype(tmp3)(0));
                        return left - right;
                    }
                    ()
                    ;
                    auto tmp5 = static_cast<float>(0.0);
                    auto tmp6 = at::vec::Vectorized<float>(tmp5);
                    auto tmp7 = at::vec::VecMask<float,1>(tmp4 < tmp6);
                    auto tmp10 = at::vec::Vectorized<float>(tmp9);
                    auto tmp11 = tmp8 * tmp10;
                    auto tmp12 = at::vec::VecMask<float,1>(tmp4 > tmp6);
                    auto tmp14 = at::vec::Vectorized<float>(tmp13);
                    auto tmp15 = tmp8 * tmp14;
                    auto tmp16 = decltype(tmp15)::blendv(tmp8, tmp15, tmp12.template cast<float,1>());
                    auto tmp17 = decltype(tmp11)::blendv(tmp16, tmp11, tmp7.template cast<float,1>());
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = at::vec::maximum(tmp17, tmp19);
                    auto tmp22 = at::vec::Vectorized<float>(tmp21);
                    auto tmp23 = at::vec::minimum(tmp20, tmp22);
                    auto tmp25 = decltype(tmp6)::blendv(tmp1, tmp6, tmp7.template cast<float,1>());
                    auto tmp26 =
                    [&]()
                    {
                        auto left = decltype(tmp25)::blendv(decltype(tmp25)(0), decltype(tmp25)(1), decltype(tmp25)(0) < tmp25);
                        auto right = decltype(tmp25)::blendv(decltype(tmp25)(0), decltype(tmp25)(1), tmp25 < decltype(tmp25)(0));
                        return left - right;
                    }
                    ()
                    ;
                    auto tmp27 = tmp26 * tmp23;
                    auto tmp28 = tmp24 - tmp27;
                    tmp25.store(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp28.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp23.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                }
            }
        }
    }
    inductor_cpu_integer_div_error_flag = nullptr;
    inductor_cpu_throw_if_integer_div_error(inductor_cpu_integer_div_error);
}

#undef inductor_cpu_integer_div_error_flag

namespace {
struct Address {
  void* base;
  int64_t bytes;
  template <class T> operator T*() const { return reinterpret_cast<T*>(static_cast<char*>(base) + bytes); }
};
}

extern "C" void launch(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                       const double* scalars, int64_t columns, int threads) {
  const int64_t total = begins[tensors];
  auto span = [&](int64_t at, int64_t end) {
    for (int64_t t = std::upper_bound(begins, begins + tensors + 1, at) - begins - 1; at < end; t++) {
      const int64_t o = at - begins[t], n = std::min(begins[t + 1], end) - at;
      if (n == 0) continue;
      float k[4];
      for (int64_t i = 0; i < 4; i++) k[i] = scalars[rows[t] * columns + i];
      kernel(Address{table[t * 4 + 1], o * 4}, Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 3], o * 4}, &k[0], &k[1], &k[2], &k[3], Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 3], o * 4}, n);
      at += n;
    }
  };
  if (threads == 1) return span(0, total);
  #pragma omp parallel num_threads(threads)
  {
    // a multiple of 64 elements: no two threads write to one cache line of a tensor that begins on one
    const int64_t team = omp_get_num_threads(), id = omp_get_thread_num(), share = (total / team + 64) / 64 * 64;
    span(std::min(id * share, total), std::min((id + 1) * share, total));
  }
}

extern "C" int64_t signature() { return 404; }
