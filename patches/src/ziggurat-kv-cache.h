#pragma once

// The memory class behind a KV budget: what is allocated, which rows are in use, and in which steps a batch is computed.
// The graphs of a step are in ziggurat-kv-graph.h.

#include "ziggurat-kv.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

// upstream pads the rows that attention reads to this, and so do we: the same padding, the same results
static constexpr uint32_t ZIGGURAT_KV_ROW_PADDING = 256;

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

// One graph to compute.
struct ziggurat_kv_step {
    size_t   ubatch = 0;
    int32_t  layer  = -1;    // the only layer computed; -1: all
    bool     staged = false; // read through the stage, else written in place
    uint32_t offset = 0;     // tokens of the segment read before this ubatch
    uint32_t total  = 0;     // tokens of the segment: what is read before rows are selected
    bool     first  = true;  // ubatch of its segment
    bool     last   = true;
};

// How a layer takes part in a step.
struct ziggurat_kv_plan {
    std::vector<uint32_t> past; // rows before the new ones, per sequence of the ubatch
    uint32_t n_kv   = 0;        // rows attended to, with padding
    uint32_t shift  = 0;        // stage: rows start here, so that the new ones of all layers lie in the same places
    uint32_t n_copy = 0;        // rows to copy to the stage first
    uint32_t target = 0;        // rows to keep when the segment ends with this ubatch, else 0
};

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

// What is computed in one llama_decode.
class ziggurat_kv_context : public llama_memory_context_i {
public:
    enum class kind { status, batch, reserve, update };

    explicit ziggurat_kv_context(llama_memory_status status) : what(kind::status), status(status) {}

    // a batch
    ziggurat_kv_context(ziggurat_kv_cache * kv, std::vector<llama_ubatch> ubatches, std::vector<ziggurat_kv_step> steps);

    // the largest graph: in place, or of a step that is read through the stage
    ziggurat_kv_context(ziggurat_kv_cache * kv, const ziggurat_kv_step * step);

    // selections without tokens
    ziggurat_kv_context(ziggurat_kv_cache * kv, llama_context * lctx, std::vector<llama_seq_id> seqs);

    bool next()  override;
    bool apply() override;

    const llama_ubatch & get_ubatch() const override { return ubatches[current().ubatch]; }
    llama_memory_status  get_status() const override { return status; }
    bool                 has_outputs() const override;

    const ziggurat_kv_step & current() const { return steps[i_step]; }

    // plans of all layers for the current step; a reserved graph's depend on its ubatch
    std::vector<ziggurat_kv_plan> plans(const llama_ubatch & ubatch) const;

    // consecutive sequences of a ubatch
    uint32_t     n_seqs(const llama_ubatch & ubatch) const;
    llama_seq_id first_seq(const llama_ubatch & ubatch) const;

    ziggurat_kv_cache * kv = nullptr;

private:
    std::vector<ziggurat_kv_plan> plans_in_place(llama_seq_id first, uint32_t n_seqs, uint32_t n_new) const;
    std::vector<ziggurat_kv_plan> plans_staged(uint32_t n_new, const std::function<uint32_t(uint32_t)> & held) const;
    std::vector<ziggurat_kv_plan> plans_largest(uint32_t n_seqs, uint32_t n_new) const;

    uint32_t budget(uint32_t il) const;

    bool select();
    bool select(llama_seq_id seq_id);

    kind what;
    llama_memory_status status;

    std::vector<llama_ubatch>     ubatches;
    std::vector<ziggurat_kv_step> steps = { {} };
    size_t i_step = 0;

    std::vector<ziggurat_kv_plan> step_plans; // of the step that was applied

    llama_context * lctx = nullptr;
    std::vector<llama_seq_id> to_select;
};

// A cache with a budget if the parameters ask for one and the model can have it, else nullptr.
llama_memory_i * ziggurat_kv_create(
        const llama_model & model, const llama_memory_params & memory_params, const llama_cparams & cparams);
