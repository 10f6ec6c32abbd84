#pragma once

// Cuts a model's graph down to one layer, so that a prompt can be read layer by layer without a change to the model's
// own code. A graph can be cut where the only thing that a layer takes from the layers before it is the tensor that
// all architectures name "l_out".

#include "llama-graph.h"

class ziggurat_kv_cache;

// Whether every layer of the graph in `res` can be cut out; it was built for n_tokens in place. Changes nothing.
bool ziggurat_kv_can_cut(const llm_graph_result & res, const ziggurat_kv_cache & kv, int64_t n_tokens);

// Completes the graph that was built for these parameters: cut down to the layer of its step, if it has one, and told
// apart from the graph before. Does nothing for upstream's memory.
void ziggurat_kv_finish_graph(const llm_graph_params & params);
