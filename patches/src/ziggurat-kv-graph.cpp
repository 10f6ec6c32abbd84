#include "ziggurat-kv-graph.h"

#include "ziggurat-kv-select.h"
#include "ziggurat-kv-slide.h"
#include "ziggurat-kv-sums.h"

#include "llama-impl.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

// n consecutive rows of any type from one cache tensor to another
ggml_tensor * copy_rows(ggml_context * ctx, ggml_tensor * from, size_t from_offset, ggml_tensor * to, size_t to_offset, int64_t n) {
    return ggml_cpy(ctx,
            ggml_view_2d(ctx, from, from->ne[0], n, from->nb[1], from_offset),
            ggml_view_2d(ctx, to,   to->ne[0],   n, to->nb[1],   to_offset));
}

template <typename T>
void fill_mask(ggml_tensor * mask, const std::vector<uint32_t> & past) {
    const int64_t n_kv     = mask->ne[0];
    const int64_t n_tokens = mask->ne[1];
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);
    T * row = (T *) mask->data;
    for (const uint32_t n_past : past) {
        for (int64_t i = 0; i < n_tokens; ++i, row += n_kv) {
            const int64_t see = std::min<int64_t>(n_kv, n_past + i + 1);
            std::fill(row,       row + see,  keep);
            std::fill(row + see, row + n_kv, drop);
        }
    }
}

// past: positions before the new ones
template <typename T>
void fill_sliding_mask(ggml_tensor * mask, const std::vector<uint32_t> & past, uint32_t capacity, const llama_hparams & hparams) {
    const int64_t n_kv     = mask->ne[0];
    const int64_t n_tokens = mask->ne[1];
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);
    T * row = (T *) mask->data;
    for (const uint32_t n_past : past) {
        const auto positions = ziggurat_kv_ring_positions(capacity, n_kv, n_past + n_tokens - 1);
        for (int64_t i = 0; i < n_tokens; ++i, row += n_kv) {
            const llama_pos own = n_past + i;
            for (int64_t j = 0; j < n_kv; ++j) {
                const llama_pos pos = positions[j];
                const bool seen = pos >= 0 && pos <= own && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos, own);
                row[j] = seen ? keep : drop;
            }
        }
    }
}

} // namespace

ziggurat_kv_input::ziggurat_kv_input(
        const llama_hparams       & hparams,
        const llama_cparams       & cparams,
        const ziggurat_kv_context * mctx,
        ggml_context              * ctx,
        const llama_ubatch        & ubatch) :
    llm_graph_input_attn_kv(hparams, cparams, nullptr), mctx_kv(mctx), plans(mctx->plans(ubatch)), step(mctx->current()) {
    const auto & kv = *mctx->kv;

    const uint32_t n_layer = kv.layers.size();

    n_tokens     = ubatch.n_tokens;
    n_seqs       = mctx->n_seqs(ubatch);
    n_seq_tokens = n_tokens/n_seqs;
    first_plane  = mctx->first_plane(ubatch);
    first_index  = mctx->first_index(ubatch);
    stage        = mctx->stage();
    effects.resize(n_layer);

    const auto mask_type = cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;

    class_of.assign(n_layer, 0);
    for (uint32_t il = 0; il < n_layer; ++il) {
        const auto found = std::find_if(masks.begin(), masks.end(), [&](const mask_class & c) {
            return plans[c.il].n_kv == plans[il].n_kv && plans[c.il].past == plans[il].past &&
                   kv.layers[c.il].slides == kv.layers[il].slides;
        });
        class_of[il] = found - masks.begin();
        if (found == masks.end()) {
            masks.push_back({ il, ggml_new_tensor_4d(ctx, mask_type, plans[il].n_kv, n_seq_tokens, 1, n_seqs) });
            ggml_set_input(masks.back().mask);
            ggml_set_name(masks.back().mask, "attn_inp_kq_mask");
        }
    }

    row_idxs = ggml_new_tensor_2d(ctx, GGML_TYPE_I64, n_tokens, step.layer < 0 ? n_layer : 1);
    ggml_set_input(row_idxs);
    ggml_set_name(row_idxs, "attn_inp_kv_idxs");

    if (kv.evicts && kv.uses_queries()) {
        // what is written in place may be removed again, and the window then lies further back
        const uint32_t wanted = !step.staged ? kv.n_ring : kv.sums_up() ? 0 : kv.observed(kv.params);
        const uint32_t later  = step.staged ? step.total - std::min(step.total, step.offset + n_tokens) : 0;
        n_window = std::min(n_seq_tokens, wanted - std::min(wanted, later));
        if (n_window > 0) {
            query_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_window*n_seqs);
            ggml_set_input(query_idxs);
            ggml_set_name(query_idxs, "attn_inp_query_idxs");
        }
        if (n_window < n_seq_tokens && n_seqs > 1) {
            window_tokens = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_window*n_seqs);
            ggml_set_input(window_tokens);
            ggml_set_name(window_tokens, "attn_inp_window_tokens");
        }
    }

    const llama_kv_cache * rotations[2] = { kv.rotation.get(), kv.rotation_swa.get() };
    for (int i = 0; i < 2; ++i) {
        if (rotations[i] != nullptr) {
            rot_k[i] = rotations[i]->build_input_k_rot(ctx);
            rot_v[i] = rotations[i]->build_input_v_rot(ctx);
        }
    }
    self_k_rot = rot_k[0];
    self_v_rot = rot_v[0];
}

llm_graph_input_attn_kv * ziggurat_kv_input::of_layer(int il) {
    const bool slides = mctx_kv->kv->layers[il].slides;
    self_k_rot = rot_k[slides];
    self_v_rot = rot_v[slides];
    return this;
}

void ziggurat_kv_input::set_input(const llama_ubatch * ubatch) {
    const auto & kv = *mctx_kv->kv;

    for (const auto & c : masks) {
        GGML_ASSERT(ggml_backend_buffer_is_host(c.mask->buffer));
        const auto & layer = kv.layers[c.il];
        if (layer.slides && c.mask->type == GGML_TYPE_F16) {
            fill_sliding_mask<ggml_fp16_t>(c.mask, plans[c.il].past, layer.capacity, hparams);
        } else if (layer.slides) {
            fill_sliding_mask<float>(c.mask, plans[c.il].past, layer.capacity, hparams);
        } else if (c.mask->type == GGML_TYPE_F16) {
            fill_mask<ggml_fp16_t>(c.mask, plans[c.il].past);
        } else {
            fill_mask<float>(c.mask, plans[c.il].past);
        }
    }

    GGML_ASSERT(ggml_backend_buffer_is_host(row_idxs->buffer));
    int64_t * idx = (int64_t *) row_idxs->data;
    for (int64_t column = 0; column < row_idxs->ne[1]; ++column) {
        const uint32_t il = step.layer < 0 ? column : step.layer;
        const auto   & layer = kv.layers[il];
        for (uint32_t s = 0; s < n_seqs; ++s, idx += n_seq_tokens) {
            const int64_t place = step.staged && !layer.slides ? 0 : (int64_t) (first_plane + s)*layer.capacity;
            std::iota(idx, idx + n_seq_tokens, (int64_t) plans[il].past[s]);
            for (uint32_t i = 0; i < n_seq_tokens; ++i) {
                idx[i] = place + (layer.slides ? idx[i] % layer.capacity : idx[i]);
            }
        }
    }

    if (query_idxs) {
        GGML_ASSERT(ggml_backend_buffer_is_host(query_idxs->buffer));
        int64_t * ring = (int64_t *) query_idxs->data;
        for (uint32_t s = 0; s < n_seqs; ++s) {
            // a ubatch that ends before its segment does holds the first of the window's tokens last
            const llama_pos * pos = ubatch->pos + (s + 1)*n_seq_tokens - n_window;
            for (uint32_t i = 0; i < n_window; ++i) {
                *ring++ = (first_plane + s)*kv.n_ring + pos[i] % kv.n_ring;
            }
        }
    }

    if (window_tokens) {
        GGML_ASSERT(ggml_backend_buffer_is_host(window_tokens->buffer));
        for (uint32_t i = 0; i < n_window*n_seqs; ++i) {
            const uint32_t s = i/n_window;
            ((int32_t *) window_tokens->data)[i] = (s + 1)*n_seq_tokens - n_window + i % n_window;
        }
    }

    const llama_kv_cache * rotations[2] = { kv.rotation.get(), kv.rotation_swa.get() };
    for (int i = 0; i < 2; ++i) {
        if (rot_k[i] && rot_k[i]->buffer) {
            rotations[i]->set_input_k_rot(rot_k[i]);
        }
        if (rot_v[i] && rot_v[i]->buffer) {
            rotations[i]->set_input_v_rot(rot_v[i]);
        }
    }
}

bool ziggurat_kv_input::can_reuse(const llm_graph_params & params) {
    const auto * mctx = dynamic_cast<const ziggurat_kv_context *>(params.mctx);
    if (mctx == nullptr || step.staged || mctx->current().staged) {
        return false; // a prompt's graphs differ in layer, chunk or number of rows
    }
    if (params.ubatch.n_tokens != n_tokens || mctx->n_seqs(params.ubatch) != n_seqs || mctx->first_plane(params.ubatch) != first_plane) {
        return false;
    }
    auto now = mctx->plans(params.ubatch);
    for (uint32_t il = 0; il < now.size(); ++il) {
        if (now[il].n_kv != plans[il].n_kv || now[il].past != now[masks[class_of[il]].il].past) {
            return false;
        }
    }
    mctx_kv = mctx;
    plans   = std::move(now);
    return true;
}

ggml_tensor * ziggurat_kv_input::mask_of(ggml_context * ctx, uint32_t il) {
    ggml_tensor  * mask  = masks[class_of[il]].mask;
    const uint32_t shift = plans[il].shift;
    if (shift == 0) {
        return mask;
    }
    return ggml_cont(ctx, ggml_view_2d(ctx, mask, mask->ne[0] - shift, mask->ne[1], mask->nb[1], shift*mask->nb[0]));
}

void ziggurat_kv_input::store(
        ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, int il,
        ggml_tensor ** k, ggml_tensor ** v, ggml_tensor ** kq_mask) {
    auto & layer = mctx_kv->kv->layers[il];

    const auto & plan = plans[il];

    const bool staged = step.staged && !layer.slides;

    ggml_tensor * k_rows = staged ? layer.stage_k : layer.k;
    ggml_tensor * v_rows = staged ? layer.stage_v : layer.v;

    // of the first row that is attended to
    const auto offset = [&](const ggml_tensor * rows) {
        return staged ? stage*rows->nb[2] + plan.shift*rows->nb[1] : first_plane*rows->nb[2];
    };

    if (plan.n_copy > 0) {
        effects[il].push_back(copy_rows(ctx, layer.k, first_plane*layer.k->nb[2], k_rows, offset(k_rows), plan.n_copy));
        effects[il].push_back(copy_rows(ctx, layer.v, first_plane*layer.v->nb[2], v_rows, offset(v_rows), plan.n_copy));
    }

    ggml_tensor * idxs = ggml_view_1d(ctx, row_idxs, n_tokens, (step.layer < 0 ? il : 0)*row_idxs->nb[1]);
    const auto put = [&](ggml_tensor * rows, ggml_tensor * cur) {
        GGML_ASSERT(ggml_row_size(cur->type, cur->ne[0]) == cur->nb[1]); // heads of a token lie side by side
        cur = ggml_view_2d(ctx, cur, cur->ne[0]*cur->ne[1], n_tokens, cur->nb[2], 0);
        rows = staged ? ggml_view_2d(ctx, rows, rows->ne[0], rows->ne[1], rows->nb[1], stage*rows->nb[2])
                      : ggml_reshape_2d(ctx, rows, rows->ne[0], rows->ne[1]*rows->ne[2]); // plane after plane
        effects[il].push_back(ggml_set_rows(ctx, rows, cur, idxs));
    };
    put(k_rows, k_cur);
    put(v_rows, v_cur);
    for (auto * node : effects[il]) {
        ggml_build_forward_expand(gf, node);
    }

    const auto get = [&](ggml_tensor * rows, int64_t d) {
        ggml_tensor * view = ggml_view_4d(ctx, rows, d, layer.n_head_kv, plan.n_kv - plan.shift, n_seqs,
                ggml_row_size(rows->type, d), rows->nb[1], rows->nb[2], offset(rows));
        attended[view] = il;
        return view;
    };
    *k = get(k_rows, k_cur->ne[0]);
    *v = get(v_rows, v_cur->ne[0]);
    *kq_mask = mask_of(ctx, il);
}

void ziggurat_kv_input::keep_queries(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, int il) {
    auto & layer = mctx_kv->kv->layers[il];

    if (!ggml_is_contiguous(q)) {
        q = ggml_cont(ctx, q);
    }
    q = ggml_reshape_2d(ctx, q, layer.queries->ne[0], n_tokens);
    if (window_tokens) {
        q = ggml_get_rows(ctx, q, window_tokens);
    } else if (n_window < n_tokens && n_seqs == 1) {
        q = ggml_view_2d(ctx, q, q->ne[0], n_window, q->nb[1], (n_tokens - n_window)*q->nb[1]);
    }
    ggml_tensor * rings = ggml_reshape_2d(ctx, layer.queries, q->ne[0], layer.queries->ne[1]*layer.queries->ne[2]);
    effects[il].push_back(ggml_set_rows(ctx, rings, q, query_idxs));
    ggml_build_forward_expand(gf, effects[il].back());
}

ziggurat_kv_selection ziggurat_kv_input::staged_rows(int il) const {
    const auto & kv    = *mctx_kv->kv;
    const auto & layer = kv.layers[il];
    const auto & plan  = plans[il];
    const auto & seq   = kv.seqs[first_index];

    ziggurat_kv_selection sel;
    sel.il       = il;
    sel.plane    = first_plane;
    sel.n        = plan.past[0] - plan.shift + n_tokens;
    sel.fixed    = seq.fixed[il];
    sel.target   = plan.target;
    sel.last     = seq.next + step.offset + n_tokens - 1;
    sel.queries_from = seq.queries_from;
    sel.k        = layer.stage_k;
    sel.v        = layer.stage_v;
    sel.k_offset = stage*layer.stage_k->nb[2] + plan.shift*layer.stage_k->nb[1];
    sel.v_offset = stage*layer.stage_v->nb[2] + plan.shift*layer.stage_v->nb[1];
    return sel;
}

ggml_tensor * ziggurat_kv_input::sum_up(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ggml_tensor * q, int il) {
    auto & kv    = *mctx_kv->kv;
    auto & layer = kv.layers[il];
    auto   rows  = staged_rows(il);

    const int64_t n      = rows.n;
    const int64_t before = n - n_tokens;
    const int64_t d      = q->ne[0];

    ggml_tensor * sums = nullptr; // of the rows before
    if (before > 0 && step.first) {
        rows.n    = before;
        rows.last = kv.seqs[first_index].next - 1;
        sums = ziggurat_kv_build_sums(ctx, gf, res, kv, rows, rows.last + 1);
    } else if (before > 0) {
        sums = ggml_cont(ctx, ziggurat_kv_sums_view(ctx, layer.stage_sums, stage, before));
    }
    ggml_tensor * mask = mask_of(ctx, il);
    ggml_tensor * k    = ggml_view_3d(ctx, layer.stage_k, d, mask->ne[0], layer.n_head_kv,
            layer.stage_k->nb[1], ggml_row_size(layer.stage_k->type, d), rows.k_offset);
    ggml_tensor * paid = ziggurat_kv_build_paid(ctx, gf, kv, layer, q, k, mask);
    paid = ggml_cont(ctx, ggml_view_2d(ctx, paid, n, layer.n_head_kv, paid->nb[1], 0));
    if (sums != nullptr) {
        paid = ggml_add(ctx, paid, ggml_pad(ctx, sums, n_tokens, 0, 0, 0));
    }
    effects[il].push_back(ggml_cpy(ctx, paid, ziggurat_kv_sums_view(ctx, layer.stage_sums, stage, n)));
    ggml_build_forward_expand(gf, effects[il].back());
    return effects[il].back();
}

void ziggurat_kv_input::finish(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ggml_tensor * q, ggml_tensor * sinks,
        float kq_scale, int il) {
    auto & kv    = *mctx_kv->kv;
    auto & layer = kv.layers[il];

    layer.kq_scale = kq_scale;
    layer.sinks    = sinks;

    if (layer.slides || (step.layer >= 0 && step.layer != il)) {
        return; // there is nothing to select, or the graph is cut down to another layer
    }
    if (query_idxs) {
        keep_queries(ctx, gf, q, il);
    }

    ggml_tensor * sums = step.staged && kv.sums_up() ? sum_up(ctx, gf, res, q, il) : nullptr;

    const auto & plan = plans[il];
    if (plan.target == 0) {
        return;
    }
    auto sel = staged_rows(il);
    sel.sums = sums;

    const uint32_t held = sel.n - step.total; // before the segment

    const auto begin = [&](const ggml_tensor * rows) { return stage*rows->nb[2] + plan.shift*rows->nb[1]; };

    if (plan.target == sel.n) { // nothing has to go
        const auto keep = [&](ggml_tensor * from, ggml_tensor * to) {
            effects[il].push_back(copy_rows(ctx, from, begin(from) + held*from->nb[1],
                        to, first_plane*to->nb[2] + held*to->nb[1], step.total));
            ggml_build_forward_expand(gf, effects[il].back());
        };
        keep(layer.stage_k, layer.k);
        keep(layer.stage_v, layer.v);
        if (sums != nullptr) {
            effects[il].push_back(ggml_cpy(ctx, sums, ziggurat_kv_sums_view(ctx, layer.sums, first_plane, sel.n)));
            ggml_build_forward_expand(gf, effects[il].back());
        }
        return;
    }
    const auto writes = ziggurat_kv_build_move(ctx, gf, kv, sel, ziggurat_kv_build_choice(ctx, gf, res, kv, sel));
    effects[il].insert(effects[il].end(), writes.begin(), writes.end());
}

llm_graph_input_attn_kv * ziggurat_kv_input_of(llm_graph_input_attn_kv_iswa * inp, int il) {
    auto * own = dynamic_cast<ziggurat_kv_input_iswa *>(inp);
    return own ? own->input->of_layer(il) : nullptr;
}

std::unique_ptr<ziggurat_kv_input> ziggurat_kv_make_input(
        const llama_hparams & hparams, const llama_cparams & cparams, const llama_memory_context_i * mctx,
        ggml_context * ctx, const llama_ubatch & ubatch) {
    const auto * mctx_kv = dynamic_cast<const ziggurat_kv_context *>(mctx);
    return mctx_kv ? std::make_unique<ziggurat_kv_input>(hparams, cparams, mctx_kv, ctx, ubatch) : nullptr;
}
