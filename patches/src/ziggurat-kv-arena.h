#pragma once

#include "ggml-cpp.h"

#include <map>
#include <utility>
#include <vector>

// Tensors that live as long as the cache, one buffer per buffer type.
class ziggurat_kv_arena {
public:
    // a context to make tensors of this buffer type in; room for n_tensors in all
    ggml_context * context(ggml_backend_buffer_type_t buft, size_t n_tensors);

    // allocates what was made since the last call; throws std::runtime_error
    void allocate(bool no_alloc);

    void clear();

    void add_sizes(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

private:
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> open;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> closed;
};
