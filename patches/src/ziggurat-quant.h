#pragma once

// Which ggml type does llama.cpp's recipe give each tensor of a model?
//
// A plain C view of what `llama-quantize` decides (src/llama-quant.cpp), for callers that quantize by themselves and
// want the same file. Nothing is read from disk and nothing aborts: every mistake in the input comes back as a message.

#include <stddef.h>
#include <stdint.h>
#ifndef __cplusplus
#    include <stdbool.h>
#endif

#ifndef ZIGGURAT_API
#    ifdef _WIN32
#        define ZIGGURAT_API __declspec(dllexport)
#    else
#        define ZIGGURAT_API __attribute__((visibility("default")))
#    endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The hyperparameters that the recipes look at, as the GGUF's metadata states them. Where the metadata has one value
// per layer (head counts, feed-forward width), give that of layer 0, which is what the quantizer reads.
struct ziggurat_quant_desc {
    const char * arch;          // general.architecture, e.g. "llama"
    uint32_t     n_embd;        // <arch>.embedding_length
    uint32_t     n_ff;          // <arch>.feed_forward_length (0 if absent)
    uint32_t     n_layer;       // <arch>.block_count, next-token-prediction blocks included; 1 .. 512
    uint32_t     n_head;        // <arch>.attention.head_count (0 if absent)
    uint32_t     n_head_kv;     // <arch>.attention.head_count_kv; where absent, the same as n_head
    uint32_t     n_expert;      // <arch>.expert_count (0 if absent)
    uint32_t     n_embd_head_k; // <arch>.attention.key_length; where absent, n_embd / n_head
    uint32_t     n_embd_head_v; // <arch>.attention.value_length; where absent, n_embd / n_head
};

struct ziggurat_quant_tensor {
    const char * name;  // GGUF name, shorter than GGML_MAX_NAME (64) bytes, unique in the list
    int32_t      type;  // enum ggml_type of the source tensor
    int64_t      ne[4]; // ggml order (ne[0] = columns); unused dimensions are 1
};

// Fills result_types[i] with the enum ggml_type that `llama-quantize` would give tensors[i] in a file of type `ftype`
// (enum llama_ftype). A tensor that is not quantized keeps its own type. The list must be the whole model's: tied
// embeddings are recognized by the absence of output.weight, and the counters behind "the first eighth of the layers"
// run over it. Its order does not matter: it is sorted the way the quantizer sorts.
//
//   has_imatrix        whether the quantizer would be run with an importance matrix
//   requires_imatrix   may be NULL; requires_imatrix[i] = 1 where `llama-quantize` refuses to go on without
//                      importance data for this very tensor, else 0. This alone is not an error here.
//   error, error_size  may be NULL, 0; receives a terminated message, cut to fit, when the result is not 0
//
// Returns 0, or 1 with a message; then the results are unspecified. Thread safe. Shapes that a type does not fit get
// the recipe's fallback type, and llama.cpp logs a warning for each of them.
ZIGGURAT_API int32_t ziggurat_quant_types(
        const struct ziggurat_quant_desc   * desc,
        int32_t                              ftype,
        bool                                 has_imatrix,
        const struct ziggurat_quant_tensor * tensors,
        size_t                               n_tensors,
        int32_t                            * result_types,
        uint8_t                            * requires_imatrix,
        char                               * error,
        size_t                               error_size);

// The enum ggml_type that a file type starts from, or -1 if there is no such file type.
ZIGGURAT_API int32_t ziggurat_ftype_default_type(int32_t ftype);

#ifdef __cplusplus
}
#endif
