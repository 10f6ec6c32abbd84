#include "ziggurat-kv-cut.h"

#include "ziggurat-kv-graph.h"

#include "llama-impl.h"

#include "ggml.h"

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using tensor_set = std::unordered_set<const ggml_tensor *>;

ggml_tensor * layer_output(ggml_cgraph * gf, int il) {
    return ggml_graph_get_tensor(gf, ("l_out-" + std::to_string(il)).c_str());
}

const ziggurat_kv_input * budget_input(const llm_graph_result & res) {
    for (const auto & input : res.inputs) {
        if (const auto * found = dynamic_cast<const ziggurat_kv_input *>(input.get())) {
            return found;
        }
    }
    return nullptr;
}

// everything that the roots are computed from, up to `stop`
tensor_set needed(std::vector<ggml_tensor *> roots, const ggml_tensor * stop) {
    tensor_set found;
    while (!roots.empty()) {
        ggml_tensor * t = roots.back();
        roots.pop_back();
        if (t == nullptr || t == stop || !found.insert(t).second) {
            continue;
        }
        roots.insert(roots.end(), t->src, t->src + GGML_MAX_SRC);
        roots.push_back(t->view_src);
    }
    return found;
}

// what has to be computed for a layer: its output, or the graph's if it is the last, and what it writes into the cache
std::vector<ggml_tensor *> layer_roots(ggml_cgraph * gf, const ziggurat_kv_input & input, int il) {
    std::vector<ggml_tensor *> roots = input.effects[il];
    if (il + 1 < (int) input.effects.size()) {
        roots.push_back(layer_output(gf, il));
        return roots;
    }
    const int n_nodes = ggml_graph_n_nodes(gf);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (i == n_nodes - 1 || (node->flags & GGML_TENSOR_FLAG_OUTPUT)) {
            roots.push_back(node);
        }
    }
    return roots;
}

bool is_hidden(const ggml_tensor * t, int64_t n_embd, int64_t n_tokens) {
    return t != nullptr && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) &&
           t->ne[0] == n_embd && t->ne[1] == n_tokens && t->ne[2] == 1 && t->ne[3] == 1;
}

// These hidden states take the place of the node that computed them.
void become_view(ggml_tensor * t, const ggml_tensor * view) {
    t->op = GGML_OP_NONE;
    std::fill(t->src, t->src + GGML_MAX_SRC, nullptr);
    t->view_src  = view->view_src;
    t->view_offs = view->view_offs;
    t->data      = view->data;
}

void forget_results(llm_graph_result & res) {
    res.t_logits      = nullptr;
    res.t_embd        = nullptr;
    res.t_embd_pooled = nullptr;
    res.t_h_nextn     = nullptr;
    res.t_sampled.clear();
    res.t_sampled_probs.clear();
    res.t_sampled_logits.clear();
    res.t_candidates.clear();
}

} // namespace

bool ziggurat_kv_can_cut(const llm_graph_result & res, const ziggurat_kv_cache & kv, int64_t n_tokens) {
    const auto * input = budget_input(res);
    if (input == nullptr) {
        return false;
    }
    const int     n_layer  = kv.layers.size();
    ggml_tensor * previous = nullptr;
    for (int il = 0; il < n_layer; ++il) {
        ggml_tensor * out = layer_output(res.get_gf(), il);
        if (input->effects[il].empty() || (il + 1 < n_layer && !is_hidden(out, kv.hparams.n_embd, n_tokens))) {
            return false;
        }
        const auto found = needed(layer_roots(res.get_gf(), *input, il), previous);
        for (const auto & [rows, owner] : input->attended) {
            if (found.count(rows) != (owner == il)) {
                return false;
            }
        }
        previous = out;
    }
    return true;
}

// Cuts a graph down to the layer of the step: the layer before is replaced by its hidden states, which were kept, and
// the layer's own are kept in their place.
static void cut(const ziggurat_kv_context * mctx, const llm_graph_params & params) {
    auto & res = *params.res;

    const int  il      = mctx->current().layer;
    const int  n_layer = mctx->kv->layers.size();
    const bool is_last = il + 1 == n_layer;

    ggml_cgraph  * gf  = res.get_gf();
    ggml_context * ctx = res.get_ctx();
    ggml_tensor  * in  = il > 0 ? layer_output(gf, il - 1) : nullptr;
    ggml_tensor  * out = is_last ? nullptr : layer_output(gf, il);

    const auto * input = budget_input(res);
    GGML_ASSERT(input != nullptr && (il == 0 || in != nullptr) && (is_last || out != nullptr)); // see ziggurat_kv_can_cut

    const auto keep = needed(layer_roots(gf, *input, il), in);

    std::vector<ggml_tensor *> nodes;
    std::vector<ggml_tensor *> idle; // there for the graph's shape alone: samplers of sequences without an output
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (keep.count(node) > 0) {
            nodes.push_back(node);
            if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
                idle.push_back(node);
            }
        }
    }

    ggml_tensor  * hidden = mctx->kv->hidden;
    ggml_tensor  * place  = hidden == nullptr ? nullptr : ggml_view_2d(ctx, hidden,
            hidden->ne[0], params.ubatch.n_tokens, hidden->nb[1],
            mctx->stage()*hidden->nb[2] + mctx->current().offset*hidden->nb[1]);
    if (in != nullptr) {
        become_view(in, place);
    }

    ggml_graph_clear(gf);
    // inputs are filled whether the layer uses them or not
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        if (t->flags & GGML_TENSOR_FLAG_INPUT) {
            ggml_build_forward_expand(gf, t);
        }
    }
    // in the old order, which puts writes into the cache before reads
    for (auto * node : nodes) {
        ggml_build_forward_expand(gf, node);
    }
    for (auto * node : idle) {
        node->flags &= ~GGML_TENSOR_FLAG_COMPUTE; // what they read was never set
    }
    if (!is_last) {
        ggml_build_forward_expand(gf, ggml_cpy(ctx, out, place));
        forget_results(res);
    }
}

void ziggurat_kv_finish_graph(const llm_graph_params & params) {
    const auto * mctx = dynamic_cast<const ziggurat_kv_context *>(params.mctx);
    if (mctx == nullptr) {
        return;
    }
    if (mctx->current().layer >= 0) {
        cut(mctx, params);
    }
    mctx->kv->topology.tell_apart(params.res->get_ctx(), params.res->get_gf(), mctx->kv->layers[0].k);
}
