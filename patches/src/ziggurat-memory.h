#pragma once

// What does a context take in memory, by device and buffer type?
//
// A plain C view of llama_get_memory_breakdown (src/llama-ext.h), which returns a std::map. With a model loaded by
// `no_alloc` (and a load mode other than mmap) it says what would be allocated, without allocating it.

#include <stddef.h>
#include <stdint.h>

#include "ziggurat-quant.h" // ZIGGURAT_API

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

// One buffer type. All sizes in bytes. The buffer that logits are copied into is not among them: it belongs to no
// category of llama.cpp's and has n_vocab * n_outputs floats.
struct ziggurat_memory_row {
    char     device[64]; // name of the ggml device, e.g. "CUDA0"; "CPU" for whatever lies in the host's memory
    char     buffer[64]; // name of the buffer type, e.g. "CPU", "CPU_REPACK", "CUDA0", "CUDA_Host"
    uint64_t model;      // weights
    uint64_t context;    // KV rows, recurrent state
    uint64_t compute;    // the graph's temporaries
};

// Writes at most n_rows rows, ordered by device and buffer, and returns how many there are, which may be more; -1 with
// a message when ctx is null or something failed. error, error_size may be NULL, 0. Call it from the thread that uses
// the context.
ZIGGURAT_API int32_t ziggurat_memory_breakdown(
        const struct llama_context * ctx,
        struct ziggurat_memory_row * rows,
        size_t                       n_rows,
        char                       * error,
        size_t                       error_size);

#ifdef __cplusplus
}
#endif
