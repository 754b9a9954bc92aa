// Attention over a paged KV cache on CPUs: writes a step's K and V, then attends through the block tables.
//
// Online softmax over tiles of keys (Dao et al., 2022), query heads of one KV head together, so that K and V are read
// once for all of them. Compiled once for each set of instructions; there is no dependence on torch.
//
// Layout of a block, per KV head: K is [key_dim / P][block_size][P], V is [block_size / P][value_dim][P], with P = 2
// for bfloat16 (what one dot-product instruction takes) and P = 1 for float32.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;  // keys whose scores one vector has
constexpr int TILE = 128;  // keys between two rescalings
constexpr int ROWS = 8;    // rows of queries that share a load of K or V
constexpr int MOST_ROWS = 64;   // of a task, unless one query has more
constexpr int LEAST_KEYS = 512;  // of a task that shares its queries with others
constexpr int MOST_DIM = 512;
constexpr float NOTHING = -INFINITY;

inline float tanh_of(float x) {
    float e = exp_of(-2.0f * std::fabs(x));
    return std::copysign((1.0f - e) / (1.0f + e), x);
}

}  // namespace

extern "C" {

// One layer of one step. Mirrored in attention.py: keep both alike.
struct Step {
    void *query, *key, *value;  // [tokens, heads, dim], the last dimension contiguous
    void *key_cache, *value_cache, *out;  // out: [tokens, heads, value_dim]
    const float* sinks;                   // [heads] or null
    const int64_t* slot_mapping;          // [tokens]
    const int32_t* tables;                // [rows, table_width]
    const int32_t *starts, *counts, *offsets;  // [rows]: first position, tokens, and where these are in the batch
    int64_t query_strides[2], key_strides[2], value_strides[2];  // of token and head, in elements
    int32_t rows, tokens, table_width, threads;
    int32_t heads, kv_heads, key_dim, value_dim, block_size, window, chunk;  // window, chunk: 0 for none
    float scale, softcap;                                                    // softcap: 0 for none
    // Before all that, in place: the RMS norm of each head of queries and keys, times a weight, [key_dim] or null, and
    // the rotation of its first `rotated` dimensions, by cosines and then sines, [positions, rotated]. Pairs are
    // neighbours if `interleaved`, else halves.
    const float *query_norm, *key_norm, *cos_sin;
    float norm_eps;
    int32_t rotated, interleaved;
};
}

namespace {

// Some queries of one row, those of one KV head, and the keys that they are to meet.
struct Task {
    int row, head, first, count, from, to;

    int64_t cost() const { return int64_t(count) * (to - from); }

    // One of `parts` pieces of the keys, which may be empty.
    void narrow(int part, int parts) {
        const int keys = std::max(LEAST_KEYS, ((to - from + parts - 1) / parts + TILE - 1) / TILE * TILE), end = to;
        from = std::min(end, from + part * keys);
        to = std::min(end, from + keys);
    }
};

struct Scratch {
    std::vector<float> query, scores, weights, block;

    Scratch(const Step& s, int rows)
        : query(int64_t(rows) * s.key_dim),
          scores(int64_t(rows) * TILE),
          weights(int64_t(rows) * TILE),
          block(int64_t(s.block_size) * s.value_dim) {}
};

template <class T>
struct Kernel {
    static constexpr int P = sizeof(T) == 2 ? 2 : 1;

    const Step& s;
    const int group;
    const int64_t key_block, value_block;  // elements of a block of one head

    explicit Kernel(const Step& step)
        : s(step),
          group(step.heads / step.kv_heads),
          key_block(int64_t(step.key_dim) * step.block_size),
          value_block(int64_t(step.value_dim) * step.block_size) {}

    const T* keys(int block, int head) const {
        return static_cast<const T*>(s.key_cache) + (int64_t(block) * s.kv_heads + head) * key_block;
    }

    const T* values(int block, int head) const {
        return static_cast<const T*>(s.value_cache) + (int64_t(block) * s.kv_heads + head) * value_block;
    }

    // One head of a query or key, in float32.
    void turn(T* head, const float* norm, int position) const {
        float x[MOST_DIM];
        for (int d = 0; d < s.key_dim; d++) x[d] = to_float(head[d]);
        if (norm) {
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int d = 0; d < s.key_dim; d++) squares += x[d] * x[d];
            const float factor = 1 / std::sqrt(squares / s.key_dim + s.norm_eps);
            for (int d = 0; d < s.key_dim; d++) x[d] *= factor * norm[d];
        }
        const int half = s.rotated / 2, step = s.interleaved ? 2 : 1, apart = s.interleaved ? 1 : half;
        const float *cosines = s.cos_sin + int64_t(position) * s.rotated, *sines = cosines + half;
        for (int d = 0; d < half; d++) {
            const float first = x[d * step], second = x[d * step + apart];
            x[d * step] = first * cosines[d] - second * sines[d];
            x[d * step + apart] = second * cosines[d] + first * sines[d];
        }
        for (int d = 0; d < s.key_dim; d++) store(head + d, x[d]);
    }

    void prepare(int token, int position) const {
        if (!s.cos_sin && !s.query_norm) return;
        for (int head = 0; head < s.heads; head++)
            turn(static_cast<T*>(s.query) + token * s.query_strides[0] + head * s.query_strides[1], s.query_norm, position);
        for (int head = 0; head < s.kv_heads; head++)
            turn(static_cast<T*>(s.key) + token * s.key_strides[0] + head * s.key_strides[1], s.key_norm, position);
    }

    void write(int token) const {
        const int64_t block = s.slot_mapping[token] / s.block_size, at = s.slot_mapping[token] % s.block_size;
        for (int head = 0; head < s.kv_heads; head++) {
            const T* key = static_cast<const T*>(s.key) + token * s.key_strides[0] + head * s.key_strides[1];
            const T* value = static_cast<const T*>(s.value) + token * s.value_strides[0] + head * s.value_strides[1];
            T* key_to = const_cast<T*>(keys(block, head)) + at * P;
            T* value_to = const_cast<T*>(values(block, head)) + (at / P) * s.value_dim * P + at % P;
            for (int d = 0; d < s.key_dim; d += P) std::memcpy(key_to + d * s.block_size, key + d, sizeof(T) * P);
            for (int d = 0; d < s.value_dim; d++) value_to[d * P] = value[d];
        }
    }

    // Scores of `rows` queries, [rows][key_dim], with LANES keys of a block from `at` on.
    template <int R>
    void score(const T* query, const T* key, float* out, int stride) const {
#ifdef __AVX512BF16__
        if constexpr (P == 2) {
            __m512 sum[R];
            for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
            const int pairs = s.key_dim / 2;
            const uint32_t* q = reinterpret_cast<const uint32_t*>(query);
            for (int d = 0; d < pairs; d++) {
                __m512bh k = (__m512bh)_mm512_loadu_si512(key + int64_t(d) * s.block_size * 2);
                for (int r = 0; r < R; r++)
                    sum[r] = _mm512_dpbf16_ps(sum[r], k, (__m512bh)_mm512_set1_epi32(int(q[r * pairs + d])));
            }
            for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride, sum[r]);
            return;
        }
#endif
        float sum[R][LANES] = {};
        for (int d = 0; d < s.key_dim; d += P) {
            const T* k = key + int64_t(d) * s.block_size;
            for (int r = 0; r < R; r++) {
                if constexpr (P == 2) {
                    const float q0 = to_float(query[r * s.key_dim + d]), q1 = to_float(query[r * s.key_dim + d + 1]);
                    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(k);
#pragma omp simd
                    for (int i = 0; i < LANES; i++) sum[r][i] += q0 * low(pairs[i]) + q1 * high(pairs[i]);
                } else {
                    const float q = query[r * s.key_dim + d];
#pragma omp simd
                    for (int i = 0; i < LANES; i++) sum[r][i] += q * k[i];
                }
            }
        }
        for (int r = 0; r < R; r++) std::memcpy(out + r * stride, sum[r], sizeof sum[r]);
    }

    // Adds to `out` [rows][value_dim] what `rows` queries take of `count` keys; `weights` is [rows][TILE].
    template <int R>
    void take(const T* value, const T* weights, int count, float* out) const {
        for (int d = 0; d < s.value_dim; d += LANES) {
#ifdef __AVX512BF16__
            if constexpr (P == 2) {
                __m512 sum[R];
                for (int r = 0; r < R; r++) sum[r] = _mm512_loadu_ps(out + r * s.value_dim + d);
                for (int j = 0; j < count; j += 2) {
                    __m512bh v = (__m512bh)_mm512_loadu_si512(value + int64_t(j) * s.value_dim + d * 2);
                    for (int r = 0; r < R; r++) {
                        int32_t pair;
                        std::memcpy(&pair, weights + r * TILE + j, 4);
                        sum[r] = _mm512_dpbf16_ps(sum[r], v, (__m512bh)_mm512_set1_epi32(pair));
                    }
                }
                for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * s.value_dim + d, sum[r]);
                continue;
            }
#endif
            float sum[R][LANES];
            for (int r = 0; r < R; r++) std::memcpy(sum[r], out + r * s.value_dim + d, sizeof sum[r]);
            for (int j = 0; j < count; j += P) {
                const T* v = value + int64_t(j) * s.value_dim + d * P;
                for (int r = 0; r < R; r++) {
                    const float w = to_float(weights[r * TILE + j]);
                    if constexpr (P == 2) {
                        const float w1 = to_float(weights[r * TILE + j + 1]);
                        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(v);
#pragma omp simd
                        for (int i = 0; i < LANES; i++) sum[r][i] += w * low(pairs[i]) + w1 * high(pairs[i]);
                    } else {
#pragma omp simd
                        for (int i = 0; i < LANES; i++) sum[r][i] += w * v[i];
                    }
                }
            }
            for (int r = 0; r < R; r++) std::memcpy(out + r * s.value_dim + d, sum[r], sizeof sum[r]);
        }
    }

    template <class F>
    static void by_rows(int rows, F&& f) {
        for (int r = 0; r < rows; r += ROWS) {
            switch (std::min(ROWS, rows - r)) {
                case 1: f(std::integral_constant<int, 1>(), r); break;
                case 2: f(std::integral_constant<int, 2>(), r); break;
                case 3: f(std::integral_constant<int, 3>(), r); break;
                case 4: f(std::integral_constant<int, 4>(), r); break;
                case 5: f(std::integral_constant<int, 5>(), r); break;
                case 6: f(std::integral_constant<int, 6>(), r); break;
                case 7: f(std::integral_constant<int, 7>(), r); break;
                default: f(std::integral_constant<int, 8>(), r);
            }
        }
    }

    // First position that the query at `position` sees.
    int first_seen(int position) const {
        int first = s.window ? std::max(0, position - s.window + 1) : 0;
        return s.chunk ? std::max(first, position / s.chunk * s.chunk) : first;
    }

    void attend(const Task& task, Scratch& scratch, float* out, float* most, float* sum) const {
        const int rows = task.count * group, position = s.starts[task.row] + task.first;
        const int32_t* table = s.tables + int64_t(task.row) * s.table_width;
        const int seen_from = std::max(task.from, first_seen(position));
        const int seen_to = std::min(task.to, position + task.count);
        T* query = reinterpret_cast<T*>(scratch.query.data());
        for (int r = 0; r < rows; r++) {
            const int64_t token = s.offsets[task.row] + task.first + r / group, head = task.head * group + r % group;
            const T* from = static_cast<const T*>(s.query) + token * s.query_strides[0] + head * s.query_strides[1];
            std::memcpy(query + r * s.key_dim, from, sizeof(T) * s.key_dim);
        }
        std::fill(out, out + rows * s.value_dim, 0.0f);
        std::fill(most, most + rows, NOTHING);
        std::fill(sum, sum + rows, 0.0f);
        float* scores = scratch.scores.data();
        T* weights = reinterpret_cast<T*>(scratch.weights.data());
        for (int tile = task.from; tile < seen_to; tile += TILE) {
            const int end = std::min(tile + TILE, seen_to);
            if (end <= seen_from) continue;
            for (int at = tile; at < end; at += s.block_size) {
                const T* block = keys(table[at / s.block_size], task.head);
                if (rows <= ROWS && at + 2 * s.block_size < seen_to) {
                    const int next = table[at / s.block_size + 2];
                    fetch(keys(next, task.head), key_block);
                    fetch(values(next, task.head), value_block);
                }
                for (int lane = 0; lane < s.block_size && at + lane < end; lane += LANES)
                    by_rows(rows, [&](auto R, int r) {
                        score<R()>(query + r * s.key_dim, block + lane * P, scores + r * TILE + at + lane - tile, TILE);
                    });
            }
            for (int r = 0; r < rows; r++) {
                const int own = position + r / group;
                const int lo = std::clamp(first_seen(own), tile, end) - tile;
                const int hi = std::clamp(own + 1, tile + lo, end) - tile;
                const float before = most[r];
                weigh(scores + r * TILE, lo, hi, weights + r * TILE, most[r], sum[r]);
                if (before != most[r] && before != NOTHING) {
                    const float shrink = exp_of(before - most[r]);
#pragma omp simd
                    for (int d = 0; d < s.value_dim; d++) out[r * s.value_dim + d] *= shrink;
                }
            }
            for (int at = tile; at < end; at += s.block_size) {
                if (at + s.block_size <= seen_from) continue;
                const T* block = values(table[at / s.block_size], task.head);
                // What nobody sees may be anything, even NaN, which no weight of 0 removes.
                if (at < seen_from || at + s.block_size > seen_to)
                    block = seen_only(block, seen_from - at, seen_to - at, scratch);
                by_rows(rows, [&](auto R, int r) {
                    take<R()>(block, weights + r * TILE + at - tile, s.block_size, out + r * s.value_dim);
                });
            }
        }
    }

    // Weights of one row's keys lo..hi of a tile, 0 for the others; `most` and `sum` are of all tiles so far.
    void weigh(float* scores, int lo, int hi, T* weights, float& most, float& sum) const {
        float top = most;
        if (s.softcap) {
            const float inner = s.scale / s.softcap;
#pragma omp simd
            for (int j = lo; j < hi; j++) scores[j] = s.softcap * tanh_of(scores[j] * inner);
        } else {
#pragma omp simd
            for (int j = lo; j < hi; j++) scores[j] *= s.scale;
        }
#pragma omp simd reduction(max : top)
        for (int j = lo; j < hi; j++) top = std::max(top, scores[j]);
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int j = lo; j < hi; j++) {
            scores[j] = exp_of(scores[j] - top);
            total += scores[j];
        }
        for (int j = 0; j < lo; j++) scores[j] = 0;
        for (int j = hi; j < TILE; j++) scores[j] = 0;
        for (int j = 0; j < TILE; j++) store(weights + j, scores[j]);
        sum = (most == NOTHING ? 0.0f : sum * exp_of(most - top)) + total;
        most = top;
    }

    const T* seen_only(const T* block, int from, int to, Scratch& scratch) const {
        T* copy = reinterpret_cast<T*>(scratch.block.data());
        std::memcpy(copy, block, sizeof(T) * value_block);
        for (int j = 0; j < s.block_size; j++)
            if (j < from || j >= to)
                for (int d = 0; d < s.value_dim; d++) copy[(j / P * s.value_dim + d) * P + j % P] = T{};
        return copy;
    }

    static void fetch(const T* from, int64_t count) {
        for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
    }

    // Normalises what `parts` partial results, [parts][rows][value_dim], are together.
    void finish(const Task& task, int parts, float* out, const float* most, const float* sum) const {
        const int rows = task.count * group;
        for (int r = 0; r < rows; r++) {
            const int64_t token = s.offsets[task.row] + task.first + r / group, head = task.head * group + r % group;
            float top = s.sinks ? s.sinks[head] : NOTHING, total = 0;
            for (int part = 0; part < parts; part++) top = std::max(top, most[part * rows + r]);
            if (s.sinks) total = exp_of(s.sinks[head] - top);
            float* all = out + int64_t(r) * s.value_dim;
            for (int part = 0; part < parts; part++) {
                const float most_here = most[part * rows + r];
                const float share = most_here == NOTHING ? 0.0f : exp_of(most_here - top);
                const float* here = out + (int64_t(part) * rows + r) * s.value_dim;
                total += share * sum[part * rows + r];
                if (part == 0)
                    for (int d = 0; d < s.value_dim; d++) all[d] *= share;
                else
                    for (int d = 0; d < s.value_dim; d++) all[d] += share * here[d];
            }
            T* to = static_cast<T*>(s.out) + (token * s.heads + head) * s.value_dim;
            for (int d = 0; d < s.value_dim; d++) store(to + d, all[d] / total);
        }
    }
};

// The queries of a step, cut up by KV head and by rows of at most MOST_ROWS.
template <class T>
std::vector<Task> cut_up(const Kernel<T>& kernel) {
    const Step& s = kernel.s;
    const int most = std::max(1, MOST_ROWS / kernel.group);
    std::vector<Task> tasks;
    for (int row = 0; row < s.rows; row++)
        for (int first = 0; first < s.counts[row]; first += most) {
            const int count = std::min(most, s.counts[row] - first), position = s.starts[row] + first;
            const int from = kernel.first_seen(position) / s.block_size * s.block_size;
            for (int head = 0; head < s.kv_heads; head++)
                tasks.push_back({row, head, first, count, from, position + count});
        }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
    return tasks;
}

template <class T>
void run(const Step& s) {
    const Kernel<T> kernel(s);
    const std::vector<Task> tasks = cut_up(kernel);
    const int count = int(tasks.size());
    // Few tasks share out their keys, so that every thread has some.
    const int parts = count >= 2 * s.threads ? 1 : (4 * s.threads + count - 1) / count;
    int rows = 0;
    for (const Task& task : tasks) rows = std::max(rows, task.count * kernel.group);
    std::vector<float> out, most, sum;
    if (parts > 1) {
        out.resize(int64_t(count) * parts * rows * s.value_dim);
        most.resize(int64_t(count) * parts * rows);
        sum.resize(most.size());
    }
#pragma omp parallel num_threads(s.threads)
    {
        Scratch scratch(s, rows);
#pragma omp for schedule(static)
        for (int token = 0; token < s.tokens; token++) {
            const int row = int(std::upper_bound(s.offsets, s.offsets + s.rows, token) - s.offsets) - 1;
            kernel.prepare(token, s.starts[row] + token - s.offsets[row]);
            kernel.write(token);
        }
        if (parts == 1) {
            std::vector<float> own(int64_t(rows) * s.value_dim), own_most(rows), own_sum(rows);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count; i++) {
                kernel.attend(tasks[i], scratch, own.data(), own_most.data(), own_sum.data());
                kernel.finish(tasks[i], 1, own.data(), own_most.data(), own_sum.data());
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count * parts; i++) {
                Task task = tasks[i / parts];
                const int64_t n = task.count * kernel.group, at = int64_t(i / parts) * parts * rows + i % parts * n;
                task.narrow(i % parts, parts);
                kernel.attend(task, scratch, &out[at * s.value_dim], &most[at], &sum[at]);
            }
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count; i++) {
                const int64_t at = int64_t(i) * parts * rows;
                kernel.finish(tasks[i], parts, &out[at * s.value_dim], &most[at], &sum[at]);
            }
        }
    }
}

}  // namespace

extern "C" void paged_attention_float32(const Step* step) { run<float>(*step); }
extern "C" void paged_attention_bfloat16(const Step* step) { run<bfloat>(*step); }
