#include "ziggurat-kv-sums.h"

#include "ziggurat-kv-score.h"

#include "ggml.h"

#include <algorithm>
#include <map>

namespace {

constexpr int64_t BLOCK_FLOATS = 1 << 20; // of attention that is computed at a time
constexpr int64_t BLOCK_LEAST  = 8;       // tokens, however many rows there are

} // namespace

// Per buffer type, as the stage's rows, those of the layer with the most heads, or of all.
void ziggurat_kv_cache::make_stage_sums(bool shared) {
    std::map<ggml_backend_buffer_type_t, int64_t> widest;
    for (const auto & layer : layers) {
        widest[layer.buft] = std::max<int64_t>(widest[layer.buft], layer.slides ? 0 : layer.n_head_kv);
    }
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> made;
    for (auto & layer : layers) {
        if (layer.slides) {
            continue;
        }
        ggml_context * ctx = stage_arena.context(layer.buft, 0);
        ggml_tensor *& of  = made[layer.buft];
        if (of == nullptr || !shared) {
            of = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, stage_rows, shared ? widest[layer.buft] : layer.n_head_kv, n_reading);
            ggml_set_name(of, "kv_stage_sums");
        }
        layer.stage_sums = ggml_view_3d(ctx, of, stage_rows, layer.n_head_kv, n_reading, of->nb[1], of->nb[2], 0);
    }
}

ggml_tensor * ziggurat_kv_sums_view(ggml_context * ctx, ggml_tensor * sums, uint32_t plane, int64_t n) {
    return ggml_view_2d(ctx, sums, n, sums->ne[1], sums->nb[1], plane*sums->nb[2]);
}

ggml_tensor * ziggurat_kv_build_sums(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv,
        const ziggurat_kv_selection & sel, llama_pos until) {
    auto & layer = kv.layers[sel.il];

    // rows of tokens whose queries are kept come last, and have nothing yet
    const int64_t n_new = sel.last + 1 - sel.queries_from;
    const int64_t n_old = sel.n - n_new;

    ggml_tensor * sums = n_old > 0 ? ggml_cont(ctx, ziggurat_kv_sums_view(ctx, layer.sums, sel.plane, n_old)) : nullptr;
    if (n_new == 0) {
        return sums;
    }
    ggml_tensor * paid = ziggurat_kv_build_attention(ctx, gf, res, kv, sel, until);
    return sums ? ggml_add(ctx, paid, ggml_pad(ctx, sums, n_new, 0, 0, 0)) : paid;
}

ggml_tensor * ziggurat_kv_build_paid(
        ggml_context * ctx, ggml_cgraph * gf, const ziggurat_kv_cache & kv, const ziggurat_kv_layer & layer,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask) {
    const int64_t n         = k->ne[1];
    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_tokens  = q->ne[2];
    const int64_t group     = n_head/n_head_kv;
    const int64_t block     = std::clamp(BLOCK_FLOATS/(n*n_head), std::min(BLOCK_LEAST, n_tokens), n_tokens);

    if (k->type != GGML_TYPE_F32 && k->type != GGML_TYPE_F16) {
        k = ggml_cast(ctx, k, GGML_TYPE_F32); // or the products would round the queries, see keys_of_head
    }
    ggml_tensor * sum = nullptr;
    for (int64_t i = 0; i < n_tokens; i += block) {
        const int64_t m = std::min(block, n_tokens - i);

        ggml_tensor * some = ggml_view_3d(ctx, q, q->ne[0], m, n_head, q->nb[2], q->nb[1], i*q->nb[2]);
        ggml_tensor * seen = ggml_view_2d(ctx, mask, n, m, mask->nb[1], i*mask->nb[1]);

        ggml_tensor * s = ggml_mul_mat(ctx, k, some); // [n, m, n_head]
        ggml_prec_set_acc(s, GGML_PREC_F32);
        s = ziggurat_kv_softmax(ctx, kv, layer, s, seen, 0);

        ggml_tensor * shares = ggml_scale_bias(ctx, ggml_arange(ctx, 0.0f, (float) (m*n_head), 1.0f), 0.0f, 1.0f/group);
        s = ggml_out_prod(ctx, ggml_reshape_3d(ctx, s, n, m*group, n_head_kv), ggml_reshape_3d(ctx, shares, 1, m*group, n_head_kv));
        sum = sum ? ggml_add(ctx, sum, s) : s;
        ggml_build_forward_expand(gf, sum); // now, or the blocks may live at once
    }
    return ggml_reshape_2d(ctx, sum, n, n_head_kv);
}

uint32_t ziggurat_kv_paid_nodes(uint32_t n_tokens) {
    return 15*(n_tokens/BLOCK_LEAST + 1) + 16;
}
