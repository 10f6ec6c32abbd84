#pragma once

// Which rows a selection keeps. How many is not decided here.

#include "ziggurat-kv-select.h"

// Scores of the rows that a selection chooses from, those before the window: F32 [n - window, n_head_kv], higher is
// kept. nullptr if the latest rows are kept, which needs no scores.
ggml_tensor * ziggurat_kv_build_scores(
        ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ziggurat_kv_cache & kv, const ziggurat_kv_selection & sel);
