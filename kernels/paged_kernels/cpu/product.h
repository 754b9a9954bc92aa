// Products of small matrices, the right one packed as the cache is: [k / PACK][columns][PACK].
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace {

// Numbers next to each other of one column: what one dot-product instruction takes.
template <class T>
constexpr int PACK = sizeof(T) == 2 ? 2 : 1;

constexpr int ROWS = 8;       // rows that share a load of the right matrix
constexpr int TILE_ROWS = 16;  // of AMX; rows of left matrices and results are allocated in multiples of it

// Adds PACK products to each lane: those of a row of the left matrix, which all lanes share, and of LANES columns.
inline floats add_products(floats sum, const float* row, const float* columns) { return sum + *row * load(columns); }

inline floats add_products(floats sum, const bfloat* row, const bfloat* columns) {
    uint32_t pair;
    std::memcpy(&pair, row, sizeof pair);
    words pairs;
    std::memcpy(&pairs, columns, sizeof pairs);
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)pairs);
#else
    return sum + low(pair) * (floats)(pairs << 16) + high(pair) * (floats)(pairs & 0xffff0000u);
#endif
}

// out [R][LANES] (+)= left [R][k] x right [k / PACK][LANES][PACK]; strides in numbers.
template <int R, class T>
void product_of_lanes(
    const T* left, int64_t left_stride, const T* right, int64_t right_stride, int k, float* out, int64_t out_stride, bool add
) {
    floats sum[R];  // in registers, if loops over it are unrolled early
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = add ? load(out + r * out_stride) : floats{};
    for (int i = 0; i < k; i += PACK<T>)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            sum[r] = add_products(sum[r], left + r * left_stride + i, right + i / PACK<T> * right_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(out + r * out_stride, sum[r]);
}

#ifdef __AMX_BF16__
// Compilers do not know that tile instructions read memory: what was stored is to be there.
inline void remember(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// Holds this thread's tile registers, of 64 bytes a row: the last of 16 rows, the others of so many.
class TileRegisters {
public:
    explicit TileRegisters(int64_t count = TILE_ROWS) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } layout;
        std::fill_n(layout.rows, 7, uint8_t(count));
        layout.rows[7] = TILE_ROWS;
        remember(&layout);
        _tile_loadconfig(&layout);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// The same for N tiles of 16 rows and 16 columns; k is a multiple of 32.
template <int N>
void product_of_tiles(
    const bfloat* left, int64_t left_stride, const bfloat* right, int64_t right_stride, int k, float* out,
    int64_t out_stride, bool add
) {
    const int64_t left_bytes = 2 * left_stride, right_bytes = 2 * right_stride, out_bytes = 4 * out_stride;
    const int64_t left_tile = TILE_ROWS * left_stride, out_tile = TILE_ROWS * out_stride;
    remember(out);
    if (add) {
        _tile_loadd(0, out, out_bytes);
        if constexpr (N > 1) _tile_loadd(1, out + out_tile, out_bytes);
        if constexpr (N > 2) _tile_loadd(2, out + 2 * out_tile, out_bytes);
        if constexpr (N > 3) _tile_loadd(3, out + 3 * out_tile, out_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < k; i += 32, left += 32, right += 16 * right_stride) {
        _tile_loadd(7, right, right_bytes);
        _tile_loadd(4, left, left_bytes);
        _tile_dpbf16ps(0, 4, 7);
        if constexpr (N > 1) {
            _tile_loadd(5, left + left_tile, left_bytes);
            _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (N > 2) {
            _tile_loadd(6, left + 2 * left_tile, left_bytes);
            _tile_dpbf16ps(2, 6, 7);
        }
        if constexpr (N > 3) {
            _tile_loadd(4, left + 3 * left_tile, left_bytes);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, out, out_bytes);
    if constexpr (N > 1) _tile_stored(1, out + out_tile, out_bytes);
    if constexpr (N > 2) _tile_stored(2, out + 2 * out_tile, out_bytes);
    if constexpr (N > 3) _tile_stored(3, out + 3 * out_tile, out_bytes);
}
#else
struct TileRegisters {};
#endif

// f(constant, first) for every MOST units of `count`, and for what is left of them.
template <int MOST, class F>
void in_groups(int count, F&& f) {
    int first = 0;
    for (; count - first >= MOST; first += MOST) f(std::integral_constant<int, MOST>(), first);
    if constexpr (MOST > 1)
        if (first < count) in_groups<MOST - 1>(count - first, [&](auto n, int more) { f(n, first + more); });
}

// out [rows][columns] (+)= left [rows][k] x right [k / PACK][columns][PACK]; `columns` is a multiple of 16. Of out, rows up
// to the next multiple of TILE_ROWS may be overwritten.
template <class T>
void product(
    int rows, int columns, const T* left, int64_t left_stride, const T* right, int64_t right_stride, int k, float* out,
    int64_t out_stride, bool add
) {
#ifdef __AMX_BF16__
    if constexpr (PACK<T> == 2)
        if (rows > ROWS && k % 32 == 0) {
            in_groups<4>((rows + TILE_ROWS - 1) / TILE_ROWS, [&](auto n, int tile) {
                const int r = tile * TILE_ROWS;
                for (int c = 0; c < columns; c += 16)
                    product_of_tiles<n()>(
                        left + r * left_stride, left_stride, right + c * 2, right_stride, k, out + r * out_stride + c,
                        out_stride, add
                    );
            });
            return;
        }
#endif
    for (int c = 0; c < columns; c += LANES)
        in_groups<ROWS>(rows, [&](auto n, int r) {
            product_of_lanes<n()>(
                left + r * left_stride, left_stride, right + c * PACK<T>, right_stride, k, out + r * out_stride + c,
                out_stride, add
            );
        });
}

}  // namespace
