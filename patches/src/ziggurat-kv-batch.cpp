// How a batch is taken apart: what each sequence needs, and the steps in which it is computed.

#include "ziggurat-kv-context.h"

#include "ziggurat-kv-fault.h"
#include "ziggurat-kv-slide.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>

bool ziggurat_kv_cache::can_go_on(llama_seq_id seq_id, uint32_t n_tokens) {
    if (!exists(seq_id)) {
        refusal = format("sequence %d is not one of %u", seq_id, n_seq);
        return false;
    }
    if (reading_of(seq_id) >= 0) {
        refusal = format("a prompt is being read for sequence %d", seq_id);
        return false;
    }
    // learned position embeddings end somewhere, rotary ones do not
    const int64_t n_positions = model.pos_embd ? model.pos_embd->ne[1] : std::numeric_limits<llama_pos>::max();
    if ((int64_t) seqs[seq_id].next + n_tokens > n_positions) {
        refusal = format("sequence %d has reached the last of the %lld positions that the model knows",
                seq_id, (long long) n_positions);
        return false;
    }
    return true;
}

// Counts the tokens of each sequence, in the order in which the sequences appear. False, with the reason, if they do
// not go on where their sequence ends.
bool ziggurat_kv_cache::check_positions(
        const llama_batch & batch, std::vector<uint32_t> & n_tokens, std::vector<llama_seq_id> & order) {
    n_tokens.assign(n_seq, 0);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const llama_seq_id s = batch.seq_id[i][0];
        if (batch.n_seq_id[i] != 1 || !exists(s)) {
            refusal = "with a KV budget a token belongs to exactly one sequence";
            return false;
        }
        if (n_tokens[s]++ == 0) {
            order.push_back(s);
        }
        if (!can_go_on(s, n_tokens[s])) {
            return false;
        }
        const int64_t expected = (int64_t) seqs[s].next + n_tokens[s] - 1;
        if (batch.pos[i] != expected) {
            refusal = format("sequence %d goes on at position %lld, the batch has %d there", s, (long long) expected, batch.pos[i]);
            return false;
        }
    }
    return true;
}

bool ziggurat_kv_cache::fits_budget(uint32_t index, uint32_t n_tokens) const {
    const auto & seq = seqs[index];
    for (uint32_t il = 0; il < layers.size(); ++il) {
        if (!layers[il].slides && seq.used[il] + n_tokens > seq.budget[il]) {
            return false;
        }
    }
    return true;
}

bool ziggurat_kv_cache::has_place(llama_seq_id seq_id, uint32_t n_tokens) {
    if (fits_budget(seq_id, n_tokens) || (evicts && params.prefill == ZIGGURAT_KV_PREFILL_CHUNKED)) {
        return true;
    }
    uint32_t max_used = 0;
    for (uint32_t il = 0; il < layers.size(); ++il) {
        max_used = std::max(max_used, layers[il].slides ? 0 : seqs[seq_id].used[il]);
    }
    if (evicts && max_used + n_tokens <= stage_rows) {
        return true;
    }
    refusal = evicts ? format("a prompt of %u tokens on %u rows that sequence %d holds exceeds the context of %u",
                            n_tokens, max_used, seq_id, stage_rows)
                     : format("%u tokens on the %u of sequence %d exceed its context of %u",
                            n_tokens, max_used, seq_id, n_ctx);
    return false;
}

bool ziggurat_kv_cache::has_free_reading(llama_seq_id seq_id) {
    if (free_reading(seq_id) >= 0) {
        return true;
    }
    if (n_copies == 0 && needs_copy(seq_id)) {
        refusal = format("sequence %d is not empty, and the context has no room for a copy of it", seq_id);
    } else {
        refusal = format("%u prompts are being read, as many as there may be at a time",
                needs_copy(seq_id) ? n_copies : n_reading);
    }
    return false;
}

bool ziggurat_kv_cache::is_step(llama_seq_id seq_id, uint32_t n_tokens) const {
    return n_tokens == 1 || (n_tokens <= step_tokens && seqs[seq_id].next > 0);
}

ziggurat_kv_cache::need ziggurat_kv_cache::classify(llama_seq_id seq_id, uint32_t n_tokens) {
    if (evicts && is_step(seq_id, n_tokens)) {
        return need::in_place; // there is room, or is made: see due_selections
    }
    // rows are written beside those that are there, but only so many queries are
    const bool can_undo = ziggurat_kv_rings_outlive(*this, seqs[seq_id], n_tokens) &&
            (!evicts || !uses_queries() || (seqs[seq_id].next == 0 && !sums_up()) || n_tokens <= ZIGGURAT_KV_RING_SPARE);
    if (fits_budget(seq_id, n_tokens) && can_undo) {
        return need::in_place;
    }
    return has_place(seq_id, n_tokens) && has_free_reading(seq_id) ? need::prompt : need::refused;
}

int32_t ziggurat_kv_cache::set_step(llama_context & ctx, uint32_t n) {
    refusal.clear();
    uint32_t most = ZIGGURAT_KV_RING_SPARE;
    for (const auto & layer : layers) {
        most = evicts && !layer.slides ? std::min(most, layer.capacity - layer.budget) : most;
    }
    if (n < 1 || n > most) {
        refusal = format("a step of %u tokens; in this context it has 1 to %u", n, most);
        return -1;
    }
    const auto before = std::exchange(step_tokens, n);
    if (!evicts || n <= before) {
        return 0;
    }
    // what the largest step computes in, or batches would find too little of it
    const uint32_t n_tokens  = std::max(1u, std::min(n, n_ubatch/n_seq))*n_seq;
    const uint32_t n_outputs = std::min(n_tokens, cparams.n_outputs_max);
    bool reserved = false;
    try {
        ctx.synchronize();
        ctx.sched_reserve();
        reserved = !ziggurat_kv_fails(this) &&
                ctx.graph_reserve(n_tokens, n_seq, n_outputs, init_full().get(), hparams.no_alloc) != nullptr;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
    }
    if (!reserved) {
        refusal = format("no memory to compute a step of %u tokens in", n);
        step_tokens = before;
    }
    return reserved ? 0 : -2;
}

// A sequence selects when its step does not fit one of its layers, or earlier by as many steps as it takes for no two
// sequences to select in the same one, should all of them go on together with as many tokens each: the one with room for
// the fewest steps first, one in each step, or where there is no room for that as few in each step as there can be. So
// what a sequence keeps depends on its own tokens and steps alone unless others fill up within a few steps of it.
std::vector<llama_seq_id> ziggurat_kv_cache::due_selections(
        const std::vector<std::pair<llama_seq_id, uint32_t>> & stepping) const {
    std::vector<std::pair<uint32_t, llama_seq_id>> rooms; // steps that a sequence has room for
    for (const auto & [s, n_tokens] : stepping) {
        uint32_t room  = std::numeric_limits<uint32_t>::max();
        bool     above = false;
        for (uint32_t il = 0; il < layers.size(); ++il) {
            if (layers[il].slides) {
                continue;
            }
            room   = std::min(room, layers[il].capacity - seqs[s].used[il]);
            above |= seqs[s].used[il] > seqs[s].budget[il];
        }
        // not early if a removal took all queries to select by, which leaves room for more than a step
        if (above && (!is_blind(seqs[s]) || room < n_tokens)) {
            rooms.push_back({ room/n_tokens, s });
        }
    }
    std::sort(rooms.begin(), rooms.end());

    uint32_t count   = 0;     // per step, from now on, so that none comes too late
    bool     crowded = false; // would be if one per step were to begin with the next
    for (uint32_t i = 0; i < rooms.size(); ++i) {
        count    = std::max(count, i/(rooms[i].first + 1) + 1);
        crowded |= rooms[i].first <= i;
    }
    if (!crowded) {
        return {};
    }
    std::vector<llama_seq_id> due;
    for (uint32_t i = 0; i < count; ++i) {
        due.push_back(rooms[i].second);
    }
    return due;
}

llama_memory_context_ptr ziggurat_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool) {
    refusal.clear();
    to_select.clear();
    to_settle.clear();
    balloc.split_reset();

    const auto failed = [](llama_memory_status status) { return std::make_unique<ziggurat_kv_context>(status); };

    if (resumed >= 0) {
        return init_prompt_step(balloc, n_ubatch);
    }
    const auto before = std::exchange(selected, selection::none);
    if (before == selection::failed) {
        return failed(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }
    std::vector<uint32_t>     n_tokens;
    std::vector<llama_seq_id> order;
    if (!check_positions(balloc.get_batch(), n_tokens, order)) {
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    std::vector<need> needs(n_seq, need::in_place);
    std::vector<std::pair<llama_seq_id, uint32_t>> stepping;
    for (const auto s : order) {
        needs[s] = classify(s, n_tokens[s]);
        if (needs[s] == need::refused) {
            return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
        if (is_step(s, n_tokens[s])) {
            stepping.push_back({ s, n_tokens[s] });
        }
    }
    if (evicts && before == selection::none) {
        to_select = due_selections(stepping);
    }
    for (const auto s : order) {
        const bool full = seqs[s].next - seqs[s].queries_from + (llama_pos) n_tokens[s] > (llama_pos) n_ring;
        const bool due  = std::find(to_select.begin(), to_select.end(), s) != to_select.end(); // which does it as well
        if (sums_up() && full && !due && needs[s] == need::in_place && before == selection::none) {
            to_settle.push_back(s);
        }
    }
    if (!to_select.empty() || !to_settle.empty()) {
        // llama_context lets the memory update itself, see init_update, and tries again
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    std::vector<llama_ubatch>     ubatches;
    std::vector<ziggurat_kv_step> steps;

    // The order of the splits is the order of the outputs, so it has to be the order of the steps.
    const auto split = [&](const std::function<bool(llama_seq_id)> & among) {
        std::vector<size_t> own;
        while (true) {
            auto ubatch = n_seq == 1 && needs[0] == need::in_place ? balloc.split_simple(n_ubatch)
                                                                   : balloc.split_equal(n_ubatch, true, 0, among);
            if (ubatch.n_tokens == 0) {
                return own;
            }
            own.push_back(ubatches.size());
            ubatches.push_back(std::move(ubatch)); // NOLINT
        }
    };
    // what is written in place is split as upstream's cache of one stream per sequence splits it
    for (const size_t i : split([&](llama_seq_id s) { return needs[s] == need::in_place; })) {
        ziggurat_kv_step step;
        step.ubatch = i;
        step.total  = ubatches[i].n_tokens;
        steps.push_back(step);
    }
    // then one prompt after the other
    for (const auto s : order) {
        if (needs[s] != need::prompt) {
            continue;
        }
        const auto own = split([&](llama_seq_id other) { return other == s; });
        std::vector<uint32_t> sizes;
        for (const size_t i : own) {
            sizes.push_back(ubatches[i].n_tokens);
        }
        for (auto & step : prompt_steps(s, sizes)) {
            step.ubatch = own[step.ubatch];
            steps.push_back(step);
        }
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        refusal = "the batch could not be split";
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return std::make_unique<ziggurat_kv_context>(this, std::move(ubatches), std::move(steps));
}
