// Linear layers of few rows, over weights as they lie in memory: see few_rows in layers.py.

#include "lanes.h"

namespace {

#ifdef __AVX512BF16__
constexpr int64_t STEP = 2 * LANES;

inline floats add_products(floats sums, const bfloat* x, const bfloat* w) {
    const __m512bh pairs = (__m512bh)_mm512_loadu_si512(x), weights = (__m512bh)_mm512_loadu_si512(w);
    return (floats)_mm512_dpbf16_ps((__m512)sums, pairs, weights);
}
#else
constexpr int64_t STEP = LANES;

inline floats add_products(floats sums, const bfloat* x, const bfloat* w) { return sums + load(x) * load(w); }
#endif

// Outputs `begin` to `end` of all rows. A row adds up CHAINS sums, so that a product need not wait for the one before.
template <int ROWS, int CHAINS>
void outputs(
    const bfloat* x, const bfloat* weight, const bfloat* bias, bfloat* out, int64_t begin, int64_t end, int64_t width,
    int64_t depth
) {
    for (int64_t n = begin; n < end; n++) {
        const bfloat* w = weight + n * depth;
        floats sums[ROWS][CHAINS] = {};
        int64_t k = 0;
        for (; k + CHAINS * STEP <= depth; k += CHAINS * STEP)
            for (int chain = 0; chain < CHAINS; chain++)
                for (int row = 0; row < ROWS; row++) {
                    const int64_t at = k + chain * STEP;
                    sums[row][chain] = add_products(sums[row][chain], x + row * depth + at, w + at);
                }
        for (; k + STEP <= depth; k += STEP)
            for (int row = 0; row < ROWS; row++) sums[row][0] = add_products(sums[row][0], x + row * depth + k, w + k);
        for (int row = 0; row < ROWS; row++) {
            floats sum = sums[row][0];
            for (int chain = 1; chain < CHAINS; chain++) sum += sums[row][chain];
            float total = sum_of(sum) + (bias ? to_float(bias[n]) : 0);
            for (int64_t i = k; i < depth; i++) total += to_float(x[row * depth + i]) * to_float(w[i]);
            store(out + row * width + n, total);
        }
    }
}

}  // namespace

extern "C" void paged_few_rows_linear(
    const bfloat* x, const bfloat* weight, const bfloat* bias, bfloat* out, int64_t rows, int64_t width, int64_t depth,
    int threads
) {
    const decltype(&outputs<1, 4>) of_rows[] = {outputs<1, 4>, outputs<2, 4>, outputs<3, 2>, outputs<4, 2>};
    // A thread reads one stretch of the weights: that is what prefetching likes.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        of_rows[rows - 1](x, weight, bias, out, width * part / threads, width * (part + 1) / threads, width, depth);
}
