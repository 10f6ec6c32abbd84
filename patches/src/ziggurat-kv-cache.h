#pragma once

// The memory class behind a KV budget: what is allocated and which rows are in use. ziggurat-kv-batch.cpp takes a batch
// apart into steps (ziggurat-kv-context.h), ziggurat-kv-graph.h builds their graphs, which ziggurat-kv-cut.h cuts down to
// a layer, and ziggurat-kv-select.h moves the rows that ziggurat-kv-score.h finds worth keeping.

#include "ziggurat-kv-arena.h"
#include "ziggurat-kv-topology.h"
#include "ziggurat-kv.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

// upstream pads the rows that attention reads to this, and so do we: the same padding, the same results
static constexpr uint32_t ZIGGURAT_KV_ROW_PADDING = 256;

struct ziggurat_kv_layer {
    uint32_t n_head    = 0;
    uint32_t n_head_kv = 0;
    uint32_t budget    = 0; // rows after a selection
    uint32_t capacity  = 0; // rows allocated for a sequence

    ggml_backend_buffer_type_t buft = nullptr;

    ggml_tensor * k         = nullptr; // [n_embd_k_gqa, capacity, n_seq]
    ggml_tensor * v         = nullptr; // [n_embd_v_gqa, capacity, n_seq], never transposed
    ggml_tensor * positions = nullptr; // F32 [budget, n_head_kv, n_seq]: of the rows that the last selection left
    ggml_tensor * queries   = nullptr; // [n_embd_head_k*n_head, window*n_seq]: a ring of each sequence's last queries
    ggml_tensor * stage_k   = nullptr; // [n_embd_k_gqa, stage_rows]: rows of the prompt being read; layers may share it
    ggml_tensor * stage_v   = nullptr; // [n_embd_v_gqa, stage_rows]

    float kq_scale = 0.0f; // as the model's graph uses it
};

// What a sequence holds. Rows are in the order of their positions. In each layer the first `fixed` are those that the
// last selection left; the others have consecutive positions that end at next - 1.
struct ziggurat_kv_sequence {
    llama_pos next         = 0;     // tokens seen
    llama_pos queries_from = 0;     // the ring holds the queries of positions max(queries_from, next - window) .. next - 1
    bool      reading      = false; // a prompt is being read through the stage: the layers do not agree

    std::vector<uint32_t> used;   // [n_layer]
    std::vector<uint32_t> fixed;  // [n_layer]
    std::vector<uint32_t> budget; // [n_layer]
};

struct ziggurat_kv_step;

class ziggurat_kv_cache : public llama_memory_i {
public:
    // Throws std::runtime_error with what is wrong with the parameters.
    ziggurat_kv_cache(
            const llama_model         & model,
            const llama_memory_params & memory_params,
            const llama_cparams       & cparams,
            const ziggurat_kv_params  & params);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;
    std::vector<llama_memory_context_ptr> init_staged() override;
    uint32_t n_extra_nodes() const override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    const llama_model   & model;
    const llama_hparams & hparams;

    ziggurat_kv_params    params; // params.rows is not ours: see layers[].budget
    std::vector<uint32_t> rows;   // [n_layer] as asked

    const uint32_t n_seq;
    const uint32_t n_ctx;    // padded
    const uint32_t n_ubatch;

    bool     evicts      = false; // whether anything can ever be evicted
    bool     layer_major = false;
    uint32_t stage_rows  = 0;

    std::vector<ziggurat_kv_layer>    layers; // [n_layer]
    std::vector<ziggurat_kv_sequence> seqs;   // [n_seq]

    ggml_tensor * hidden = nullptr; // F32 [n_embd, tokens of a segment]: between the layers of a prompt

    // upstream's cache of one row: knows whether and how rows of quantized types are rotated
    std::unique_ptr<llama_kv_cache> rotation;

    ziggurat_kv_topology topology; // of the last graph

    std::string refusal; // why the last call was refused

    std::vector<llama_seq_id> to_select; // sequences that have to select before the batch goes on

    bool uses_queries() const { return params.score == ZIGGURAT_KV_SCORE_SNAPKV; }
    bool exists(llama_seq_id seq_id) const { return seq_id >= 0 && (uint32_t) seq_id < n_seq; }

    ziggurat_kv_layout layout() const;

    // rows that attention reads of a layer which holds n of a sequence
    uint32_t padded_rows(const ziggurat_kv_layer & layer, uint32_t n) const;

    // A layer of the sequence that had n_rows keeps `target` of them.
    void note_selection(llama_seq_id seq_id, uint32_t il, uint32_t n_rows, uint32_t target);

    // Adds n tokens in place, in all layers.
    void append(llama_seq_id seq_id, uint32_t n);

    void clear_seq(llama_seq_id seq_id);

private:
    void make_rows();
    void make_stage(bool layer_major);
    bool can_cut() const;

    // what the tokens of one sequence in a batch need
    enum class need { in_place, staged, selection, refused };
    need classify(llama_seq_id seq_id, uint32_t n_tokens);
    bool check_positions(const llama_batch & batch, std::vector<uint32_t> & n_tokens, std::vector<llama_seq_id> & order);
    void add_steps(std::vector<ziggurat_kv_step> & steps, const std::vector<llama_ubatch> & ubatches,
                   const std::vector<size_t> & own, llama_seq_id seq_id) const;

    const llama_cparams cparams;
    const ggml_type     type_k;
    const ggml_type     type_v;
    const bool          offload;

    ziggurat_kv_arena rows_arena;
    ziggurat_kv_arena stage_arena;
};

// A cache with a budget if the parameters ask for one and the model can have it, else nullptr.
llama_memory_i * ziggurat_kv_create(
        const llama_model & model, const llama_memory_params & memory_params, const llama_cparams & cparams);
