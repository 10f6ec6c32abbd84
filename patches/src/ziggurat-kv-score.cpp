#include "ziggurat-kv-score.h"

#include "llama-impl.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace {

// The last queries that a selection is by, in the order of their positions: where in the ring they are, which rows each
// of them sees, and what it weighs.
class window_input : public llm_graph_input_i {
public:
    window_input(
            ggml_context * ctx, const ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel, int64_t n_padded, uint32_t n_group,
            llama_pos until) :
        n(sel.n), ring(kv.n_ring), plane(sel.plane), last(sel.last), queries_from(sel.queries_from), until(until), sums(kv.sums_up()) {
        const uint32_t window = sums ? kv.n_ring : kv.observed(kv.params);
        slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, window);
        ggml_set_input(slots);
        ggml_set_name(slots, "kv_window_slots");
        mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_padded, window);
        ggml_set_input(mask);
        ggml_set_name(mask, "kv_window_mask");
        weights = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, window*n_group);
        ggml_set_input(weights);
        ggml_set_name(weights, "kv_window_weights");
    }

    void set_input(const llama_ubatch *) override {
        const int64_t n_padded = mask->ne[0];
        const int64_t window   = mask->ne[1];
        const int64_t group    = weights->ne[1]/window;

        std::vector<int32_t>     places(window);
        std::vector<ggml_fp16_t> rows(n_padded*window);
        std::vector<float>       shares(window*group, 0.0f);

        const int64_t n_valid = std::min<int64_t>(window, last + 1 - queries_from);
        const int64_t youngest = last + 1 - until;
        const float   share    = 1.0f/(group*(sums ? 1 : n_valid));
        for (int64_t i = 0; i < window; ++i) {
            const int64_t age = window - 1 - i;
            const int64_t see = std::clamp<int64_t>(n - age, 1, n); // the rows of the window are consecutive
            const auto row = rows.begin() + i*n_padded;
            std::fill(row,       row + see,      ggml_fp32_to_fp16(0.0f));
            std::fill(row + see, row + n_padded, ggml_fp32_to_fp16(-INFINITY));
            places[i] = plane*ring + std::max<int64_t>(last - age, 0) % ring;
            for (int64_t g = 0; g < group && age < n_valid && age >= youngest; ++g) {
                shares[g*window + i] = share;
            }
        }
        ggml_backend_tensor_set(slots,   places.data(), 0, ggml_nbytes(slots));
        ggml_backend_tensor_set(mask,    rows.data(),   0, ggml_nbytes(mask));
        ggml_backend_tensor_set(weights, shares.data(), 0, ggml_nbytes(weights));
    }

    ggml_tensor * slots   = nullptr; // I32 [window]
    ggml_tensor * mask    = nullptr; // F16 [n_padded, window]
    ggml_tensor * weights = nullptr; // F32 [1, window*n_group]

private:
    const int64_t   n;
    const uint32_t  ring;
    const uint32_t  plane;
    const llama_pos last;
    const llama_pos queries_from;
    const llama_pos until;
    const bool      sums;
};

// Uniform numbers that depend on seed, layer, KV head, row and the sequence's length, and on nothing else.
class noise_input : public llm_graph_input_i {
public:
    noise_input(ggml_context * ctx, uint32_t n, uint32_t n_head_kv, uint64_t key) : key(key) {
        scores = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n_head_kv);
        ggml_set_input(scores);
        ggml_set_name(scores, "kv_noise");
    }

    void set_input(const llama_ubatch *) override {
        std::vector<float> values(ggml_nelements(scores));
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = (float) (mixed(key + i) >> 40)/(1 << 24);
        }
        ggml_backend_tensor_set(scores, values.data(), 0, ggml_nbytes(scores));
    }

    // a bijection that leaves no visible structure (the finalizer of splitmix64, Steele et al. 2014)
    static uint64_t mixed(uint64_t x) {
        x += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30))*0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27))*0x94d049bb133111eb;
        return x ^ (x >> 31);
    }

    ggml_tensor * scores = nullptr;

private:
    const uint64_t key;
};

// [width, rows, n_planes] as [width, rows of all planes]
ggml_tensor * all_planes(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_2d(ctx, t, t->ne[0], t->ne[1]*t->ne[2]);
}

ggml_tensor * pooled(ggml_context * ctx, ggml_tensor * scores, const ziggurat_kv_params & params) {
    if (params.pool <= 1) {
        return scores;
    }
    const int side = params.pool/2;
    if (params.pool_type == ZIGGURAT_KV_POOL_MAX) {
        return ggml_pool_1d(ctx, scores, GGML_OP_POOL_MAX, params.pool, 1, side);
    }
    // ggml's average leaves out what lies beyond the borders; the published scores count it as zeros
    scores = ggml_pad_ext(ctx, scores, side, side, 0, 0, 0, 0, 0, 0);
    return ggml_pool_1d(ctx, scores, GGML_OP_POOL_AVG, params.pool, 1, 0);
}

// As many rows as the product with the keys is computed for. Backends have fast kernels for whole tiles of rows only
// (ggml's on a CPU: multiples of 16); what lies behind the last row is masked.
int64_t padded_rows(const ziggurat_kv_selection & sel) {
    const int64_t n_padded = GGML_PAD(sel.n, 16);
    return sel.k_offset + n_padded*sel.k->nb[1] <= ggml_nbytes(sel.k) ? n_padded : sel.n;
}

// One KV head's keys [d, n], of a type whose products with queries leave these as the ring has them. A product with rows of
// fewer bits rounds queries to 8 bits, or with BF16 to BF16's 8: that alone would change the order of many scores.
ggml_tensor * keys_of_head(ggml_context * ctx, const ziggurat_kv_selection & sel, int64_t d, int64_t n, int64_t h) {
    ggml_tensor * k = ggml_view_2d(ctx, sel.k, d, n, sel.k->nb[1], sel.k_offset + h*ggml_row_size(sel.k->type, d));
    return k->type == GGML_TYPE_F32 || k->type == GGML_TYPE_F16 ? k : ggml_cast(ctx, k, GGML_TYPE_F32);
}

// The mean of the KV heads, for each of them.
ggml_tensor * same_for_all_heads(ggml_context * ctx, ggml_tensor * scores) {
    const int64_t n = scores->ne[1];
    ggml_tensor * sum = nullptr;
    for (int64_t h = 0; h < n; ++h) {
        ggml_tensor * one = ggml_view_1d(ctx, scores, scores->ne[0], h*scores->nb[1]);
        sum = sum ? ggml_add(ctx, sum, one) : one;
    }
    return ggml_repeat_4d(ctx, ggml_scale(ctx, sum, 1.0f/n), scores->ne[0], n, 1, 1);
}

// 1 - the cosine similarity of each key to the mean of all keys at length 1, by KV head: F32 [n, n_head_kv].
ggml_tensor * key_differences(ggml_context * ctx, ggml_cgraph * gf, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel) {
    const int64_t n_head_kv = kv.layers[sel.il].n_head_kv;
    const int64_t d         = sel.k->ne[0]/n_head_kv;
    const size_t  head_size = ggml_row_size(sel.k->type, d);
    const float   shortest  = 1e-12f; // published code divides by no less

    ggml_tensor * counts = ggml_arange(ctx, 0.0f, (float) sel.n, 1.0f);
    ggml_tensor * all    = ggml_cast(ctx, counts, GGML_TYPE_I32);
    ggml_tensor * ones   = ggml_reshape_2d(ctx, ggml_scale_bias(ctx, counts, 0.0f, 1.0f), 1, sel.n);

    ggml_tensor * scores = nullptr;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * k = ggml_view_2d(ctx, sel.k, d, sel.n, sel.k->nb[1], sel.k_offset + h*head_size);

        k = ggml_l2_norm(ctx, ggml_get_rows(ctx, k, all), shortest); // in F32, whatever the rows have
        ggml_tensor * mean = ggml_l2_norm(ctx, ggml_out_prod(ctx, k, ones), shortest); // [d, 1]
        ggml_tensor * s    = ggml_scale_bias(ctx, ggml_mul_mat(ctx, k, mean), -1.0f, 1.0f); // [n, 1]
        scores = scores ? ggml_concat(ctx, scores, s, 1) : s;
        ggml_build_forward_expand(gf, scores); // now, as above
    }
    return scores;
}

ggml_tensor * random_scores(
        ggml_context * ctx, ggml_cgraph *, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel) {
    const uint64_t key = noise_input::mixed(((uint64_t) kv.params.seed << 32) + sel.last) + noise_input::mixed(sel.il);
    auto * input = (noise_input *) res->add_input(std::make_unique<noise_input>(
            ctx, sel.n - kv.params.window, kv.layers[sel.il].n_head_kv, key));
    return input->scores;
}

} // namespace

// In F32, before it is averaged: with the cap and the sinks that the model has.
ggml_tensor * ziggurat_kv_softmax(
        ggml_context * ctx, const ziggurat_kv_cache & kv, const ziggurat_kv_layer & layer,
        ggml_tensor * kq, ggml_tensor * mask, int64_t first_head) {
    if (kv.hparams.attn_soft_cap) {
        const float cap = kv.hparams.f_attn_logit_softcapping;
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, 1.0f/cap)), cap);
    }
    kq = ggml_soft_max_ext(ctx, kq, mask, layer.kq_scale, 0.0f);
    if (layer.sinks) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, layer.sinks, kq->ne[2], first_head*layer.sinks->nb[0]));
    }
    return kq;
}

// In F32, causal among the last rows, averaged over the query heads of a KV head.
ggml_tensor * ziggurat_kv_build_attention(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv,
        const ziggurat_kv_selection & sel, llama_pos until) {
    const auto & layer = kv.layers[sel.il];

    const int64_t group  = layer.n_head/layer.n_head_kv;
    const int64_t d      = layer.queries->ne[0]/layer.n_head;

    const int64_t n_padded = padded_rows(sel);

    auto * input = (window_input *) res->add_input(std::make_unique<window_input>(ctx, kv, sel, n_padded, group, until));
    const int64_t window = input->slots->ne[0];

    // in F32, whatever the ring has
    ggml_tensor * queries = ggml_get_rows(ctx, all_planes(ctx, layer.queries), input->slots);
    queries = ggml_reshape_3d(ctx, queries, d, layer.n_head, window);

    ggml_tensor * scores = nullptr;
    // one KV head at a time: all together would need n*window*n_head floats
    for (int64_t h = 0; h < layer.n_head_kv; ++h) {
        ggml_tensor * k = keys_of_head(ctx, sel, d, n_padded, h);
        ggml_tensor * q = ggml_view_3d(ctx, queries, d, window, group, queries->nb[2], queries->nb[1], h*group*queries->nb[1]);

        ggml_tensor * s = ggml_mul_mat(ctx, k, q); // [n_padded, window, group]
        ggml_prec_set_acc(s, GGML_PREC_F32);
        s = ziggurat_kv_softmax(ctx, kv, layer, s, input->mask, h*group);
        s = ggml_out_prod(ctx, ggml_reshape_2d(ctx, s, n_padded, window*group), input->weights); // [n_padded, 1]
        scores = scores ? ggml_concat(ctx, scores, s, 1) : s;
        // now, or the temporaries of all heads may live at once
        ggml_build_forward_expand(gf, scores);
    }
    // without those behind the last row
    return ggml_cont(ctx, ggml_view_2d(ctx, scores, sel.n, layer.n_head_kv, scores->nb[1], 0));
}

ggml_tensor * ziggurat_kv_build_scores(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel) {
    const auto attention = [&]() { return ziggurat_kv_build_attention(ctx, gf, res, kv, sel, sel.last + 1); };

    ggml_tensor * scores = nullptr;
    switch (kv.params.score) {
        case ZIGGURAT_KV_SCORE_SNAPKV:  scores = attention(); break;
        case ZIGGURAT_KV_SCORE_TOVA:    scores = same_for_all_heads(ctx, attention()); break;
        case ZIGGURAT_KV_SCORE_KEYDIFF: scores = key_differences(ctx, gf, kv, sel); break;
        case ZIGGURAT_KV_SCORE_H2O:     scores = sel.sums; break;
        case ZIGGURAT_KV_SCORE_RANDOM:  return random_scores(ctx, gf, res, kv, sel);
        default:                        return nullptr;
    }
    // those of the rows before the window
    scores = ggml_cont(ctx, ggml_view_2d(ctx, scores, sel.n - kv.params.window, scores->ne[1], scores->nb[1], 0));
    return pooled(ctx, scores, kv.params);
}
