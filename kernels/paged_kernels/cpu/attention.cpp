// Attention over a paged KV cache on CPUs: writes a step's K and V, then attends through the block tables.
//
// Online softmax over tiles of keys (Dao et al., 2022), query heads of one KV head together, so that K and V are read
// once for all of them. Compiled once for each set of instructions; there is no dependence on torch.
//
// Layout of a block, per KV head: K is [key_dim / P][block_size][P], V is [block_size / P][value_dim][P], with P = 2
// for bfloat16 (what one dot-product instruction takes) and P = 1 for float32.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "product.h"

namespace {

constexpr int TILE = 256;        // keys between two rescalings
constexpr int BLOCK_ROWS = 48;   // rows whose scores for a tile are computed at once
constexpr int MOST_ROWS = 384;   // of a task, unless one query has more
constexpr int LEAST_KEYS = 512;  // of a piece of a task, for each 8 of its rows
constexpr int PIECES = 128;      // about as many for a step, if its tasks are long enough to be cut
constexpr int AHEAD = 2;         // blocks of which the memory is asked before they are needed
constexpr int MOST_DIM = 512;
constexpr float NOTHING = -INFINITY;
constexpr float LOG2_E = 1.44269504088896341f;

inline floats tanh_of(floats x) {
    const floats e = exp2_of(x < 0 ? x * (2 * LOG2_E) : x * (-2 * LOG2_E)), magnitude = (1 - e) / (1 + e);
    return x < 0 ? -magnitude : magnitude;
}

// Some queries of one row, those of one KV head, and the keys that they are to meet.
struct Task {
    int row, head, first, count, from, to;
    int parts = 1;     // pieces that it is cut into
    int64_t kept = 0;  // where the results of a piece are kept until all are there: a row of `Pieces`

    int64_t cost() const { return int64_t(count) * (to - from); }
};

// What a thread needs for a task of at most `rows` rows.
template <class T>
class Scratch {
public:
    T *query, *values, *weights;      // [rows][key_dim], a tile's or block's V, [BLOCK_ROWS][TILE]
    float *scores, *out, *most, *sum;  // [BLOCK_ROWS][TILE], [rows][value_dim], [rows], [rows]
    float* sums;                       // [rows][LANES], whose sum `sum` is

    Scratch(const Attention& s, int rows) {
        const int64_t all = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS, some = std::min<int64_t>(all, BLOCK_ROWS);
        query = allocate<T>(all * s.key_dim);
        values = allocate<T>(int64_t(TILE) * s.value_dim);
        weights = allocate<T>(some * TILE);
        scores = allocate<float>(some * TILE);
        out = allocate<float>(all * s.value_dim);
        most = allocate<float>(all);
        sum = allocate<float>(all);
        sums = allocate<float>(all * LANES);
    }

private:
    std::vector<std::vector<floats>> memory;

    template <class N>
    N* allocate(int64_t count) {
        memory.emplace_back((count * sizeof(N) + sizeof(floats) - 1) / sizeof(floats));
        return reinterpret_cast<N*>(memory.back().data());
    }
};

template <class T>
struct Kernel {
    static constexpr int P = PACK<T>;

    const Attention& s;
    const Batch& b;
    const int group;
    const int64_t key_block, value_block;  // elements of a block of one head

    explicit Kernel(const Attention& layer)
        : s(layer),
          b(*layer.batch),
          group(layer.heads / layer.kv_heads),
          key_block(int64_t(layer.key_dim) * layer.block_size),
          value_block(int64_t(layer.value_dim) * layer.block_size) {}

    const T* keys(int block, int head) const {
        return static_cast<const T*>(s.key_cache) + (int64_t(block) * s.kv_heads + head) * key_block;
    }

    const T* values(int block, int head) const {
        return static_cast<const T*>(s.value_cache) + (int64_t(block) * s.kv_heads + head) * value_block;
    }

    // One head of a query or key, in float32.
    void turn(T* head, const float* norm, int position) const {
        float x[MOST_DIM];
        for (int d = 0; d < s.key_dim; d += LANES) store(x + d, load(head + d));
        if (norm) {
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int d = 0; d < s.key_dim; d++) squares += x[d] * x[d];
            const float factor = 1 / std::sqrt(squares / s.key_dim + s.norm_eps);
            for (int d = 0; d < s.key_dim; d++) x[d] *= factor * norm[d];
        }
        const int half = s.rotated / 2;
        const float *cosines = s.cos_sin + int64_t(position) * s.rotated, *sines = cosines + half;
        const auto rotate = [&](float& first, float& second, int d) {
            const float turned = first * cosines[d] - second * sines[d];
            second = second * cosines[d] + first * sines[d];
            first = turned;
        };
        if (s.interleaved) {
#pragma omp simd
            for (int d = 0; d < half; d++) rotate(x[2 * d], x[2 * d + 1], d);
        } else {
#pragma omp simd
            for (int d = 0; d < half; d++) rotate(x[d], x[d + half], d);
        }
        for (int d = 0; d < s.key_dim; d += LANES) store(head + d, load(x + d));
    }

    void prepare(int token, int position) const {
        if (!s.cos_sin && !s.query_norm) return;
        for (int head = 0; head < s.heads; head++)
            turn(static_cast<T*>(s.query) + token * s.query_strides[0] + head * s.query_strides[1], s.query_norm, position);
        for (int head = 0; head < s.kv_heads; head++)
            turn(static_cast<T*>(s.key) + token * s.key_strides[0] + head * s.key_strides[1], s.key_norm, position);
    }

    // V of two tokens that share the words of a block is written by the first of them.
    void write(int token) const {
        const int64_t slot = b.slot_mapping[token], block = slot / s.block_size, at = slot % s.block_size;
        const bool first = P == 2 && slot % 2 == 0 && token + 1 < b.tokens && b.slot_mapping[token + 1] == slot + 1;
        const bool second = P == 2 && slot % 2 == 1 && token > 0 && b.slot_mapping[token - 1] == slot - 1;
        for (int head = 0; head < s.kv_heads; head++) {
            const T* key = static_cast<const T*>(s.key) + token * s.key_strides[0] + head * s.key_strides[1];
            const T* value = static_cast<const T*>(s.value) + token * s.value_strides[0] + head * s.value_strides[1];
            T* key_to = const_cast<T*>(keys(block, head)) + at * P;
            T* value_to = const_cast<T*>(values(block, head)) + (at / P) * s.value_dim * P + at % P;
            for (int d = 0; d < s.key_dim; d += P) std::memcpy(key_to + d * s.block_size, key + d, sizeof(T) * P);
            if constexpr (P == 2)
                if (first)
                    for (int d = 0; d < s.value_dim; d += LANES)
                        store_pairs(value_to + d * P, value + d, value + s.value_strides[0] + d);
            if (!first && !second)
                for (int d = 0; d < s.value_dim; d++) value_to[d * P] = value[d];
        }
    }

    // First position that the query at `position` sees.
    int first_seen(int position) const {
        int first = s.window ? std::max(0, position - s.window + 1) : 0;
        return s.chunk ? std::max(first, position / s.chunk * s.chunk) : first;
    }

    // What a task's queries take of its keys: `out`, `most` and `sum` of scratch.
    void attend(const Task& task, const Task* next, Scratch<T>& scratch) const {
        const int rows = task.count * group, position = b.starts[task.row] + task.first;
        const bool many = rows > ROWS;    // then V is copied: its blocks become one of a whole tile
        const int unit = many ? 32 : 16;  // keys whose V is multiplied at once
        const int seen_from = std::max(task.from, first_seen(position));
        const int seen_to = std::min(task.to, position + task.count);
        for (int r = 0; r < rows; r++) {
            const int64_t token = b.offsets[task.row] + task.first + r / group, head = task.head * group + r % group;
            const T* from = static_cast<const T*>(s.query) + token * s.query_strides[0] + head * s.query_strides[1];
            std::memcpy(scratch.query + r * s.key_dim, from, sizeof(T) * s.key_dim);
        }
        std::fill_n(scratch.out, int64_t(rows) * s.value_dim, 0.0f);
        std::fill_n(scratch.most, rows, NOTHING);
        std::fill_n(scratch.sums, rows * LANES, 0.0f);
        for (int tile = seen_from / TILE * TILE; tile < seen_to; tile += TILE) {
            const T* tile_values = many ? seen_values(task, tile, TILE, seen_from, seen_to, scratch.values) : nullptr;
            for (int first = 0; first < rows; first += BLOCK_ROWS) {
                const int some = std::min(BLOCK_ROWS, rows - first), last = first + some - 1;
                const int lo = std::max({tile, seen_from, first_seen(position + first / group)}) - tile;
                const int hi = std::min({tile + TILE, seen_to, position + last / group + 1}) - tile;
                if (lo >= hi) continue;
                score(task, next, tile, lo, hi, some, scratch.query + first * s.key_dim, seen_to, scratch.scores);
                const int from = lo / unit * unit, to = (hi + unit - 1) / unit * unit;
                float* out = scratch.out + int64_t(first) * s.value_dim;
                for (int r = 0; r < some; r++) {
                    const int own = position + (first + r) / group;
                    const int own_lo = std::max(first_seen(own) - tile, lo), own_hi = std::min(own + 1 - tile, hi);
                    T* weights = scratch.weights + r * TILE;
                    const float shrink = weigh(
                        scratch.scores + r * TILE, own_lo, own_hi, weights, from, to, scratch.most[first + r],
                        scratch.sums + (first + r) * LANES
                    );
                    if (shrink != 1)
                        for (int d = 0; d < s.value_dim; d += LANES) scale(out + r * s.value_dim + d, shrink);
                }
                const int together = many ? TILE : s.block_size;
                for (int at = from / together * together; at < to; at += together) {
                    const int begin = std::max(from, at), count = std::min(to, at + together) - begin;
                    const T* values = many ? tile_values : seen_values(task, tile + at, together, seen_from, seen_to, scratch.values);
                    product(
                        some, s.value_dim, scratch.weights + begin, TILE, values + (begin - at) * s.value_dim,
                        s.value_dim * P, count, out, s.value_dim, true
                    );
                }
            }
        }
        for (int r = 0; r < rows; r++) scratch.sum[r] = sum_of(load(scratch.sums + r * LANES));
    }

    // Scores of `rows` queries for keys lo..hi of a tile, and others next to them.
    void score(
        const Task& task, const Task* next, int tile, int lo, int hi, int rows, const T* query, int seen_to, float* scores
    ) const {
        const int32_t* table = b.tables + int64_t(task.row) * b.table_width;
        for (int j = lo / 16 * 16; j < hi; j += 16) {
            const int block = (tile + j) / s.block_size, lane = (tile + j) % s.block_size;
            if (rows <= ROWS && lane == 0) fetch_ahead(task, next, block, seen_to);
            const T* key = keys(table[block], task.head) + lane * P;
            product(rows, 16, query, s.key_dim, key, s.block_size * P, s.key_dim, scores + j, TILE, false);
        }
    }

    // Weights of one row for keys from..to of a tile: 0 but for lo..hi. `most` and `sums` are of all tiles so far.
    // Returns what earlier results are to be multiplied by.
    float weigh(float* scores, int lo, int hi, T* weights, int from, int to, float& most, float* sums) const {
        if (lo >= hi) {
            std::fill(weights + from, weights + to, T{});
            return 1;
        }
        const int begin = lo / LANES * LANES, end = (hi + LANES - 1) / LANES * LANES;
        const float scale = s.scale, softcap = s.softcap;
        if (softcap)
            for (int j = begin; j < end; j += LANES)
                store(scores + j, softcap / scale * tanh_of(load(scores + j) * (scale / softcap)));
        std::fill(scores + begin, scores + lo, NOTHING);
        std::fill(scores + hi, scores + end, NOTHING);
        floats tops = all(NOTHING);
        for (int j = begin; j < end; j += LANES) tops = larger(load(scores + j) * scale, tops);
        float shrink = 1;
        if (any_larger(tops, most)) {  // rarely, after the first tiles
            const float before = most;
            most = largest(tops);
            shrink = before == NOTHING ? 0 : exp_of(before - most);
        }
        const float top = most * LOG2_E;
        floats sum = load(sums) * shrink;
        for (int j = begin; j < end; j += LANES) {
            const floats weight = exp2_of(load(scores + j) * (scale * LOG2_E) - top);
            sum += weight;
            store(weights + j, weight);
        }
        store(sums, sum);
        std::fill(weights + from, weights + lo, T{});
        std::fill(weights + hi, weights + to, T{});
        return shrink;
    }

    // V of keys from `first` on, as one block: where it is, or a copy with zeros for keys that nobody sees. Those may be
    // anything, even NaN, which no weight of 0 removes.
    const T* seen_values(const Task& task, int first, int count, int from, int to, T* copy) const {
        const int32_t* table = b.tables + int64_t(task.row) * b.table_width;
        if (count == s.block_size && from <= first && first + count <= to)
            return values(table[first / s.block_size], task.head);
        for (int at = first; at < first + count; at += s.block_size)
            if (from < at + s.block_size && at < to)
                std::memcpy(
                    copy + (at - first) * s.value_dim, values(table[at / s.block_size], task.head), sizeof(T) * value_block
                );
        const auto clear = [&](int begin, int end) {
            for (int j = std::max(begin - first, 0); j < std::min(end - first, count); j++)
                for (int d = 0; d < s.value_dim; d++) copy[(j / P * s.value_dim + d) * P + j % P] = T{};
        };
        clear(from / 32 * 32, from);
        clear(to, (to + 31) / 32 * 32);
        return copy;
    }

    // The block AHEAD of one: after the task's last ones, those of the next.
    __attribute__((always_inline)) void fetch_ahead(const Task& task, const Task* next, int block, int seen_to) const {
        const int end = (seen_to + s.block_size - 1) / s.block_size;
        block += AHEAD;
        if (block < end) {
            fetch(task, block);
        } else if (next) {
            block += next->from / s.block_size - end;
            if (block * s.block_size < next->to) fetch(*next, block);
        }
    }

    __attribute__((always_inline)) void fetch(const Task& task, int block) const {
        const int32_t at = b.tables[int64_t(task.row) * b.table_width + block];
        const T *key = keys(at, task.head), *value = values(at, task.head);
        constexpr int LINE = 64 / sizeof(T);
        for (int64_t i = 0; i < key_block; i += LINE) __builtin_prefetch(key + i);
        for (int64_t i = 0; i < value_block; i += LINE) __builtin_prefetch(value + i);
    }

    // Normalises what `parts` partial results, [parts][rows][value_dim], are together.
    void finish(const Task& task, int parts, float* out, const float* most, const float* sum) const {
        const int rows = task.count * group;
        for (int r = 0; r < rows; r++) {
            const int64_t token = b.offsets[task.row] + task.first + r / group, head = task.head * group + r % group;
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
            for (int d = 0; d < s.value_dim; d += LANES) store(to + d, load(all + d) / total);
        }
    }
};

}  // namespace

namespace paged {

// Tasks of one KV head and at most MOST_ROWS rows, cut into pieces where their keys are many.
template <class T>
struct AttentionPlan<T>::Work {
    std::vector<Task> pieces, cut;  // the most expensive first; the tasks that became several pieces
    std::vector<float> out, most, sum;  // of pieces of cut tasks: [kept][value_dim], [kept], [kept]
    std::vector<Scratch<T>> scratch;    // of each thread

    Work(const Attention& layer, int threads) {
        const Kernel<T> kernel(layer);
        const Batch& b = kernel.b;
        const int longest = std::max(1, MOST_ROWS / kernel.group);
        int most_rows = 0;
        int64_t total = 0;
        std::vector<Task> tasks;
        for (int row = 0; row < b.rows; row++)
            for (int first = 0; first < b.counts[row]; first += longest) {
                const int count = std::min(longest, b.counts[row] - first), position = b.starts[row] + first;
                const int from = kernel.first_seen(position) / TILE * TILE;
                most_rows = std::max(most_rows, count * kernel.group);
                for (int head = 0; head < layer.kv_heads; head++) {
                    tasks.push_back({row, head, first, count, from, position + count});
                    total += tasks.back().cost();
                }
            }
        for (const Task& task : tasks) add(task, kernel.group, total);
        std::stable_sort(pieces.begin(), pieces.end(), [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
        out.resize(kept_rows * layer.value_dim);
        most.resize(kept_rows);
        sum.resize(kept_rows);
        for (int thread = 0; thread < threads; thread++) scratch.emplace_back(layer, most_rows);
    }

private:
    int64_t kept_rows = 0;

    // How a task is cut does not depend on the number of threads: nor do the bits of results.
    void add(Task task, int group, int64_t total) {
        const int64_t keys = task.to - task.from, rows = task.count * group;
        const int64_t least = LEAST_KEYS * std::max<int64_t>(1, rows / 8);
        const int64_t part = (std::max(least, total / PIECES / task.count) + TILE - 1) / TILE * TILE;
        task.parts = int((keys + part - 1) / part);
        task.kept = kept_rows;
        if (task.parts > 1) {
            cut.push_back(task);
            kept_rows += task.parts * rows;
        }
        const int each = int((keys + task.parts - 1) / task.parts + TILE - 1) / TILE * TILE;
        for (Task piece = task; piece.from < task.to; piece.from = piece.to, piece.kept += rows) {
            piece.to = std::min(piece.from + each, task.to);
            pieces.push_back(piece);
        }
    }
};

template <class T>
AttentionPlan<T>::AttentionPlan(const Attention& layer, int threads) : work(new Work(layer, threads)) {}

template <class T>
AttentionPlan<T>::~AttentionPlan() = default;

template <class T>
void AttentionPlan<T>::run(Team& team, const Attention& layer) {
    const Kernel<T> kernel(layer);
    const Batch& b = kernel.b;
    Work& w = *work;
    Scratch<T>& scratch = w.scratch[team.rank];
    [[maybe_unused]] const TileRegisters registers;
    team.share(b.tokens, [&](int64_t token) {
        const int row = int(std::upper_bound(b.offsets, b.offsets + b.rows, token) - b.offsets) - 1;
        kernel.prepare(int(token), b.starts[row] + int(token) - b.offsets[row]);
        kernel.write(int(token));
    });
    team.share(int64_t(w.pieces.size()), [&](int64_t i) {
        const Task& piece = w.pieces[i];
        const int rows = piece.count * kernel.group;
        kernel.attend(piece, i + 1 < int64_t(w.pieces.size()) ? &piece + 1 : nullptr, scratch);
        if (piece.parts == 1) {
            kernel.finish(piece, 1, scratch.out, scratch.most, scratch.sum);
        } else {
            std::copy_n(scratch.out, int64_t(rows) * layer.value_dim, &w.out[piece.kept * layer.value_dim]);
            std::copy_n(scratch.most, rows, &w.most[piece.kept]);
            std::copy_n(scratch.sum, rows, &w.sum[piece.kept]);
        }
    });
    if (w.cut.empty()) return;
    team.share(int64_t(w.cut.size()), [&](int64_t i) {
        const int64_t at = w.cut[i].kept;
        kernel.finish(w.cut[i], w.cut[i].parts, &w.out[at * layer.value_dim], &w.most[at], &w.sum[at]);
    });
}

template class AttentionPlan<float>;
template class AttentionPlan<bfloat>;

}  // namespace paged

#define EXPORT_ATTENTION(NAME, T)                                                              \
    extern "C" void paged_attention_##NAME(const Attention* layer, int threads) {              \
        paged::AttentionPlan<T> plan(*layer, threads);                                         \
        paged::in_team(threads, [&](paged::Team& team) { plan.run(team, *layer); });           \
    }
EXPORT_ATTENTION(float32, float)
EXPORT_ATTENTION(bfloat16, bfloat)
