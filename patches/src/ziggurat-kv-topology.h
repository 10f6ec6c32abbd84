#pragma once

// ggml's graph allocator keeps its plan for a graph that has as many nodes and leafs as the one before. Upstream's graphs
// of a context are alike, so that is enough; the graphs of prompts read in steps, of selections and of decoding are not,
// and two of them may agree in these numbers by accident.

#include "ggml.h"

#include <cstdint>

class ziggurat_kv_topology {
public:
    // Call it with every graph before it is allocated. Adds a node that computes nothing where the graph differs from
    // the last one and the allocator would not notice.
    void tell_apart(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * any);

private:
    uint64_t last_hash    = 0;
    int      last_n_nodes = -1;
};
