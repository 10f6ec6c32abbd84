#include "ziggurat-kv-select.h"

#include "ziggurat-kv-score.h"
#include "ziggurat-kv-sums.h"

#include "ggml.h"

namespace {

// Heads of rows as words of this size: copying them moves rows of any type verbatim, whatever a type's values would become
// on their way (NaN, zeros with a sign, blocks that no quantizer makes).
ggml_type word_of(const ggml_tensor * t, int64_t n_head) {
    return ggml_row_size(t->type, t->ne[0]/n_head) % sizeof(float) == 0 ? GGML_TYPE_F32 : GGML_TYPE_BF16;
}

// Some rows of a cache tensor [n_embd, rows], seen per head and as words: [words, n, n_head].
ggml_tensor * words_of(ggml_context * ctx, ggml_tensor * t, size_t offset, int64_t n, int64_t n_head) {
    const size_t head_bytes = ggml_row_size(t->type, t->ne[0]/n_head);
    ggml_tensor * view = ggml_view_tensor(ctx, t);
    view->type  = word_of(t, n_head);
    view->nb[0] = ggml_type_size(view->type);
    view->nb[1] = t->nb[1];
    view->nb[2] = head_bytes;
    view->nb[3] = head_bytes*n_head;
    view->ne[0] = head_bytes/view->nb[0];
    view->ne[1] = n;
    view->ne[2] = n_head;
    view->ne[3] = 1;
    view->view_offs += offset;
    if (view->data != nullptr) {
        view->data = (char *) view->data + offset;
    }
    return view;
}

// These words of some rows: [words, idxs, n_head].
ggml_tensor * gathered(ggml_context * ctx, ggml_tensor * words, ggml_tensor * idxs) {
    ggml_tensor * rows = ggml_get_rows(ctx, words, idxs);
    if (words->type == GGML_TYPE_F32) {
        return rows;
    }
    // What is read as BF16 comes as F32 whose upper half it is, bit for bit; rounding it back would change NaNs.
    ggml_tensor * upper = ggml_view_3d(ctx, rows, rows->ne[0], rows->ne[1], rows->ne[2], rows->nb[1], rows->nb[2], 0);
    upper->type       = words->type;
    upper->view_offs += sizeof(float)/2;
    return upper;
}

// first, first + 1, … for every KV head: F32 [n, n_head_kv]. Row numbers and positions are exact in F32 up to 2^24.
ggml_tensor * consecutive(ggml_context * ctx, int64_t first, int64_t n, int64_t n_head_kv) {
    return ggml_repeat_4d(ctx, ggml_arange(ctx, (float) first, (float) (first + n), 1.0f), n, n_head_kv, 1, 1);
}

ggml_tensor * joined(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return a == nullptr ? b : ggml_concat(ctx, a, b, 0);
}

} // namespace

// Sinks, the best ones, window.
ggml_tensor * ziggurat_kv_build_choice(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel) {
    const int64_t n_head_kv = kv.layers[sel.il].n_head_kv;
    const int64_t sinks     = kv.params.sinks;
    const int64_t window    = kv.params.window;
    const int64_t n_choose  = sel.target - sinks - window;

    ggml_tensor * scores = n_choose > 0 ? ziggurat_kv_build_scores(ctx, gf, res, kv, sel) : nullptr;
    ggml_tensor * rows   = sinks > 0 ? consecutive(ctx, 0, sinks, n_head_kv) : nullptr;
    if (scores == nullptr) {
        const int64_t latest = sel.target - sinks;
        return joined(ctx, rows, consecutive(ctx, sel.n - latest, latest, n_head_kv));
    }
    scores = ggml_cont(ctx, ggml_view_2d(ctx, scores,
                sel.n - window - sinks, n_head_kv, scores->nb[1], sinks*scores->nb[0]));
    ggml_tensor * top  = ggml_cast(ctx, ggml_top_k(ctx, scores, n_choose), GGML_TYPE_F32);
    // in the order of positions: the next selection's pooling needs neighbours that were neighbours
    ggml_tensor * perm = ggml_argsort(ctx, top, GGML_SORT_ORDER_ASC);
    top = ggml_get_rows(ctx, ggml_reshape_3d(ctx, top, 1, n_choose, n_head_kv), perm);
    top = ggml_scale_bias(ctx, ggml_reshape_2d(ctx, top, n_choose, n_head_kv), 1.0f, (float) sinks);
    return joined(ctx, joined(ctx, rows, top), consecutive(ctx, sel.n - window, window, n_head_kv));
}

std::vector<ggml_tensor *> ziggurat_kv_build_move(
        ggml_context * ctx, ggml_cgraph * gf, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel, ggml_tensor * rows) {
    auto & layer = kv.layers[sel.il];

    const int64_t n_head_kv = layer.n_head_kv;

    ggml_tensor * idxs = ggml_cast(ctx, rows, GGML_TYPE_I32);

    // all of them are read before the first is written: a selection in place overlaps
    ggml_tensor * k = gathered(ctx, words_of(ctx, sel.k, sel.k_offset, sel.n, n_head_kv), idxs);
    ggml_tensor * v = gathered(ctx, words_of(ctx, sel.v, sel.v_offset, sel.n, n_head_kv), idxs);
    ggml_build_forward_expand(gf, k);
    ggml_build_forward_expand(gf, v);

    ggml_tensor * place = ggml_view_2d(ctx, layer.positions,
            sel.target, n_head_kv, layer.positions->nb[1], sel.plane*layer.positions->nb[2]);
    ggml_tensor * positions = rows;
    if (sel.fixed > 0) {
        ggml_tensor * before = ggml_view_2d(ctx, layer.positions,
                sel.fixed, n_head_kv, layer.positions->nb[1], sel.plane*layer.positions->nb[2]);
        const int64_t n_new = sel.n - sel.fixed;
        positions = ggml_cont(ctx, before);
        if (n_new > 0) {
            positions = joined(ctx, positions, consecutive(ctx, sel.last + 1 - n_new, n_new, n_head_kv));
        }
        positions = ggml_get_rows(ctx, ggml_reshape_3d(ctx, positions, 1, sel.n, n_head_kv), idxs);
        positions = ggml_reshape_2d(ctx, positions, sel.target, n_head_kv);
    }
    std::vector<ggml_tensor *> effects;
    if (sel.sums != nullptr) {
        ggml_tensor * sums = ggml_reshape_3d(ctx, ggml_cont(ctx, sel.sums), 1, sel.n, n_head_kv);
        sums = ggml_reshape_2d(ctx, ggml_get_rows(ctx, sums, idxs), sel.target, n_head_kv);
        effects.push_back(ggml_cpy(ctx, sums, ziggurat_kv_sums_view(ctx, layer.sums, sel.plane, sel.target)));
    }
    effects.push_back(ggml_cpy(ctx, k, words_of(ctx, layer.k, sel.plane*layer.k->nb[2], sel.target, n_head_kv)));
    effects.push_back(ggml_cpy(ctx, v, words_of(ctx, layer.v, sel.plane*layer.v->nb[2], sel.target, n_head_kv)));
    effects.push_back(ggml_cpy(ctx, positions, place));
    for (auto * node : effects) {
        ggml_build_forward_expand(gf, node);
    }
    return effects;
}
