// Linear layers in bfloat16 over packed weights: see linear.py.

#include "kernels.h"
#include "product.h"

namespace {

constexpr int COLUMNS = 48;  // of a panel: of 8 rows, 24 registers of sums
constexpr int64_t CHUNK = 128;  // rows, at most, that meet all panels before the next do: they stay in the L2 cache
#ifdef __AMX_BF16__
constexpr int64_t LEAST = 2 * TILE_ROWS;  // rows at once, if there are more
#else
constexpr int64_t LEAST = 8;
#endif

// Adds a bias to sums [VECTORS][LANES] of one row, or none, and rounds the first `columns` of them.
inline void finish(const floats* sums, const bfloat* bias, bfloat* out, int64_t columns) {
    for (int v = 0; v < COLUMNS / LANES; v++) {
        const int64_t first = v * LANES, count = columns - first;
        if (count <= 0) break;
        if (count >= LANES) {
            store(out + first, bias ? sums[v] + load(bias + first) : sums[v]);
        } else {
            for (int64_t i = 0; i < count; i++)
                store(out + first + i, sums[v][i] + (bias ? to_float(bias[first + i]) : 0));
        }
    }
}

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
    for (int r = 0; r < R; r++) finish(sums[r], bias, out + r * width, columns);
}

#ifdef __AMX_BF16__
// The same of `rows`, by matrix tiles: 32, or at most 16. depth is a multiple of 32.
template <bool IS_TWO>
void tiles_by_panel(
    const bfloat* x, int64_t rows, const bfloat* panel, const bfloat* bias, bfloat* out, int64_t columns, int64_t width,
    int64_t depth
) {
    constexpr int64_t PANEL_BYTES = 4 * COLUMNS, SUM_BYTES = 4 * COLUMNS;
    const int64_t x_bytes = 2 * depth;
    alignas(64) floats sums[(IS_TWO ? 2 : 1) * TILE_ROWS][COLUMNS / LANES];
    const TileRegisters registers(IS_TWO ? TILE_ROWS : rows);
    remember(x);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t k = 0; k < depth; k += 32, panel += 32 * COLUMNS) {
        _tile_loadd(6, x + k, x_bytes);
        _tile_loadd(7, panel, PANEL_BYTES);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, panel + 32, PANEL_BYTES);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, panel + 64, PANEL_BYTES);
        _tile_dpbf16ps(2, 6, 7);
        if constexpr (IS_TWO) {
            _tile_loadd(6, x + TILE_ROWS * depth + k, x_bytes);
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, panel + 32, PANEL_BYTES);
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(7, panel, PANEL_BYTES);
            _tile_dpbf16ps(3, 6, 7);
        }
    }
    _tile_stored(0, &sums[0][0], SUM_BYTES);
    _tile_stored(1, &sums[0][1], SUM_BYTES);
    _tile_stored(2, &sums[0][2], SUM_BYTES);
    if constexpr (IS_TWO) {
        _tile_stored(3, &sums[TILE_ROWS][0], SUM_BYTES);
        _tile_stored(4, &sums[TILE_ROWS][1], SUM_BYTES);
        _tile_stored(5, &sums[TILE_ROWS][2], SUM_BYTES);
    }
    remember(sums);
    for (int64_t r = 0; r < rows; r++) finish(sums[r], bias, out + r * width, columns);
}
#endif

}  // namespace

void paged::linear(
    Team& team, const bfloat* x, const bfloat* packed, const bfloat* bias, bfloat* out, int64_t rows, int64_t width,
    int64_t depth
) {
    const int64_t panels = (width + COLUMNS - 1) / COLUMNS;
    int64_t chunk = CHUNK;
    while (chunk > LEAST && panels * ((rows + chunk - 1) / chunk) < 4 * team.size) chunk /= 2;  // something for every thread
    team.share(panels * ((rows + chunk - 1) / chunk), [&](int64_t task) {
        const int64_t first = task % panels * COLUMNS, end = std::min(rows, (task / panels + 1) * chunk);
        int64_t begin = task / panels * chunk;
        const bfloat *panel = packed + first * depth, *added = bias ? bias + first : nullptr;
#ifdef __AMX_BF16__
        while (depth % 32 == 0 && begin < end) {
            const int64_t some = end - begin >= 2 * TILE_ROWS ? 2 * TILE_ROWS : std::min<int64_t>(TILE_ROWS, end - begin);
            (some > TILE_ROWS ? tiles_by_panel<true> : tiles_by_panel<false>)(
                x + begin * depth, some, panel, added, out + begin * width + first, width - first, width, depth
            );
            begin += some;
        }
#endif
        in_groups<8>(int(end - begin), [&](auto n, int row) {
            rows_by_panel<n()>(
                x + (begin + row) * depth, panel, added, out + (begin + row) * width + first, width - first, width, depth
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
