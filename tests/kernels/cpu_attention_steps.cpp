// Random steps through the kernels, in buffers of exactly the size that they may touch.
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

struct Step {
    void *query, *key, *value;
    void *key_cache, *value_cache, *out;
    const float* sinks;
    const int64_t* slot_mapping;
    const int32_t* tables;
    const int32_t *starts, *counts, *offsets;
    int64_t query_strides[2], key_strides[2], value_strides[2];
    int32_t rows, tokens, table_width, threads;
    int32_t heads, kv_heads, key_dim, value_dim, block_size, window, chunk;
    float scale, softcap;
    const float *query_norm, *key_norm, *cos_sin;
    float norm_eps;
    int32_t rotated, interleaved;
};
extern "C" void paged_attention_float32(const Step*);
extern "C" void paged_attention_bfloat16(const Step*);

int main() {
#ifdef __AMX_TILE__
    syscall(SYS_arch_prctl, 0x1023, 18);  // as library.py asks
#endif
    std::mt19937 random(7);
    auto pick = [&](int low, int high) { return int(low + random() % (high - low + 1)); };
    int done = 0;
    for (; done < 60; done++) {
        Step s{};
        s.kv_heads = pick(1, 3), s.heads = s.kv_heads * pick(1, 9);
        s.key_dim = 16 * pick(1, 5), s.value_dim = 16 * pick(1, 5), s.block_size = 16 << pick(0, 3);
        s.window = pick(0, 1) * pick(1, 200), s.chunk = pick(0, 1) * pick(1, 200);
        s.scale = 0.2f, s.softcap = float(pick(0, 1) * 3), s.threads = pick(1, 3), s.rows = pick(1, 5);
        std::vector<int32_t> starts, counts, offsets;
        int longest = 0, blocks = 1;
        for (int row = 0; row < s.rows; row++) {
            starts.push_back(pick(0, 1) * pick(0, 700)), counts.push_back(pick(0, 1) ? 1 : pick(1, 90));
            offsets.push_back(s.tokens), s.tokens += counts[row];
            longest = std::max(longest, starts[row] + counts[row]);
        }
        s.table_width = (longest + s.block_size - 1) / s.block_size;
        std::vector<int32_t> tables(s.rows * s.table_width, 1 << 30);  // beyond a row's end nobody may look
        std::vector<int64_t> slots;
        for (int row = 0; row < s.rows; row++) {
            for (int at = 0; at < starts[row] + counts[row]; at++) {
                if (at % s.block_size == 0) tables[row * s.table_width + at / s.block_size] = blocks++;
                const int64_t block = tables[row * s.table_width + at / s.block_size];
                if (at >= starts[row]) slots.push_back(block * s.block_size + at % s.block_size);
            }
        }
        const bool half = pick(0, 1);
        const int64_t words = half ? 2 : 1;
        auto buffer = [&](int64_t elements) { return std::vector<uint32_t>((elements + words - 1) / words, 0x3f803f80); };
        auto query = buffer(int64_t(s.tokens) * s.heads * s.key_dim), key = buffer(int64_t(s.tokens) * s.kv_heads * s.key_dim);
        auto value = buffer(int64_t(s.tokens) * s.kv_heads * s.value_dim), out = buffer(int64_t(s.tokens) * s.heads * s.value_dim);
        auto keys = buffer(int64_t(blocks) * s.kv_heads * s.block_size * s.key_dim);
        auto values = buffer(int64_t(blocks) * s.kv_heads * s.block_size * s.value_dim);
        std::vector<float> sinks(s.heads, 0.5f);
        s.rotated = 2 * pick(1, s.key_dim / 2), s.interleaved = pick(0, 1), s.norm_eps = 1e-5f;
        std::vector<float> cos_sin(int64_t(longest) * s.rotated, 0.7f), norm(s.key_dim, 1.5f);
        s.cos_sin = pick(0, 1) ? cos_sin.data() : (s.rotated = 0, nullptr);
        s.query_norm = s.key_norm = pick(0, 1) ? norm.data() : nullptr;
        s.query = query.data(), s.key = key.data(), s.value = value.data(), s.out = out.data();
        s.key_cache = keys.data(), s.value_cache = values.data(), s.sinks = pick(0, 1) ? sinks.data() : nullptr;
        s.slot_mapping = slots.data(), s.tables = tables.data();
        s.starts = starts.data(), s.counts = counts.data(), s.offsets = offsets.data();
        s.query_strides[0] = s.heads * s.key_dim, s.query_strides[1] = s.key_dim;
        s.key_strides[0] = s.kv_heads * s.key_dim, s.key_strides[1] = s.key_dim;
        s.value_strides[0] = s.kv_heads * s.value_dim, s.value_strides[1] = s.value_dim;
        (half ? paged_attention_bfloat16 : paged_attention_float32)(&s);
    }
    std::printf("%d steps\n", done);
}
