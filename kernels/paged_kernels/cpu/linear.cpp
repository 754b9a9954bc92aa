// Linear layers in bfloat16 over packed weights, for CPUs with dot products of bfloat16 pairs: see linear.py.

#include "kernels.h"
#include "product.h"

namespace {

constexpr int COLUMNS = 48;  // of a panel: of 8 rows, 24 registers of sums
constexpr int64_t CHUNK = 128;  // rows, at most, that meet all panels before the next do: they stay in the L2 cache

// Of R rows and a panel [depth / 2][COLUMNS][2], the first `columns` outputs.
template <int R>
void rows_by_panel(
    const bfloat* x, const bfloat* panel, const bfloat* bias, bfloat* out, int64_t columns, int64_t width, int64_t depth
) {
    constexpr int VECTORS = COLUMNS / LANES;
    floats sums[R][VECTORS];  // in registers, if loops over it are unrolled early
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[r][v] = floats{};
    for (int64_t k = 0; k < depth; k += 2, panel += 2 * COLUMNS)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = add_products(sums[r][v], x + r * depth + k, panel + 2 * LANES * v);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            const int64_t first = v * LANES, count = columns - first;
            if (count <= 0) break;
            if (count >= LANES) {
                store(out + r * width + first, bias ? sums[r][v] + load(bias + first) : sums[r][v]);
            } else {
                for (int64_t i = 0; i < count; i++)
                    store(out + r * width + first + i, sums[r][v][i] + (bias ? to_float(bias[first + i]) : 0));
            }
        }
}

}  // namespace

void paged::linear(
    Team& team, const bfloat* x, const bfloat* packed, const bfloat* bias, bfloat* out, int64_t rows, int64_t width,
    int64_t depth
) {
    const int64_t panels = (width + COLUMNS - 1) / COLUMNS;
    int64_t chunk = CHUNK;
    while (chunk > 8 && panels * ((rows + chunk - 1) / chunk) < 4 * team.size) chunk /= 2;  // something for every thread
    team.share(panels * ((rows + chunk - 1) / chunk), [&](int64_t task) {
        const int64_t first = task % panels * COLUMNS, begin = task / panels * chunk;
        in_groups<8>(int(std::min(chunk, rows - begin)), [&](auto n, int row) {
            rows_by_panel<n()>(
                x + (begin + row) * depth, packed + first * depth, bias ? bias + first : nullptr,
                out + (begin + row) * width + first, width - first, width, depth
            );
        });
    });
}

extern "C" void paged_linear(
    const bfloat* x, const bfloat* packed, const bfloat* bias, bfloat* out, int64_t rows, int64_t width, int64_t depth,
    int threads
) {
    paged::in_team(threads, [&](paged::Team& team) { paged::linear(team, x, packed, bias, out, rows, width, depth); });
}
