// What layers do between their projections, on CPUs. Arithmetic is float32, whatever the tensors hold.

#include "numbers.h"

namespace {

template <class T>
float inverse_norm(const T* x, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += to_float(x[i]) * to_float(x[i]);
    return 1 / std::sqrt(squares / width + eps);
}

// See add_norm in layers.py.
template <class T, class W>
void add_norm(
    const T* update, T* residual, const W* weight, const W* update_weight, T* out, int64_t tokens, int64_t width,
    float eps, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 4)
    for (int64_t token = 0; token < tokens; token++) {
        T *to = out + token * width, *sum = residual + token * width;
        if (update) {
            const T* from = update + token * width;
            const float factor = update_weight ? inverse_norm(from, width, eps) : 1;
            if (update_weight) {
#pragma omp simd
                for (int64_t i = 0; i < width; i++)
                    store(sum + i, to_float(sum[i]) + to_float(from[i]) * factor * to_float(update_weight[i]));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < width; i++) store(sum + i, to_float(sum[i]) + to_float(from[i]));
            }
        }
        const float factor = inverse_norm(sum, width, eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(to + i, to_float(sum[i]) * factor * to_float(weight[i]));
    }
}

inline float silu(float x) { return x / (1 + exp_of(-x)); }

// See Linears.gate_up in layers.py: gate_up [tokens, 2 * inner], out [tokens, inner].
template <class T>
void gated(const T* gate_up, T* out, int64_t tokens, int64_t inner, bool is_gelu, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 4)
    for (int64_t token = 0; token < tokens; token++) {
        const T *gate = gate_up + token * 2 * inner, *up = gate + inner;
        T* to = out + token * inner;
        if (is_gelu) {  // by tanh: (1 + tanh(y)) / 2 is the logistic function of 2y
#pragma omp simd
            for (int64_t i = 0; i < inner; i++) {
                const float x = to_float(gate[i]), y = 1.5957691216057308f * (x + 0.044715f * x * x * x);
                store(to + i, x / (1 + exp_of(-y)) * to_float(up[i]));
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inner; i++) store(to + i, silu(to_float(gate[i])) * to_float(up[i]));
        }
    }
}

}  // namespace

#define EXPORT_NORM(NAME, T, W)                                                                                     \
    extern "C" void paged_add_norm_##NAME(                                                                          \
        const T* update, T* residual, const W* weight, const W* update_weight, T* out, int64_t tokens,              \
        int64_t width, float eps, int threads                                                                       \
    ) {                                                                                                             \
        add_norm(update, residual, weight, update_weight, out, tokens, width, eps, threads);                        \
    }
EXPORT_NORM(float32_float32, float, float)
EXPORT_NORM(bfloat16_bfloat16, bfloat, bfloat)
EXPORT_NORM(bfloat16_float32, bfloat, float)

#define EXPORT_GATED(NAME, T)                                                                                       \
    extern "C" void paged_gated_##NAME(                                                                             \
        const T* gate_up, T* out, int64_t tokens, int64_t inner, bool is_gelu, int threads                          \
    ) {                                                                                                             \
        gated(gate_up, out, tokens, inner, is_gelu, threads);                                                       \
    }
EXPORT_GATED(float32, float)
EXPORT_GATED(bfloat16, bfloat)
