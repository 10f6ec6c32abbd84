#include "ziggurat-kv-topology.h"

#include <unordered_map>

namespace {

// What the allocator's plan depends on, sizes apart: which tensors it allocates, in which order, and who reads them.
uint64_t hash_of(ggml_context * ctx, ggml_cgraph * gf) {
    uint64_t hash = 14695981039346656037u; // FNV-1a
    const auto add = [&](uint64_t value) {
        hash = (hash ^ value)*1099511628211u;
    };
    std::unordered_map<const ggml_tensor *, uint64_t> number;
    const auto add_tensor = [&](const ggml_tensor * t) {
        const auto [it, is_new] = number.emplace(t, number.size());
        add(it->second);
        if (is_new) {
            add((t->data != nullptr) | (t->view_src != nullptr) << 1 | (uint64_t) t->flags << 2 | (uint64_t) t->op << 32);
        }
    };
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        if (t->flags & GGML_TENSOR_FLAG_INPUT) {
            add_tensor(t);
        }
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        for (const ggml_tensor * src : node->src) {
            if (src != nullptr) {
                add_tensor(src);
            }
        }
        add_tensor(node);
        if (node->view_src != nullptr) {
            add_tensor(node->view_src);
        }
    }
    return hash;
}

} // namespace

void ziggurat_kv_topology::tell_apart(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * any) {
    const uint64_t hash = hash_of(ctx, gf);
    if (hash != last_hash && ggml_graph_n_nodes(gf) == last_n_nodes) {
        ggml_build_forward_expand(gf, ggml_view_1d(ctx, any, 0, 0));
    }
    last_hash    = hash;
    last_n_nodes = ggml_graph_n_nodes(gf);
}
