// Numbers of the tensors, and arithmetic that vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat {
    uint16_t bits;
};

namespace {

// The two numbers of a pair of bfloat16.
inline float low(uint32_t pair) {
    uint32_t bits = pair << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float high(uint32_t pair) {
    uint32_t bits = pair & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat x) { return low(x.bits); }

inline void store(float* to, float x) { *to = x; }

inline void store(bfloat* to, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp, relative error below 2e-7, of numbers that are clamped to -87..88. Coefficients of Cephes' expf.
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

}  // namespace
