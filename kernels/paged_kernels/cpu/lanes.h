// A vector register of numbers, and arithmetic on it. GCC and Clang make of it what the instructions allow.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef floats floats_anywhere __attribute__((aligned(4), may_alias));

inline floats all(float x) { return floats{} + x; }

inline floats load(const float* from) { return *reinterpret_cast<const floats_anywhere*>(from); }

inline floats load(const bfloat* from) {
    halves x;
    std::memcpy(&x, from, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

// Numbers of two rows, in turn.
inline void store_pairs(bfloat* to, const bfloat* first, const bfloat* second) {
    halves x, y;
    std::memcpy(&x, first, sizeof x);
    std::memcpy(&y, second, sizeof y);
    const words pairs = __builtin_convertvector(x, words) | __builtin_convertvector(y, words) << 16;
    std::memcpy(to, &pairs, sizeof pairs);
}

inline void store(float* to, floats x) { *reinterpret_cast<floats_anywhere*>(to) = x; }

inline void store(bfloat* to, floats x) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
#else
    const words bits = (words)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const halves rounded = __builtin_convertvector(x == x ? nearest : words{} + 0x7fc0, halves);
#endif
    std::memcpy(to, &rounded, sizeof rounded);
}

inline void scale(float* numbers, float factor) { store(numbers, load(numbers) * factor); }

#ifdef __AVX512F__
inline floats larger(floats x, floats y) { return (floats)_mm512_max_ps((__m512)x, (__m512)y); }  // y if one is NaN
inline bool any_larger(floats x, float y) { return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_GT_OQ); }
inline float largest(floats x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_of(floats x) { return _mm512_reduce_add_ps((__m512)x); }
#else
inline floats larger(floats x, floats y) { return (floats)_mm256_max_ps((__m256)x, (__m256)y); }
inline bool any_larger(floats x, float y) { return _mm256_movemask_ps((__m256)(x > y)); }

inline float largest(floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline float sum_of(floats x) {
    float sum = x[0];
    for (int i = 1; i < LANES; i++) sum += x[i];
    return sum;
}
#endif

// 2 to the power of x, relative error below 2e-7, of numbers from -126 to 127; 2^-126 for less, NaN for NaN.
inline floats exp2_of(floats x) {
    x = larger(all(-126.0f), x);
    const float shift = 12582912.0f;  // 1.5 * 2^23: added to x, it leaves x's integer in the lowest bits
    const floats shifted = x + shift, rest = x - (shifted - shift);
    floats power = rest * 1.327647199e-3f + 9.675541334e-3f;
    power = power * rest + 5.550713273e-2f;
    power = power * rest + 2.402211972e-1f;
    power = power * rest + 6.931469671e-1f;
    power = power * rest + 1.000000072f;
    return (floats)((words)power + ((words)shifted << 23));
}

}  // namespace
