// All layers of a decoder in one call: a team of threads goes through the kernels together.

#include <algorithm>
#include <chrono>
#include <deque>
#include <utility>
#include <vector>

#include "kernels.h"

namespace paged {
namespace {

// Memory whose content is not defined.
template <class N>
class Buffer {
public:
    explicit Buffer(int64_t count) : numbers(new N[count]) {}
    operator N*() const { return numbers.get(); }

private:
    std::unique_ptr<N[]> numbers;
};

// Of the first thread: what is spent since the last call is of a kind.
class Clock {
public:
    Clock(const Team& team, Seconds* seconds) : seconds(team.rank == 0 ? seconds : nullptr) {
        if (this->seconds) last = now();
    }

    void spent(double Seconds::*kind) {
        if (!seconds) return;
        const double before = std::exchange(last, now());
        seconds->*kind += last - before;
    }

private:
    Seconds* const seconds;
    double last = 0;

    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
};

template <class T>
class Step {
public:
    explicit Step(const Decoder& decoder)
        : d(decoder),
          tokens(std::max<int64_t>(d.batches[0].tokens, d.sampled)),
          normed(tokens * d.hidden),
          added(tokens * d.hidden),
          stream(d.sampled * d.hidden),
          qkv(tokens * widest(&Layer::qkv)),
          attended(tokens * deepest(&Layer::out)),
          sampled(d.sampled * d.layers[d.num_layers - 1].out.depth),
          gate_up(tokens * widest(&Layer::gate_up)),
          activated(tokens * deepest(&Layer::down)),
          quantized(d.head.scales ? int8_bytes(tokens, deepest(&Layer::qkv, &Layer::out, &Layer::down)) : 0),
          factors(d.head.scales ? tokens : 0) {
        for (int64_t i = 0; i < d.num_layers; i++) prepare(d.layers[i]);
    }

    void run(Team& team) {
        Clock clock(team, d.seconds);
        int64_t rows = d.batches[0].tokens;
        T* residual = static_cast<T*>(d.residual);
        const T* update = nullptr;
        const float* update_norm = nullptr;
        const auto norm = [&](const float* weight) {
            add_norm(team, update, residual, weight, update_norm, +normed, rows, d.hidden, d.eps);
            clock.spent(&Seconds::norms);
        };
        const auto multiply = [&](const Linear& linear, const T* x, T* out) {
            product(team, linear, x, out, rows);
            clock.spent(&Seconds::linears);
        };
        for (int64_t i = 0; i < d.num_layers; i++) {
            const Layer& layer = d.layers[i];
            norm(layer.input_norm);
            multiply(layer.qkv, normed, qkv);
            attention[i].plan->run(team, attention[i].layer);
            clock.spent(&Seconds::attention);
            const T* seen = attended;
            if (i == d.num_layers - 1) {
                rows = d.sampled;
                team.share(rows, [&](int64_t row) {
                    std::copy_n(residual + d.sampled_at[row] * d.hidden, d.hidden, stream + row * d.hidden);
                    std::copy_n(seen + d.sampled_at[row] * layer.out.depth, layer.out.depth, sampled + row * layer.out.depth);
                });
                residual = stream, seen = sampled;
            }
            multiply(layer.out, seen, added);
            update = added, update_norm = layer.attention_norm;
            norm(layer.mlp_norm);
            multiply(layer.gate_up, normed, gate_up);
            gated(team, +gate_up, +activated, rows, layer.down.depth, layer.is_gelu);
            clock.spent(&Seconds::activation);
            multiply(layer.down, activated, added);
            update_norm = layer.mlp_out_norm;
        }
        norm(d.norm);
        multiply(d.head, normed, static_cast<T*>(d.logits));
    }

private:
    struct PlannedAttention {
        Attention layer;
        AttentionPlan<T>* plan;
    };

    const Decoder& d;
    const int64_t tokens;
    const Buffer<T> normed, added, stream, qkv, attended, sampled, gate_up, activated;
    const Buffer<int8_t> quantized;
    const Buffer<float> factors;
    std::deque<AttentionPlan<T>> plans;
    std::vector<PlannedAttention> attention;  // of each layer

    int64_t widest(Linear Layer::*linear) const {
        int64_t most = 0;
        for (int64_t i = 0; i < d.num_layers; i++) most = std::max(most, (d.layers[i].*linear).width);
        return most;
    }

    template <class... Linears>
    int64_t deepest(Linears... linears) const {
        int64_t most = 0;
        for (int64_t i = 0; i < d.num_layers; i++) most = std::max({most, (d.layers[i].*linears).depth...});
        return most;
    }

    void prepare(const Layer& layer) {
        Attention a = layer.attention;
        a.batch = d.batches + layer.group;
        a.query = +qkv;
        a.key = qkv + a.heads * a.key_dim;
        a.value = qkv + (a.heads + a.kv_heads) * a.key_dim;
        a.out = +attended;
        for (int64_t* strides : {a.query_strides, a.key_strides, a.value_strides})
            strides[0] = layer.qkv.width, strides[1] = a.key_dim;
        const auto is_planned = [&](const PlannedAttention& other) {
            const Attention& b = other.layer;
            return a.batch == b.batch && a.heads == b.heads && a.kv_heads == b.kv_heads && a.key_dim == b.key_dim &&
                   a.value_dim == b.value_dim && a.window == b.window && a.chunk == b.chunk;
        };
        const auto alike = std::find_if(attention.begin(), attention.end(), is_planned);
        if (alike == attention.end()) plans.emplace_back(a, d.threads);
        attention.push_back({a, alike == attention.end() ? &plans.back() : alike->plan});
    }

    void product(Team& team, const Linear& linear, const T* x, T* out, int64_t rows) {
        const auto* bias = static_cast<const T*>(linear.bias);
        if (linear.scales) {
            int8_linear(
                team, x, static_cast<const int8_t*>(linear.weight), linear.scales, bias, out, +quantized, +factors, rows,
                linear.depth, linear.width, d.int8_kind
            );
        } else if constexpr (sizeof(T) == 2) {
            paged::linear(team, x, static_cast<const T*>(linear.weight), bias, out, rows, linear.width, linear.depth);
        }
    }
};

template <class T>
void decode(const Decoder& decoder) {
    Step<T> step(decoder);
    in_team(decoder.threads, [&](Team& team) { step.run(team); });
}

}  // namespace
}  // namespace paged

extern "C" void paged_decoder_float32(const Decoder* decoder) { paged::decode<float>(*decoder); }
extern "C" void paged_decoder_bfloat16(const Decoder* decoder) { paged::decode<bfloat>(*decoder); }
