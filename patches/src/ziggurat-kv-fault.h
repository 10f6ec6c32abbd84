#pragma once

// Faults: asked for by tests, and kept away from what must not be interrupted.

#include "llama-memory.h"

struct llama_context;

// Whether the allocation or computation of a graph that comes now is the one that a test wants to fail. False for
// upstream's memory.
bool ziggurat_kv_fails(llama_memory_i * memory);

// No abort callback as long as this lives.
class ziggurat_kv_uninterrupted {
public:
    explicit ziggurat_kv_uninterrupted(llama_context & ctx);
    ~ziggurat_kv_uninterrupted();

    ziggurat_kv_uninterrupted(const ziggurat_kv_uninterrupted &) = delete;

private:
    llama_context & ctx;
    bool (*callback)(void * data);
    void * data;
};
