#pragma once

// Which rows a selection keeps. How many is not decided here.

#include "ziggurat-kv-select.h"

// The softmax of the model over kq [n, tokens, heads], of query heads from first_head on, as a layer's attention has it.
ggml_tensor * ziggurat_kv_softmax(
        ggml_context * ctx, const ziggurat_kv_cache & kv, const ziggurat_kv_layer & layer,
        ggml_tensor * kq, ggml_tensor * mask, int64_t first_head);

// What the last queries that are kept pay to each row, by KV head, where they are of a position before `until` (and not of
// one whose attention was added before): F32 [n, n_head_kv]. The mean of the window's queries, or the sum of all.
ggml_tensor * ziggurat_kv_build_attention(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv,
        const ziggurat_kv_selection & sel, llama_pos until);

// Scores of the rows that a selection chooses from, those before the window: F32 [n - window, n_head_kv], higher is
// kept. nullptr if the latest rows are kept, which needs no scores.
ggml_tensor * ziggurat_kv_build_scores(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel);
