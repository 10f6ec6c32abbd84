#pragma once

// The memory class behind a KV budget: what is allocated and which rows are in use. ziggurat-kv-batch.cpp takes a batch
// apart into steps (ziggurat-kv-context.h), ziggurat-kv-graph.h builds their graphs, which ziggurat-kv-cut.h cuts down to
// a layer, and ziggurat-kv-select.h moves the rows that ziggurat-kv-score.h finds worth keeping, for which
// ziggurat-kv-sums.h may sum up attention. ziggurat-kv-prompt.cpp reads a prompt into a copy of its sequence, which takes
// the sequence's place when all is done. ziggurat-kv-state.cpp copies, saves and restores sequences. ziggurat-kv-slide.h is
// about layers with a sliding window.

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
#include <utility>
#include <vector>

struct llama_model;

// upstream pads the rows that attention reads to this, and so do we: the same padding, the same results
static constexpr uint32_t ZIGGURAT_KV_ROW_PADDING = 256;

// tokens that the ring of queries holds beyond the window: so many can be taken back, or fail, and the window is whole
static constexpr uint32_t ZIGGURAT_KV_RING_SPARE = 16;

// Sequences have planes in the tensors [..., n_planes]: n_seq of their own, and n_copies for prompts being read.
struct ziggurat_kv_layer {
    uint32_t n_head    = 0;
    uint32_t n_head_kv = 0;
    uint32_t budget    = 0; // rows after a selection
    uint32_t capacity  = 0; // rows allocated for a sequence
    bool     slides    = false; // it has a sliding window: its rows are a ring, and there is nothing to select

    ggml_backend_buffer_type_t buft = nullptr;

    ggml_tensor * k         = nullptr; // [n_embd_k_gqa, capacity, n_planes]
    ggml_tensor * v         = nullptr; // [n_embd_v_gqa, capacity, n_planes], never transposed
    ggml_tensor * positions = nullptr; // F32 [budget, n_head_kv, n_planes]: of the rows that the last selection left
    ggml_tensor * chosen    = nullptr; // F32 [budget, n_head_kv]: the rows that a selection in place is about to keep
    ggml_tensor * queries   = nullptr; // [n_embd_head_k*n_head, n_ring, n_planes]: a ring of each sequence's last queries
    ggml_tensor * sums      = nullptr; // F32 [capacity, n_head_kv, n_planes]: attention that rows have been paid
    ggml_tensor * sums_next = nullptr; // F32 [capacity, n_head_kv]: what they are when a selection in place is done
    ggml_tensor * stage_k   = nullptr; // [n_embd_k_gqa, stage_rows, n_reading]: of prompts being read; layers may share it
    ggml_tensor * stage_v   = nullptr; // [n_embd_v_gqa, stage_rows, n_reading]
    ggml_tensor * stage_sums = nullptr; // F32 [stage_rows, n_head_kv, n_reading]

    float         kq_scale = 0.0f;    // as the model's graph uses them
    ggml_tensor * sinks    = nullptr; // F32 [n_head]: logits that take part in the softmax and have no row
};

// What a sequence holds. Rows are in the order of their positions. In each layer the first `fixed` are those that the
// last selection left; the others have consecutive positions that end at next - 1. In a layer that slides all of them
// are such: those that no later row has taken the place of.
struct ziggurat_kv_sequence {
    llama_pos next         = 0;     // tokens seen
    llama_pos queries_from = 0;     // the ring holds the queries of positions queries_from .. next - 1; where attention is
                                    // summed up, what came before is in the sums

    std::vector<uint32_t> used;   // [n_layer]
    std::vector<uint32_t> fixed;  // [n_layer]
    std::vector<uint32_t> budget; // [n_layer]
};

// One graph to compute.
struct ziggurat_kv_step {
    size_t   ubatch = 0;
    int32_t  layer  = -1;    // the only layer computed; -1: all
    bool     staged = false; // read through the stage, else written in place
    bool     copied = false; // of a prompt that is read into a copy of its sequence
    uint32_t offset = 0;     // tokens of the segment read before this ubatch
    uint32_t total  = 0;     // tokens of the segment: what is read before rows are selected
    bool     first  = true;  // ubatch of its segment
    bool     last   = true;
    bool     begins = false; // the first step of its prompt
    bool     ends   = false; // the last
};

// A prompt that is being read for a sequence; what has been read so far is seqs[n_seq + its index].
struct ziggurat_kv_reading {
    llama_seq_id seq_id = -1; // -1: there is none
    uint32_t     plane  = 0;  // where it is written: the sequence's own if nothing can be lost there

    // of a prompt that is read in calls of its own
    std::vector<llama_token>      tokens;
    std::vector<ziggurat_kv_step> steps;
    size_t                        done = 0; // steps
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
    llama_memory_context_ptr init_update(llama_context * ctx, bool optimize) override;
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

    ziggurat_kv_params    params; // params.rows points to `rows`
    std::vector<uint32_t> rows;   // [n_layer] as asked; what a layer has of them is layers[].budget

    const uint32_t n_seq;
    const uint32_t n_reading; // prompts that may be read at a time
    const uint32_t n_copies;  // the first of them may be read into a copy
    const uint32_t n_ctx;     // padded
    const uint32_t n_ubatch;
    const uint32_t n_ring;    // queries in a ring

    bool     evicts      = false; // whether anything can ever be evicted
    bool     overwrites  = false; // whether reading a prompt can destroy rows that its sequence has
    bool     layer_major = false;
    uint32_t stage_rows  = 0;

    std::vector<ziggurat_kv_layer>    layers;   // [n_layer]
    std::vector<ziggurat_kv_sequence> seqs;     // [n_seq + n_reading]
    std::vector<ziggurat_kv_reading>  readings; // [n_reading]

    ggml_tensor * hidden = nullptr; // F32 [n_embd, tokens of a segment, n_reading]: between the layers of a prompt

    llama_context * lctx = nullptr; // the context that this is the memory of, once it has computed anything

    // upstream's caches of one row: they know whether and how rows of quantized types are rotated
    std::unique_ptr<llama_kv_cache> rotation;
    std::unique_ptr<llama_kv_cache> rotation_swa; // in layers that slide

    ziggurat_kv_topology topology; // of the last graph

    std::string refusal; // why the last call was refused

    std::vector<llama_seq_id> to_select; // sequences that have to select before the batch goes on
    std::vector<llama_seq_id> to_settle; // those whose ring has no room for more queries before some are summed up

    enum class selection { none, done, failed };
    selection selected = selection::none; // what became of them: the batch goes on, or has to fail

    int64_t fail_in = -1; // see ziggurat_kv_test_fail_at

    uint32_t step_tokens = 1; // see ziggurat_kv_set_step

    // queries of a sequence's last tokens that a selection is by
    static uint32_t observed(const ziggurat_kv_params & params);

    bool uses_queries() const { return observed(params) > 0; }
    bool sums_up() const { return evicts && params.score == ZIGGURAT_KV_SCORE_H2O; }

    // whether there is nothing to select by: removals took all the queries
    bool is_blind(const ziggurat_kv_sequence & seq) const {
        return uses_queries() && !sums_up() && seq.queries_from >= seq.next;
    }
    bool exists(llama_seq_id seq_id) const { return seq_id >= 0 && (uint32_t) seq_id < n_seq; }

    ziggurat_kv_layout layout() const;

    // rows that attention reads of a layer which holds n of a sequence
    uint32_t padded_rows(const ziggurat_kv_layer & layer, uint32_t n) const;

    // A layer of seqs[index] that had n_rows keeps `target` of them.
    void note_selection(uint32_t index, uint32_t il, uint32_t n_rows, uint32_t target);

    // Adds n tokens in place, in all layers of seqs[index].
    void append(uint32_t index, uint32_t n);

    // seqs[index] goes on by n tokens.
    void advance(uint32_t index, uint32_t n);

    // The n last tokens of seqs[index] were read through the stage: of more than the window has the ring got only the last
    // ones.
    void note_read(uint32_t index, uint32_t n);

    // The attention of all queries of seqs[index] before a position is in its sums.
    void note_settled(uint32_t index, llama_pos until);

    // Forgets a sequence, and the prompt that is being read for it.
    void clear_seq(llama_seq_id seq_id);

    // What seqs[index] holds, from one plane to another. Waits for the computation that is running.
    void copy_plane(uint32_t index, uint32_t from, uint32_t to);

    // The prompt being read for a sequence, -1 if there is none.
    int32_t reading_of(llama_seq_id seq_id) const;

    // Takes a reading that is free, -1 if none is, and makes it a copy of the sequence.
    int32_t begin_reading(llama_seq_id seq_id);
    void    commit_reading(int32_t reading, bool staged);
    void    drop_reading(int32_t reading);

    // The steps in which a prompt is read that comes in ubatches of these sizes. step.ubatch is an index of `sizes`.
    std::vector<ziggurat_kv_step> prompt_steps(llama_seq_id seq_id, const std::vector<uint32_t> & sizes) const;

    // Reads the tokens in calls of their own: see ziggurat-kv.h, which says what is returned.
    bool    begin_prompt(llama_seq_id seq_id, const llama_token * tokens, size_t n);
    int32_t step_prompt(llama_context & ctx, llama_seq_id seq_id, uint32_t max_steps, ziggurat_kv_progress * progress);

    // Takes back what was written of `now` since it was `before`. Its rings may be overwritten in part.
    void take_back(const ziggurat_kv_sequence & before, ziggurat_kv_sequence & now) const;

    // How many of a sequence's last tokens can be removed.
    uint32_t tail(const ziggurat_kv_sequence & seq) const;

    // Removes the positions from p0 on. Returns why that cannot be, with nothing changed, or "".
    std::string cut(ziggurat_kv_sequence & seq, llama_seq_id seq_id, llama_pos p0) const;

    // See ziggurat-kv.h, which says what is returned.
    llama_pos removable_from(llama_seq_id seq_id) const;
    int32_t   set_step(llama_context & ctx, uint32_t n);

    // least and most rows that a sequence's own budget may have in a layer
    std::pair<uint32_t, uint32_t> budget_range(uint32_t il) const;

private:
    void make_rows();
    std::unique_ptr<llama_kv_cache> make_rotation(bool slides) const;
    void make_stage(bool layer_major);
    void make_stage_sums(bool layer_major);
    bool can_cut() const;

    // what the tokens of one sequence in a batch need
    enum class need { in_place, prompt, refused };
    need classify(llama_seq_id seq_id, uint32_t n_tokens);
    bool is_step(llama_seq_id seq_id, uint32_t n_tokens) const;

    // whether n more tokens have positions and places, and another prompt may be read: why not is in `refusal`
    bool can_go_on(llama_seq_id seq_id, uint32_t n_tokens);
    bool has_place(llama_seq_id seq_id, uint32_t n_tokens);
    bool has_free_reading(llama_seq_id seq_id);
    bool needs_copy(llama_seq_id seq_id) const;
    int32_t free_reading(llama_seq_id seq_id) const;
    bool fits_budget(uint32_t index, uint32_t n_tokens) const;
    bool check_positions(const llama_batch & batch, std::vector<uint32_t> & n_tokens, std::vector<llama_seq_id> & order);

    // of sequences that take a decoding step together, with their tokens in it: those that select before it
    std::vector<llama_seq_id> due_selections(const std::vector<std::pair<llama_seq_id, uint32_t>> & stepping) const;

    size_t  step_begin(int32_t reading) const; // token of the prompt that its next step begins with
    int32_t compute_step(llama_context & ctx, int32_t reading);
    llama_memory_context_ptr init_prompt_step(llama_batch_allocr & balloc, uint32_t n_ubatch);

    int32_t resumed = -1; // the reading that the batch being decoded is a step of

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
