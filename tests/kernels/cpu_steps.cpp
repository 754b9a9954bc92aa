// Random steps through the kernels, in buffers of exactly the size that they may touch.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <random>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

extern "C" void paged_attention_float32(const Attention*, int threads);
extern "C" void paged_attention_bfloat16(const Attention*, int threads);
extern "C" void paged_decoder_float32(const Decoder*);
extern "C" void paged_decoder_bfloat16(const Decoder*);

std::mt19937 random_bits(7);

int pick(int low, int high) { return int(low + random_bits() % (high - low + 1)); }

template <class T>
T one_of(std::initializer_list<T> values) {
    return values.begin()[pick(0, int(values.size()) - 1)];
}

// Numbers of bfloat16 or float32, all about 1: exactly so many.
std::vector<uint32_t> numbers(int64_t count, bool half) {
    return std::vector<uint32_t>(half ? (count + 1) / 2 : count, 0x3f803f80);
}

// Random rows, and the layers that attend to them.
struct Rows {
    Batch batch{};
    std::vector<int32_t> starts, counts, offsets, tables;
    std::vector<int64_t> slots;
    int longest = 0, blocks = 1;

    explicit Rows(int block_size) {
        batch.rows = pick(1, 5);
        for (int row = 0; row < batch.rows; row++) {
            starts.push_back(pick(0, 1) * pick(0, 700)), counts.push_back(pick(0, 1) ? 1 : pick(1, 90));
            offsets.push_back(batch.tokens), batch.tokens += counts[row];
            longest = std::max(longest, starts[row] + counts[row]);
        }
        batch.table_width = (longest + block_size - 1) / block_size;
        tables.assign(batch.rows * batch.table_width, 1 << 30);  // beyond a row's end nobody may look
        for (int row = 0; row < batch.rows; row++)
            for (int at = 0; at < starts[row] + counts[row]; at++) {
                int32_t& block = tables[row * batch.table_width + at / block_size];
                if (at % block_size == 0) block = blocks++;
                if (at >= starts[row]) slots.push_back(int64_t(block) * block_size + at % block_size);
            }
        batch.slot_mapping = slots.data(), batch.tables = tables.data();
        batch.starts = starts.data(), batch.counts = counts.data(), batch.offsets = offsets.data();
    }
};

// A random layer's attention, in buffers of exactly the size that it may touch.
struct Attending {
    Attention layer{};
    std::vector<uint32_t> query, key, value, out, keys, values;
    std::vector<float> sinks, cos_sin, norm;

    Attending(const Rows& rows, int block_size, int key_dim, int value_dim, bool half) {
        Attention& s = layer;
        s.batch = &rows.batch;
        s.kv_heads = pick(1, 3), s.heads = s.kv_heads * pick(1, 9);
        s.key_dim = key_dim, s.value_dim = value_dim, s.block_size = block_size;
        s.window = pick(0, 1) * pick(1, 200), s.chunk = pick(0, 1) * pick(1, 200);
        s.scale = 0.2f, s.softcap = float(pick(0, 1) * 3);
        const int64_t tokens = rows.batch.tokens, cached = int64_t(rows.blocks) * s.kv_heads * block_size;
        query = numbers(tokens * s.heads * key_dim, half), out = numbers(tokens * s.heads * value_dim, half);
        key = numbers(tokens * s.kv_heads * key_dim, half), value = numbers(tokens * s.kv_heads * value_dim, half);
        keys = numbers(cached * key_dim, half), values = numbers(cached * value_dim, half);
        s.query = query.data(), s.key = key.data(), s.value = value.data(), s.out = out.data();
        s.key_cache = keys.data(), s.value_cache = values.data();
        s.query_strides[0] = s.heads * key_dim, s.query_strides[1] = key_dim;
        s.key_strides[0] = s.kv_heads * key_dim, s.key_strides[1] = key_dim;
        s.value_strides[0] = s.kv_heads * value_dim, s.value_strides[1] = value_dim;
        s.rotated = 2 * pick(1, key_dim / 2), s.interleaved = pick(0, 1), s.norm_eps = 1e-5f;
        sinks.assign(s.heads, 0.5f), cos_sin.assign(int64_t(rows.longest) * s.rotated, 0.7f), norm.assign(key_dim, 1.5f);
        s.cos_sin = pick(0, 1) ? cos_sin.data() : (s.rotated = 0, nullptr);
        s.query_norm = s.key_norm = pick(0, 1) ? norm.data() : nullptr;
        s.sinks = pick(0, 1) ? sinks.data() : nullptr;
    }
};

void attend() {
    const int block_size = 16 << pick(0, 3);
    const bool half = pick(0, 1);
    const Rows rows(block_size);
    const Attending attending(rows, block_size, 16 * pick(1, 5), 16 * pick(1, 5), half);
    (half ? paged_attention_bfloat16 : paged_attention_float32)(&attending.layer, pick(1, 3));
}

void decode() {
    const int block_size = 16 << pick(0, 3), dim = 16 * pick(1, 5), hidden = 2 * pick(1, 70), num_layers = pick(1, 3);
    const bool half = pick(0, 1), integers = !half || pick(0, 1), has_bias = pick(0, 1), is_sandwich = pick(0, 1);
    const Rows rows(block_size);
    std::deque<std::vector<uint32_t>> memory;
    std::deque<std::vector<float>> floats;
    std::deque<Attending> attending;
    const auto linear = [&](int64_t width, int64_t depth) {
        Linear made{nullptr, nullptr, nullptr, width, depth};
        if (integers) {
            const int64_t outputs = (width + 31) / 32 * 32, inputs = (depth + 63) / 64 * 64;
            made.weight = memory.emplace_back(outputs * inputs / 4, 0x01ff0201).data();
            made.scales = floats.emplace_back(outputs, 0.01f).data();
        } else {
            made.weight = memory.emplace_back(numbers((width + 47) / 48 * 48 * depth, true)).data();
        }
        if (has_bias) made.bias = memory.emplace_back(numbers(width, half)).data();
        return made;
    };
    const auto norm = [&] { return floats.emplace_back(hidden, 0.1f).data(); };
    std::vector<Layer> layers;
    for (int i = 0; i < num_layers; i++) {
        const Attention& s = attending.emplace_back(rows, block_size, dim, dim, half).layer;
        const int64_t inner = 2 * pick(1, 99);
        layers.push_back({
            linear((s.heads + 2 * s.kv_heads) * dim, hidden), linear(hidden, s.heads * dim), linear(2 * inner, hidden),
            linear(hidden, inner), norm(), is_sandwich ? norm() : nullptr, norm(), is_sandwich ? norm() : nullptr, s, 0,
            pick(0, 1)
        });
    }
    std::vector<int64_t> sampled_at(pick(0, rows.batch.tokens));
    for (int64_t& token : sampled_at) token = pick(0, rows.batch.tokens - 1);
    const int64_t vocab = pick(1, 200);
    auto residual = numbers(int64_t(rows.batch.tokens) * hidden, half), logits = numbers(sampled_at.size() * vocab, half);
    Seconds seconds{};
    Decoder d{};
    d.layers = layers.data(), d.norm = norm(), d.head = linear(vocab, hidden);
    d.num_layers = num_layers, d.hidden = hidden, d.eps = 1e-5f, d.threads = pick(1, 3);
    d.batches = &rows.batch, d.residual = residual.data(), d.logits = logits.data();
    d.sampled_at = sampled_at.data(), d.sampled = int64_t(sampled_at.size());
    d.seconds = pick(0, 1) ? &seconds : nullptr;
    (half ? paged_decoder_bfloat16 : paged_decoder_float32)(&d);
}

int main() {
#ifdef __AMX_TILE__
    syscall(SYS_arch_prctl, 0x1023, 18);  // as library.py asks
#endif
    for (int done = 0; done < 60; done++) attend(), decode();
    std::puts("60 steps");
}
