// A register of bfloat16 as two of float32, and back: what at::vec::convert does, bit by bit, in fewer instructions.
#pragma once
#include <torch/csrc/inductor/cpp_prefix.h>

namespace {

using Halves = at::vec::Vectorized<at::BFloat16>;
using Floats = at::vec::VectorizedN<float, 2>;

#if defined(CPU_CAPABILITY_AVX512)

// Two places of 16 bits for each float32: `first`, and `step` more than in the one before.
inline __m512i places(int step, int first) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_mullo_epi32(count, _mm512_set1_epi32(step)), _mm512_set1_epi32(first));
}

inline Floats widened(const Halves& halves) {
  const __m512i low = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places(1 << 16, 0), halves);
  const __m512i high = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places(1 << 16, 16 << 16), halves);
  return {_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)};
}

// Ties go to even, and NaN becomes all ones. The upper half of each float32 is the result.
inline __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(-1));
}

inline Halves rounded(const Floats& floats) {
  return _mm512_permutex2var_epi16(rounded(floats[0]), places(4 << 16 | 4, 3 << 16 | 1), rounded(floats[1]));
}

#elif defined(CPU_CAPABILITY_AVX2)

constexpr int kMiddleSwapped = 0b11'01'10'00;  // of four quarters: unpacking and packing work on halves of a register

inline Floats widened(const Halves& halves) {
  const __m256i zero = _mm256_setzero_si256(), in_turn = _mm256_permute4x64_epi64(halves, kMiddleSwapped);
  const __m256i low = _mm256_unpacklo_epi16(zero, in_turn), high = _mm256_unpackhi_epi16(zero, in_turn);
  return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}

// Ties go to even, and NaN becomes all ones. The lower half of each float32 is the result, the upper one is zero.
inline __m256i rounded(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_or_si256(sum, nan), 16);
}

inline Halves rounded(const Floats& floats) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(floats[0]), rounded(floats[1])), kMiddleSwapped);
}

#endif

}  // namespace
