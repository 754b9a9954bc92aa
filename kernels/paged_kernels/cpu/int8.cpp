// Linear layers of int8 weights, on CPUs: see int8.py. Each activation is two int8, a high and a low half. Sums of
// products are exact int32, so the three ways to compute them agree in every bit.

#include "kernels.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#if __has_include(<amxint8intrin.h>)
#define PAGED_HAS_TILES
#endif

namespace {

constexpr int64_t BLOCK = 32;  // outputs of one product: two tiles
constexpr int64_t TOKENS = 16;  // of one product: a tile of their high halves, and one of their low halves
constexpr int64_t DEPTH = 64;  // inputs of a tile
constexpr int64_t CHUNK = 128;  // tokens that meet all weights before the next do: they stay in the L2 cache
constexpr float LOW = 254;  // steps of the low half in one of the high half

enum Kind : int64_t { AVX2, VNNI, TILES };

// out [2, TOKENS, BLOCK] = x [depth / DEPTH, 2, TOKENS, DEPTH] times a block of weights, [depth / DEPTH, 2, DEPTH / 4,
// 16, 4]: of each 64 inputs those of 16 outputs, then those of 16 others, four inputs beside each other. Tokens from
// `tokens` on are not defined.
using Product = void (*)(const int8_t* x, int64_t tokens, const int8_t* weight, int64_t depth, int32_t* out);

#ifdef PAGED_HAS_TILES
__attribute__((target("amx-tile,amx-int8"))) void product_tiles(
    const int8_t* x, int64_t, const int8_t* weight, int64_t depth, int32_t* out
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += DEPTH, x += 2 * TOKENS * DEPTH, weight += DEPTH * BLOCK) {
        _tile_loadd(4, x, DEPTH);
        _tile_loadd(5, x + TOKENS * DEPTH, DEPTH);
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + DEPTH * 16, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out, 4 * BLOCK);
    _tile_stored(1, out + 16, 4 * BLOCK);
    _tile_stored(2, out + TOKENS * BLOCK, 4 * BLOCK);
    _tile_stored(3, out + TOKENS * BLOCK + 16, 4 * BLOCK);
}

// All tiles have 16 rows of 64 bytes. Static, since GCC believes that only the first bytes of a configuration are read.
struct alignas(64) Tiles {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
const Tiles tiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

__attribute__((target("amx-tile,amx-int8"))) void begin_tiles() { _tile_loadconfig(&tiles); }

__attribute__((target("amx-tile,amx-int8"))) void end_tiles() { _tile_release(); }
#else
constexpr Product product_tiles = nullptr;
void begin_tiles() {}
void end_tiles() {}
#endif

// Four inputs of a row: a token's high or low halves.
inline int32_t four(const int8_t* x, int64_t row, int64_t k) {
    int32_t bytes;
    std::memcpy(&bytes, x + (k / DEPTH * 2 * TOKENS + row) * DEPTH + k % DEPTH, 4);
    return bytes;
}

// vpdpbusd multiplies unsigned with signed bytes: x + 128, of which 128 times the sum of the weights is taken off.
template <int COUNT>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void tokens_vnni(
    const int8_t* x, const int8_t* weight, int64_t depth, int32_t* out
) {
    __m512i sums[2][COUNT][2], offset[2];
    for (int i = 0; i < 2; i++) {
        offset[i] = _mm512_setzero_si512();
        for (auto& plane : sums)
            for (auto& token : plane) token[i] = _mm512_setzero_si512();
    }
    const __m512i half = _mm512_set1_epi8(int8_t(0x80));
    for (int64_t k = 0; k < depth; k += 4) {
        const int8_t* at = weight + k / DEPTH * DEPTH * BLOCK + k % DEPTH * 16;
        const __m512i w[2] = {_mm512_loadu_si512(at), _mm512_loadu_si512(at + DEPTH * 16)};
        for (int i = 0; i < 2; i++) offset[i] = _mm512_dpbusd_epi32(offset[i], half, w[i]);
        for (int plane = 0; plane < 2; plane++)
            for (int token = 0; token < COUNT; token++) {
                const __m512i four_x = _mm512_set1_epi32(four(x, plane * TOKENS + token, k));
                const __m512i bytes = _mm512_xor_si512(four_x, half);
                for (int i = 0; i < 2; i++)
                    sums[plane][token][i] = _mm512_dpbusd_epi32(sums[plane][token][i], bytes, w[i]);
            }
    }
    for (int plane = 0; plane < 2; plane++)
        for (int token = 0; token < COUNT; token++)
            for (int i = 0; i < 2; i++) {
                const __m512i sum = _mm512_sub_epi32(sums[plane][token][i], offset[i]);
                _mm512_storeu_si512(out + (plane * TOKENS + token) * BLOCK + i * 16, sum);
            }
}

void product_vnni(const int8_t* x, int64_t tokens, const int8_t* weight, int64_t depth, int32_t* out) {
    int64_t token = 0;
    for (; token + 4 <= tokens; token += 4) tokens_vnni<4>(x + token * DEPTH, weight, depth, out + token * BLOCK);
    for (; token < tokens; token++) tokens_vnni<1>(x + token * DEPTH, weight, depth, out + token * BLOCK);
}

// vpmaddubsw multiplies unsigned with signed bytes and saturates sums of two at 32767: |x| times w with the sign of x
// keeps below, at 2 * 127 * 127.
__attribute__((target("avx2"))) void product_avx2(
    const int8_t* x, int64_t tokens, const int8_t* weight, int64_t depth, int32_t* out
) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t row = 0; row < 2 * TOKENS; row++) {
        if (row % TOKENS >= tokens) continue;
        __m256i sums[4];
        for (auto& sum : sums) sum = _mm256_setzero_si256();
        for (int64_t k = 0; k < depth; k += 4) {
            const int8_t* at = weight + k / DEPTH * DEPTH * BLOCK + k % DEPTH * 16;
            const __m256i bytes = _mm256_set1_epi32(four(x, row, k)), size = _mm256_abs_epi8(bytes);
            for (int i = 0; i < 4; i++) {
                const __m256i w = _mm256_loadu_si256((const __m256i*)(at + i / 2 * DEPTH * 16 + i % 2 * 32));
                const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w, bytes));
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
            }
        }
        for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i*)(out + row * BLOCK + i * 8), sums[i]);
    }
}

// x [width] is about (high + low / LOW) times what is returned, NaN if any x is no number. Of each 64 inputs the high
// halves are at `out` [depth / DEPTH, 2, TOKENS, DEPTH], the low ones TOKENS rows below; zero beyond width.
template <class T>
float quantize(const T* x, int8_t* out, int64_t width) {
    int32_t largest = 0;  // as bits: floats without sign are ordered as integers are, NaN above all
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; i++) {
        const float value = std::fabs(to_float(x[i]));
        int32_t bits;
        std::memcpy(&bits, &value, 4);
        largest = std::max(largest, bits);
    }
    float size;
    std::memcpy(&size, &largest, 4);
    const float factor = size > 1e-30f && size < INFINITY ? 127 / size : 0;
    for (int64_t k = 0; k < width; k += DEPTH, x += DEPTH, out += 2 * TOKENS * DEPTH) {
        const int64_t count = std::min(DEPTH, width - k);
        int8_t *high = out, *low = out + TOKENS * DEPTH;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            const float steps = to_float(x[i]) * factor, whole = std::nearbyint(steps);
            high[i] = int8_t(int32_t(whole));
            low[i] = int8_t(int32_t(std::nearbyint((steps - whole) * LOW)));
        }
        std::memset(high + count, 0, DEPTH - count);
        std::memset(low + count, 0, DEPTH - count);
    }
    return size < INFINITY ? size / 127 : NAN;
}

}  // namespace

template <class T>
void paged::int8_linear(
    Team& team, const T* x, const int8_t* weight, const float* scales, const T* bias, T* out, int8_t* quantized,
    float* factors, int64_t tokens, int64_t width, int64_t outputs, int64_t kind
) {
    const int64_t depth = (width + DEPTH - 1) / DEPTH * DEPTH, blocks = (outputs + BLOCK - 1) / BLOCK;
    const int64_t tasks = blocks * ((tokens + CHUNK - 1) / CHUNK);
    if (kind == TILES && tokens == 1) kind = VNNI;  // a tenth faster there
    const Product product = kind == TILES ? product_tiles : kind == VNNI ? product_vnni : product_avx2;
    team.share(tokens, [&](int64_t token) {
        int8_t* to = quantized + token / TOKENS * 2 * TOKENS * depth + token % TOKENS * DEPTH;
        factors[token] = quantize(x + token * width, to, width);
    });
    if (kind == TILES) begin_tiles();
    team.share(tasks, [&](int64_t task) {
        const int64_t begin = task / blocks * CHUNK, end = std::min(tokens, begin + CHUNK);
        const int64_t block = task % blocks, column = block * BLOCK, columns = std::min(BLOCK, outputs - column);
        alignas(64) int32_t sums[2][TOKENS][BLOCK];
        for (int64_t first = begin; first < end; first += TOKENS) {
            const int64_t count = std::min(TOKENS, end - first);
            product(quantized + first * 2 * depth, count, weight + block * BLOCK * depth, depth, sums[0][0]);
            for (int64_t token = 0; token < count; token++) {
                const int32_t *high = sums[0][token], *low = sums[1][token];
                T* to = out + (first + token) * outputs + column;
                const float factor = factors[first + token];
                float values[BLOCK];
#pragma omp simd
                for (int64_t i = 0; i < BLOCK; i++)
                    values[i] = (float(high[i]) + float(low[i]) * (1 / LOW)) * scales[column + i] * factor;
                if (bias)
                    for (int64_t i = 0; i < columns; i++) values[i] += to_float(bias[column + i]);
                if (columns == BLOCK) {
#pragma omp simd
                    for (int64_t i = 0; i < BLOCK; i++) store(to + i, values[i]);
                } else {
                    for (int64_t i = 0; i < columns; i++) store(to + i, values[i]);
                }
            }
        }
    });
    if (kind == TILES) end_tiles();
}

int64_t paged::int8_bytes(int64_t tokens, int64_t width) {
    return (tokens + TOKENS - 1) / TOKENS * 2 * TOKENS * ((width + DEPTH - 1) / DEPTH * DEPTH);
}

// Whether this process may use tiles, where the CPU has them: Linux wants to be asked.
extern "C" int paged_may_use_tiles() {
#ifdef PAGED_HAS_TILES
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

#define EXPORT_LINEAR(NAME, T)                                                                                       \
    template void paged::int8_linear(                                                                                \
        Team&, const T* x, const int8_t*, const float*, const T*, T*, int8_t*, float*, int64_t, int64_t, int64_t,    \
        int64_t                                                                                                      \
    );                                                                                                               \
    extern "C" void paged_int8_linear_##NAME(                                                                        \
        const T* x, const int8_t* weight, const float* scales, const T* bias, T* out, int8_t* quantized,             \
        float* factors, int64_t tokens, int64_t width, int64_t outputs, int64_t kind, int threads                      \
    ) {                                                                                                              \
        paged::in_team(threads, [&](paged::Team& team) {                                                             \
            paged::int8_linear(                                                                                      \
                team, x, weight, scales, bias, out, quantized, factors, tokens, width, outputs, kind                 \
            );                                                                                                       \
        });                                                                                                          \
    }
EXPORT_LINEAR(float32, float)
EXPORT_LINEAR(bfloat16, bfloat)
