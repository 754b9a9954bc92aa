// What layers do between their projections, on CPUs. Arithmetic is float32, whatever the tensors hold.

#include "kernels.h"

namespace {

template <class T>
float inverse_norm(const T* x, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += to_float(x[i]) * to_float(x[i]);
    return 1 / std::sqrt(squares / width + eps);
}

inline float silu(float x) { return x / (1 + exp_of(-x)); }

}  // namespace

namespace paged {

template <class T, class W>
void add_norm(
    Team& team, const T* update, T* residual, const W* weight, const W* update_weight, T* out, int64_t tokens,
    int64_t width, float eps
) {
    team.share(tokens, [&](int64_t token) {
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
    });
}

template <class T>
void gated(Team& team, const T* gate_up, T* out, int64_t tokens, int64_t inner, bool is_gelu) {
    team.share(tokens, [&](int64_t token) {
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
    });
}

}  // namespace paged

constexpr int FEW = 4;  // tokens that are no work for several threads

#define EXPORT_NORM(NAME, T, W)                                                                                     \
    template void paged::add_norm(                                                                                  \
        Team&, const T*, T*, const W*, const W*, T*, int64_t tokens, int64_t width, float eps                        \
    );                                                                                                              \
    extern "C" void paged_add_norm_##NAME(                                                                          \
        const T* update, T* residual, const W* weight, const W* update_weight, T* out, int64_t tokens,              \
        int64_t width, float eps, int threads                                                                       \
    ) {                                                                                                             \
        paged::in_team(tokens > FEW ? threads : 1, [&](paged::Team& team) {                                         \
            paged::add_norm(team, update, residual, weight, update_weight, out, tokens, width, eps);                \
        });                                                                                                         \
    }
EXPORT_NORM(float32_float32, float, float)
EXPORT_NORM(bfloat16_bfloat16, bfloat, bfloat)
EXPORT_NORM(bfloat16_float32, bfloat, float)

#define EXPORT_GATED(NAME, T)                                                                                       \
    template void paged::gated(Team&, const T*, T*, int64_t tokens, int64_t inner, bool is_gelu);                    \
    extern "C" void paged_gated_##NAME(                                                                             \
        const T* gate_up, T* out, int64_t tokens, int64_t inner, bool is_gelu, int threads                          \
    ) {                                                                                                             \
        paged::in_team(tokens > FEW ? threads : 1, [&](paged::Team& team) {                                         \
            paged::gated(team, gate_up, out, tokens, inner, is_gelu);                                               \
        });                                                                                                         \
    }
EXPORT_GATED(float32, float)
EXPORT_GATED(bfloat16, bfloat)
