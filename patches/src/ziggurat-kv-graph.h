#pragma once

// What a KV budget adds to the model's graph: rows are stored in place or in the stage, attention reads them there,
// and after the last ubatch of a prompt each layer selects the rows that it keeps.

#include "ziggurat-kv-context.h"

#include "llama-graph.h"

#include "ziggurat-kv-select.h"

#include <unordered_map>
#include <vector>

class ziggurat_kv_input : public llm_graph_input_attn_kv {
public:
    ziggurat_kv_input(
            const llama_hparams       & hparams,
            const llama_cparams       & cparams,
            const ziggurat_kv_context * mctx,
            ggml_context              * ctx,
            const llama_ubatch        & ubatch);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ziggurat_kv_input * get_budget() override { return this; }

    // itself, with what rotates the rows of this layer
    llm_graph_input_attn_kv * of_layer(int il);

    // Stores the new rows of a layer; returns what its attention reads. k_cur: [n_embd_head, n_head_kv, n_tokens].
    void store(
            ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, int il,
            ggml_tensor ** k, ggml_tensor ** v, ggml_tensor ** kq_mask);

    // After a layer's attention: keeps the window's queries, selects. q: [n_embd_head, n_head, n_tokens].
    void finish(
            ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ggml_tensor * q, ggml_tensor * sinks,
            float kq_scale, int il);

    // nodes of a layer on which its output does not depend: they write into the cache
    std::vector<std::vector<ggml_tensor *>> effects; // [n_layer]

    // the rows that a layer's attention reads, by tensor: whoever depends on one contains that layer
    std::unordered_map<const ggml_tensor *, int> attended;

private:
    ggml_tensor * mask_of(ggml_context * ctx, uint32_t il);
    void keep_queries(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, int il);

    // Adds what the ubatch's queries pay to the sums in the stage, and returns these.
    ggml_tensor * sum_up(ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, ggml_tensor * q, int il);

    // what a layer of the stage selects from
    ziggurat_kv_selection staged_rows(int il) const;

    // Layers whose sequences are filled alike share a mask.
    struct mask_class {
        uint32_t      il;             // the first of them
        ggml_tensor * mask = nullptr; // F16 or F32 [n_kv, n_seq_tokens, 1, n_seqs]
    };

    const ziggurat_kv_context * mctx_kv;

    std::vector<ziggurat_kv_plan> plans;    // [n_layer]
    std::vector<mask_class>       masks;
    std::vector<uint32_t>         class_of; // [n_layer]

    ggml_tensor * rot_k[2] = {}; // Hadamard matrices, or none: of layers that see everything, and of those that slide
    ggml_tensor * rot_v[2] = {};

    ggml_tensor * row_idxs   = nullptr; // I64 [n_tokens, n_layer, or 1 if one layer is computed]
    ggml_tensor * query_idxs = nullptr; // I64 [n_window*n_seqs]: rows of the ring

    ggml_tensor * window_tokens = nullptr; // I32 [n_window*n_seqs]: of the ubatch, where they do not lie side by side

    const ziggurat_kv_step step;

    uint32_t     n_tokens     = 0;
    uint32_t     n_seq_tokens = 0;
    uint32_t     n_seqs       = 1;
    uint32_t     n_window     = 0; // tokens of the ubatch, per sequence, that are in the observation window
    uint32_t     first_plane  = 0; // of the sequences
    uint32_t     first_index  = 0; // in the cache's seqs
    uint32_t     stage        = 0; // where a prompt is read
};

// The same for models that have layers with a sliding window: it stands for the other one, which is in the graph as well.
class ziggurat_kv_input_iswa : public llm_graph_input_attn_kv_iswa {
public:
    ziggurat_kv_input_iswa(const llama_hparams & hparams, const llama_cparams & cparams, ziggurat_kv_input * input) :
        llm_graph_input_attn_kv_iswa(hparams, cparams, nullptr), input(input) {}

    void set_input(const llama_ubatch *) override {}
    bool can_reuse(const llm_graph_params &) override { return true; }

    ziggurat_kv_input * input;
};

// What attention of layer il is to take instead of its input, nullptr if that is upstream's.
llm_graph_input_attn_kv * ziggurat_kv_input_of(llm_graph_input_attn_kv_iswa * inp, int il);

// The input of a graph whose memory has a budget, nullptr for upstream's memory.
std::unique_ptr<ziggurat_kv_input> ziggurat_kv_make_input(
        const llama_hparams & hparams, const llama_cparams & cparams, const llama_memory_context_i * mctx,
        ggml_context * ctx, const llama_ubatch & ubatch);
