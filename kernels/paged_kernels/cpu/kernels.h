// The kernels, as functions that all threads of a team call, and what they take.
#pragma once

#include <cstdint>
#include <memory>

#include "numbers.h"
#include "team.h"

// The structures are mirrored in structures.py: keep both alike.
extern "C" {

// The rows of a step, as attention sees them.
struct Batch {
    const int64_t* slot_mapping;               // [tokens]
    const int32_t* tables;                     // [rows, table_width]
    const int32_t *starts, *counts, *offsets;  // [rows]: first position, tokens, and where these are in the batch
    int32_t rows, tokens, table_width;
};

// Attention of one layer in one step.
struct Attention {
    const Batch* batch;
    void *query, *key, *value;            // [tokens, heads, dim], the last dimension contiguous
    void *key_cache, *value_cache, *out;  // out: [tokens, heads, value_dim]
    const float* sinks;                   // [heads] or null
    int64_t query_strides[2], key_strides[2], value_strides[2];  // of token and head, in elements
    int32_t heads, kv_heads, key_dim, value_dim, block_size, window, chunk;  // window, chunk: 0 for none
    float scale, softcap;                                                    // softcap: 0 for none
    // Before all that, in place: the RMS norm of each head of queries and keys, times a weight, [key_dim] or null, and
    // the rotation of its first `rotated` dimensions, by cosines and then sines, [positions, rotated]. Pairs are
    // neighbours if `interleaved`, else halves.
    const float *query_norm, *key_norm, *cos_sin;
    float norm_eps;
    int32_t rotated, interleaved;
};

// A linear layer, packed.
struct Linear {
    const void *weight, *bias;  // bias: [width] or null
    const float* scales;        // of int8 weights; null for bfloat16
    int64_t width, depth;
};

// A layer of a decoder. Norms are [hidden]; those of what attention and the MLP add may be null.
struct Layer {
    Linear qkv, out, gate_up, down;
    const float *input_norm, *attention_norm, *mlp_norm, *mlp_out_norm;
    Attention attention;  // but for the batch, and addresses of what goes in and out
    int32_t group, is_gelu;  // which of the batches, and the activation: gelu by tanh, else silu
};

// What steps spend, by the kind of kernel.
struct Seconds {
    double linears, attention, norms, activation;
};

// A decoder, and one step of it.
struct Decoder {
    const Layer* layers;
    const float* norm;
    Linear head;
    int64_t num_layers, hidden, int8_kind;
    float eps;
    int32_t threads;
    const Batch* batches;       // of each group of layers
    void *residual, *logits;    // [tokens, hidden], the embeddings, which become the residual stream; [sampled, vocab]
    const int64_t* sampled_at;  // [sampled]
    int64_t sampled;
    Seconds* seconds;  // null, or what is spent is added to it
};
}

namespace paged {

// out [rows, width] = x [rows, depth] times a weight in panels, plus a bias: see linear.py.
void linear(
    Team&, const bfloat* x, const bfloat* packed, const bfloat* bias, bfloat* out, int64_t rows, int64_t width, int64_t depth
);

// See int8.py. `quantized`, of `int8_bytes`, and `factors` [tokens] are scratch.
template <class T>
void int8_linear(
    Team&, const T* x, const int8_t* weight, const float* scales, const T* bias, T* out, int8_t* quantized, float* factors,
    int64_t tokens, int64_t width, int64_t outputs, int64_t kind
);

int64_t int8_bytes(int64_t tokens, int64_t width);

// See add_norm in layers.py.
template <class T, class W>
void add_norm(
    Team&, const T* update, T* residual, const W* weight, const W* update_weight, T* out, int64_t tokens, int64_t width,
    float eps
);

// See Linears.gate_up in layers.py: gate_up [tokens, 2 * inner], out [tokens, inner].
template <class T>
void gated(Team&, const T* gate_up, T* out, int64_t tokens, int64_t inner, bool is_gelu);

// How the work of attention is cut up, and what threads need for it: of all layers that differ only in addresses.
template <class T>
class AttentionPlan {
public:
    AttentionPlan(const Attention&, int threads);
    ~AttentionPlan();
    // Writes K and V, and attends. Threads call it together.
    void run(Team&, const Attention&);

private:
    struct Work;
    std::unique_ptr<Work> work;
};

}  // namespace paged
