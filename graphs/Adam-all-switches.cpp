// launches per step: 1, bytes per element: 36
// Adam(maximize, weight_decay, amsgrad, decoupled_weight_decay)[float32]
// inputs: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps
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
                       const float* in_ptr11,
                       float* out_ptr4,
                       float* out_ptr5,
                       float* out_ptr6,
                       float* out_ptr7,
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
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr7 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp2 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp5 = at::vec::Vectorized<float>::loadu(in_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp7 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp13 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp14 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp17 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp20 = at::vec::Vectorized<float>::loadu(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp31 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp34 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp38 = in_ptr11[static_cast<int64_t>(0L)];
                    auto tmp3 = at::vec::Vectorized<float>(tmp2);
                    auto tmp4 = tmp1 * tmp3;
                    auto tmp6 = tmp5.neg();
                    auto tmp8 = at::vec::Vectorized<float>(tmp7);
                    auto tmp9 = tmp6 * tmp8;
                    auto tmp10 = tmp9 * tmp6;
                    auto tmp11 = tmp4 + tmp10;
                    auto tmp12 = at::vec::maximum(tmp0, tmp11);
                    auto tmp15 = at::vec::Vectorized<float>(tmp14);
                    auto tmp16 = tmp13 * tmp15;
                    auto tmp18 = static_cast<float>(0.5);
                    auto tmp19 = tmp17 < tmp18;
                    auto tmp21 = at::vec::VecMask<float,1>::from(tmp19);
                    auto tmp22 = decltype(tmp20)::blendv(tmp6, tmp20, tmp21.template cast<float,1>());
                    auto tmp23 = tmp6 - tmp20;
                    auto tmp24 = static_cast<float>(1.0);
                    auto tmp25 = float(tmp17 - tmp24);
                    auto tmp26 = tmp19 ? tmp17 : tmp25;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp23 * tmp27;
                    auto tmp29 = tmp22 + tmp28;
                    auto tmp30 = tmp12.sqrt();
                    auto tmp32 = at::vec::Vectorized<float>(tmp31);
                    auto tmp33 = tmp30 * tmp32;
                    auto tmp35 = at::vec::Vectorized<float>(tmp34);
                    auto tmp36 = tmp33 + tmp35;
                    auto tmp37 = tmp29 / tmp36;
                    auto tmp39 = at::vec::Vectorized<float>(tmp38);
                    auto tmp40 = tmp37 * tmp39;
                    auto tmp41 = tmp16 - tmp40;
                    tmp11.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp41.store(out_ptr5 + static_cast<int64_t>(x0));
                    tmp29.store(out_ptr6 + static_cast<int64_t>(x0));
                    tmp12.store(out_ptr7 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr7 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp2 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp5 = at::vec::Vectorized<float>::loadu(in_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp7 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp13 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp14 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp17 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp20 = at::vec::Vectorized<float>::loadu(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp31 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp34 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp38 = in_ptr11[static_cast<int64_t>(0L)];
                    auto tmp3 = at::vec::Vectorized<float>(tmp2);
                    auto tmp4 = tmp1 * tmp3;
                    auto tmp6 = tmp5.neg();
                    auto tmp8 = at::vec::Vectorized<float>(tmp7);
                    auto tmp9 = tmp6 * tmp8;
                    auto tmp10 = tmp9 * tmp6;
                    auto tmp11 = tmp4 + tmp10;
                    auto tmp12 = at::vec::maximum(tmp0, tmp11);
                    auto tmp15 = at::vec::Vectorized<float>(tmp14);
                    auto tmp16 = tmp13 * tmp15;
                    auto tmp18 = static_cast<float>(0.5);
                    auto tmp19 = tmp17 < tmp18;
                    auto tmp21 = at::vec::VecMask<float,1>::from(tmp19);
                    auto tmp22 = decltype(tmp20)::blendv(tmp6, tmp20, tmp21.template cast<float,1>());
                    auto tmp23 = tmp6 - tmp20;
                    auto tmp24 = static_cast<float>(1.0);
                    auto tmp25 = float(tmp17 - tmp24);
                    auto tmp26 = tmp19 ? tmp17 : tmp25;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp23 * tmp27;
                    auto tmp29 = tmp22 + tmp28;
                    auto tmp30 = tmp12.sqrt();
                    auto tmp32 = at::vec::Vectorized<float>(tmp31);
                    auto tmp33 = tmp30 * tmp32;
                    auto tmp35 = at::vec::Vectorized<float>(tmp34);
                    auto tmp36 = tmp33 + tmp35;
                    auto tmp37 = tmp29 / tmp36;
                    auto tmp39 = at::vec::Vectorized<float>(tmp38);
                    auto tmp40 = tmp37 * tmp39;
                    auto tmp41 = tmp16 - tmp40;
                    tmp11.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp41.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp29.store(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp12.store(out_ptr7 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
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
      float k[7];
      for (int64_t i = 0; i < 7; i++) k[i] = scalars[rows[t] * columns + i];
      kernel(Address{table[t * 5 + 4], o * 4}, Address{table[t * 5 + 3], o * 4}, &k[2], Address{table[t * 5 + 1], o * 4}, &k[3], Address{table[t * 5 + 0], o * 4}, &k[0], &k[1], Address{table[t * 5 + 2], o * 4}, &k[5], &k[6], &k[4], Address{table[t * 5 + 3], o * 4}, Address{table[t * 5 + 0], o * 4}, Address{table[t * 5 + 2], o * 4}, Address{table[t * 5 + 4], o * 4}, n);
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

extern "C" int64_t signature() { return 507; }
