// launches per step: 1, bytes per element: 20
// ASGD(weight_decay, maximize)[float32]
// inputs: param, grad, ax, shrink, eta, mu, weight_decay
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
                       float* out_ptr1,
                       float* out_ptr3,
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
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr1 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(in_ptr2 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp6 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp10 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp14 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp19 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = tmp4.neg();
                    auto tmp7 = at::vec::Vectorized<float>(tmp6);
                    auto tmp8 = tmp0 * tmp7;
                    auto tmp9 = tmp5 + tmp8;
                    auto tmp11 = at::vec::Vectorized<float>(tmp10);
                    auto tmp12 = tmp9 * tmp11;
                    auto tmp13 = tmp3 - tmp12;
                    auto tmp15 = static_cast<float>(1.0);
                    auto tmp16 = tmp14 < tmp15;
                    auto tmp17 = static_cast<float>(0.5);
                    auto tmp18 = tmp14 < tmp17;
                    auto tmp20 = at::vec::VecMask<float,1>::from(tmp18);
                    auto tmp21 = decltype(tmp19)::blendv(tmp13, tmp19, tmp20.template cast<float,1>());
                    auto tmp22 = tmp13 - tmp19;
                    auto tmp23 = float(tmp14 - tmp15);
                    auto tmp24 = tmp18 ? tmp14 : tmp23;
                    auto tmp25 = at::vec::Vectorized<float>(tmp24);
                    auto tmp26 = tmp22 * tmp25;
                    auto tmp27 = tmp21 + tmp26;
                    auto tmp28 = at::vec::VecMask<float,1>::from(tmp16);
                    auto tmp29 = decltype(tmp27)::blendv(tmp13, tmp27, tmp28.template cast<float,1>());
                    tmp13.store(out_ptr1 + static_cast<int64_t>(x0));
                    tmp29.store(out_ptr3 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr1 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(in_ptr2 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp6 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp10 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp14 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp19 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = tmp4.neg();
                    auto tmp7 = at::vec::Vectorized<float>(tmp6);
                    auto tmp8 = tmp0 * tmp7;
                    auto tmp9 = tmp5 + tmp8;
                    auto tmp11 = at::vec::Vectorized<float>(tmp10);
                    auto tmp12 = tmp9 * tmp11;
                    auto tmp13 = tmp3 - tmp12;
                    auto tmp15 = static_cast<float>(1.0);
                    auto tmp16 = tmp14 < tmp15;
                    auto tmp17 = static_cast<float>(0.5);
                    auto tmp18 = tmp14 < tmp17;
                    auto tmp20 = at::vec::VecMask<float,1>::from(tmp18);
                    auto tmp21 = decltype(tmp19)::blendv(tmp13, tmp19, tmp20.template cast<float,1>());
                    auto tmp22 = tmp13 - tmp19;
                    auto tmp23 = float(tmp14 - tmp15);
                    auto tmp24 = tmp18 ? tmp14 : tmp23;
                    auto tmp25 = at::vec::Vectorized<float>(tmp24);
                    auto tmp26 = tmp22 * tmp25;
                    auto tmp27 = tmp21 + tmp26;
                    auto tmp28 = at::vec::VecMask<float,1>::from(tmp16);
                    auto tmp29 = decltype(tmp27)::blendv(tmp13, tmp27, tmp28.template cast<float,1>());
                    tmp13.store(out_ptr1 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp29.store(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
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
      kernel(Address{table[t * 3 + 0], o * 4}, &k[0], Address{table[t * 3 + 1], o * 4}, &k[3], &k[1], &k[2], Address{table[t * 3 + 2], o * 4}, Address{table[t * 3 + 0], o * 4}, Address{table[t * 3 + 2], o * 4}, n);
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

extern "C" int64_t signature() { return 304; }
