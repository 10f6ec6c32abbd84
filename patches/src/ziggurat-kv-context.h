#pragma once

// What is computed in one llama_decode: steps, and how each layer takes part in them.

#include "ziggurat-kv-cache.h"

#include "llama-batch.h"
#include "llama-memory.h"

#include <functional>
#include <map>
#include <vector>

struct ziggurat_kv_selection;

// How a layer takes part in a step.
struct ziggurat_kv_plan {
    std::vector<uint32_t> past; // rows before the new ones, per sequence of the ubatch; positions if the layer slides
    uint32_t n_kv   = 0;        // rows attended to, with padding
    uint32_t shift  = 0;        // stage: rows start here, so that the new ones of all layers lie in the same places
    uint32_t n_copy = 0;        // rows to copy to the stage first
    uint32_t target = 0;        // rows to keep when the segment ends with this ubatch, else 0
};

// What is computed in one llama_decode.
class ziggurat_kv_context : public llama_memory_context_i {
public:
    enum class kind { status, batch, reserve, update };

    explicit ziggurat_kv_context(llama_memory_status status) : what(kind::status), status(status) {}

    // a batch, or a step of the prompt of a reading
    ziggurat_kv_context(
            ziggurat_kv_cache * kv, std::vector<llama_ubatch> ubatches, std::vector<ziggurat_kv_step> steps,
            int32_t reading = -1);

    // the largest graph: in place, or of a step that is read through the stage
    ziggurat_kv_context(ziggurat_kv_cache * kv, const ziggurat_kv_step * step);

    // selections, or additions to the sums of attention, without tokens
    ziggurat_kv_context(
            ziggurat_kv_cache * kv, llama_context * lctx,
            std::vector<llama_seq_id> to_select, std::vector<llama_seq_id> to_settle);

    // What was not computed to its end did not happen: the sequences concerned are as they were.
    ~ziggurat_kv_context() override;

    bool next()  override;
    bool apply() override;

    const llama_ubatch & get_ubatch() const override { return ubatches[current().ubatch]; }
    llama_memory_status  get_status() const override { return status; }
    bool                 has_outputs() const override;

    const ziggurat_kv_step & current() const { return steps[i_step]; }

    // plans of all layers for the current step; a reserved graph's depend on its ubatch
    std::vector<ziggurat_kv_plan> plans(const llama_ubatch & ubatch) const;

    // consecutive sequences of a ubatch: how many, the first one's index in seqs and its plane
    uint32_t n_seqs(const llama_ubatch & ubatch) const;
    uint32_t first_index(const llama_ubatch & ubatch) const;
    uint32_t first_plane(const llama_ubatch & ubatch) const;

    // which stage and hidden states are used
    uint32_t stage() const { return reading < 0 ? 0 : reading; }

    ziggurat_kv_cache * kv = nullptr;

private:
    ziggurat_kv_plan plan_sliding(uint32_t il, uint32_t first, uint32_t n_seqs, uint32_t offset, uint32_t n_new) const;
    std::vector<ziggurat_kv_plan> plans_in_place(uint32_t first, uint32_t n_seqs, uint32_t n_new) const;
    std::vector<ziggurat_kv_plan> plans_staged(uint32_t n_new, const std::function<uint32_t(uint32_t)> & held) const;
    std::vector<ziggurat_kv_plan> plans_largest(uint32_t n_seqs, uint32_t n_new) const;

    uint32_t budget(uint32_t il) const;

    void undo();

    bool select();
    bool select(llama_seq_id seq_id);
    bool select(llama_seq_id seq_id, bool move);
    bool settle(llama_seq_id seq_id);
    bool compute(llm_graph_result * res);

    // where a layer's rows are that a sequence selects from
    ziggurat_kv_selection rows_of(llama_seq_id seq_id, uint32_t il) const;

    kind what;
    llama_memory_status status;

    std::vector<llama_ubatch>     ubatches;
    std::vector<ziggurat_kv_step> steps = { {} };
    size_t i_step = 0;

    std::vector<ziggurat_kv_plan> step_plans; // of the step that was applied

    int32_t reading = -1; // of the prompt that the current step belongs to
    std::map<llama_seq_id, ziggurat_kv_sequence> before; // of the sequences that were written in place

    llama_context * lctx = nullptr;
    std::vector<llama_seq_id> to_select;
    std::vector<llama_seq_id> to_settle;
};
