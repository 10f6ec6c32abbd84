#pragma once

// The selection of one layer: which rows stay is asked of ziggurat-kv-score.h, here they are moved.

#include "ziggurat-kv-cache.h"

#include "llama-graph.h"

#include <vector>

// One layer of one plane that selects `target` of its `n` rows.
struct ziggurat_kv_selection {
    uint32_t     il     = 0;
    uint32_t     plane  = 0;
    uint32_t     n      = 0; // rows there are
    uint32_t     fixed  = 0; // the first of them whose positions are in layer.positions
    uint32_t     target = 0;
    llama_pos    last   = 0; // position of the last row
    llama_pos    queries_from = 0; // the first position whose query the ring holds
    ggml_tensor * k     = nullptr; // [n_embd_k_gqa, rows, ...], of which `n` are the sequence's
    ggml_tensor * v     = nullptr;
    size_t       k_offset = 0; // bytes to the first of them
    size_t       v_offset = 0;
    ggml_tensor * sums  = nullptr; // F32 [n, n_head_kv]: of attention, where they are the score
};

// Adds to a graph which rows stay, ascending: F32 [target, n_head_kv].
ggml_tensor * ziggurat_kv_build_choice(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel);

// Adds their move to the plane's place in the cache, and that of their positions. Returns the nodes that write.
std::vector<ggml_tensor *> ziggurat_kv_build_move(
        ggml_context * ctx, ggml_cgraph * gf, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel, ggml_tensor * rows);
