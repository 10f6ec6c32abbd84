#pragma once

// Sums of attention: what each row has been paid by all queries that saw it, averaged over the query heads of a KV head
// (H2O). Queries of decoding steps are kept and their attention is added later, some at a time: until then, drafts that are
// removed leave no trace. Those of a prompt are added ubatch after ubatch.

#include "ziggurat-kv-select.h"

// queries of decoding steps that are added together; as many as ZIGGURAT_KV_RING_SPARE may stay behind
static constexpr uint32_t ZIGGURAT_KV_SETTLED = 32;

// Sums of some rows of a layer in a plane: a view [n, n_head_kv].
ggml_tensor * ziggurat_kv_sums_view(ggml_context * ctx, ggml_tensor * sums, uint32_t plane, int64_t n);

// Sums of the `n` rows of a plane when the queries kept of positions before `until` are added: F32 [n, n_head_kv].
ggml_tensor * ziggurat_kv_build_sums(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv,
        const ziggurat_kv_selection & sel, llama_pos until);

// What queries pay to the rows k, and nothing is paid where mask says so: F32 [rows, n_head_kv]. q: [d, n_head, n_tokens],
// k: [d, rows, n_head_kv], mask: [rows, n_tokens].
ggml_tensor * ziggurat_kv_build_paid(
        ggml_context * ctx, ggml_cgraph * gf, const ziggurat_kv_cache & kv, const ziggurat_kv_layer & layer,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask);

// Nodes that this takes at most in the graph of one layer.
uint32_t ziggurat_kv_paid_nodes(uint32_t n_tokens);
