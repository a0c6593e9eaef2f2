// launches per step: 1, bytes per element: 28
// NAdam()[float32]
// inputs: param, grad, exp_avg, exp_avg_sq, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, gradient_step, momentum_step, eps
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
                       const float* in_ptr8,
                       const float* in_ptr9,
                       const float* in_ptr10,
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
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = at::vec::Vectorized<float>::loadu(in_ptr1 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp2 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp5 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp8 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp18 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp22 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp23 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp26 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp35 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp3 = at::vec::Vectorized<float>(tmp2);
                    auto tmp4 = tmp1 * tmp3;
                    auto tmp6 = static_cast<float>(0.5);
                    auto tmp7 = tmp5 < tmp6;
                    auto tmp9 = at::vec::VecMask<float,1>::from(tmp7);
                    auto tmp10 = decltype(tmp8)::blendv(tmp1, tmp8, tmp9.template cast<float,1>());
                    auto tmp11 = tmp1 - tmp8;
                    auto tmp12 = static_cast<float>(1.0);
                    auto tmp13 = float(tmp5 - tmp12);
                    auto tmp14 = tmp7 ? tmp5 : tmp13;
                    auto tmp15 = at::vec::Vectorized<float>(tmp14);
                    auto tmp16 = tmp11 * tmp15;
                    auto tmp17 = tmp10 + tmp16;
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = tmp17 * tmp19;
                    auto tmp21 = tmp4 + tmp20;
                    auto tmp24 = at::vec::Vectorized<float>(tmp23);
                    auto tmp25 = tmp22 * tmp24;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp1 * tmp27;
                    auto tmp29 = tmp28 * tmp1;
                    auto tmp30 = tmp25 + tmp29;
                    auto tmp31 = tmp30.sqrt();
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 * tmp33;
                    auto tmp36 = at::vec::Vectorized<float>(tmp35);
                    auto tmp37 = tmp34 + tmp36;
                    auto tmp38 = tmp21 / tmp37;
                    auto tmp39 = tmp0 - tmp38;
                    tmp39.store(out_ptr3 + static_cast<int64_t>(x0));
                    tmp17.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp30.store(out_ptr5 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = at::vec::Vectorized<float>::loadu(in_ptr1 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp2 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp5 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp8 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp18 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp22 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp23 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp26 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp35 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp3 = at::vec::Vectorized<float>(tmp2);
                    auto tmp4 = tmp1 * tmp3;
                    auto tmp6 = static_cast<float>(0.5);
                    auto tmp7 = tmp5 < tmp6;
                    auto tmp9 = at::vec::VecMask<float,1>::from(tmp7);
                    auto tmp10 = decltype(tmp8)::blendv(tmp1, tmp8, tmp9.template cast<float,1>());
                    auto tmp11 = tmp1 - tmp8;
                    auto tmp12 = static_cast<float>(1.0);
                    auto tmp13 = float(tmp5 - tmp12);
                    auto tmp14 = tmp7 ? tmp5 : tmp13;
                    auto tmp15 = at::vec::Vectorized<float>(tmp14);
                    auto tmp16 = tmp11 * tmp15;
                    auto tmp17 = tmp10 + tmp16;
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = tmp17 * tmp19;
                    auto tmp21 = tmp4 + tmp20;
                    auto tmp24 = at::vec::Vectorized<float>(tmp23);
                    auto tmp25 = tmp22 * tmp24;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp1 * tmp27;
                    auto tmp29 = tmp28 * tmp1;
                    auto tmp30 = tmp25 + tmp29;
                    auto tmp31 = tmp30.sqrt();
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 * tmp33;
                    auto tmp36 = at::vec::Vectorized<float>(tmp35);
                    auto tmp37 = tmp34 + tmp36;
                    auto tmp38 = tmp21 / tmp37;
                    auto tmp39 = tmp0 - tmp38;
                    tmp39.store(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp17.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp30.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
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
      float k[8];
      for (int64_t i = 0; i < 8; i++) k[i] = scalars[rows[t] * columns + i];
      kernel(Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 1], o * 4}, &k[5], &k[1], Address{table[t * 4 + 2], o * 4}, &k[6], Address{table[t * 4 + 3], o * 4}, &k[2], &k[3], &k[4], &k[7], Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 3], o * 4}, n);
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

extern "C" int64_t signature() { return 408; }
