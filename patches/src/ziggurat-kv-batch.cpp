// How a batch is taken apart: what each sequence needs, and the steps in which it is computed.

#include "ziggurat-kv-context.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>

// Counts the tokens of each sequence, in the order in which the sequences appear. False, with the reason, if they do
// not go on where their sequence ends.
bool ziggurat_kv_cache::check_positions(
        const llama_batch & batch, std::vector<uint32_t> & n_tokens, std::vector<llama_seq_id> & order) {
    // learned position embeddings end somewhere, rotary ones do not
    const int64_t n_positions = model.pos_embd ? model.pos_embd->ne[1] : std::numeric_limits<llama_pos>::max();

    n_tokens.assign(n_seq, 0);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const llama_seq_id s = batch.seq_id[i][0];
        if (batch.n_seq_id[i] != 1 || !exists(s)) {
            refusal = "with a KV budget a token belongs to exactly one sequence";
            return false;
        }
        const int64_t expected = (int64_t) seqs[s].next + n_tokens[s];
        if (expected >= n_positions) {
            refusal = format("sequence %d has reached the last of the %lld positions that the model knows", s, (long long) n_positions);
            return false;
        }
        if (batch.pos[i] != expected) {
            refusal = format("sequence %d goes on at position %lld, the batch has %d there", s, (long long) expected, batch.pos[i]);
            return false;
        }
        if (n_tokens[s]++ == 0) {
            order.push_back(s);
        }
    }
    return true;
}

ziggurat_kv_cache::need ziggurat_kv_cache::classify(llama_seq_id seq_id, uint32_t n_tokens) {
    const auto & seq = seqs[seq_id];

    bool     below_budget = true;
    bool     has_room     = true;
    bool     frees        = true;
    uint32_t max_used     = 0;
    for (uint32_t il = 0; il < layers.size(); ++il) {
        const uint32_t n = seq.used[il] + n_tokens;
        below_budget &= n <= seq.budget[il];
        has_room     &= n <= layers[il].capacity;
        frees        &= seq.budget[il] + n_tokens <= layers[il].capacity;
        max_used      = std::max(max_used, seq.used[il]);
    }
    if (!evicts) {
        if (has_room) {
            return need::in_place;
        }
        refusal = format("%u tokens on the %u of sequence %d exceed its context of %u", n_tokens, max_used, seq_id, n_ctx);
        return need::refused;
    }
    if (n_tokens == 1 && has_room) {
        return need::in_place;
    }
    if (n_tokens == 1 && frees) {
        return need::selection;
    }
    if (below_budget) {
        return need::in_place;
    }
    if (params.prefill != ZIGGURAT_KV_PREFILL_CHUNKED && max_used + n_tokens > stage_rows) {
        refusal = format("a prompt of %u tokens on %u rows that sequence %d holds exceeds the context of %u",
                n_tokens, max_used, seq_id, stage_rows);
        return need::refused;
    }
    return need::staged;
}

// The steps of one sequence's prompt: layer after layer and in it ubatch after ubatch, or ubatch after ubatch.
void ziggurat_kv_cache::add_steps(
        std::vector<ziggurat_kv_step> & steps, const std::vector<llama_ubatch> & ubatches,
        const std::vector<size_t> & own, llama_seq_id seq_id) const {
    const bool chunked = params.prefill == ZIGGURAT_KV_PREFILL_CHUNKED;

    const auto add_segment = [&](size_t begin, size_t end) {
        uint32_t total = 0;
        for (size_t i = begin; i < end; ++i) {
            total += ubatches[own[i]].n_tokens;
        }
        for (int32_t il = layer_major ? 0 : -1; il < (layer_major ? (int32_t) layers.size() : 0); ++il) {
            uint32_t offset = 0;
            for (size_t i = begin; i < end; ++i) {
                steps.push_back({ own[i], il, true, offset, total, i == begin, i + 1 == end });
                offset += ubatches[own[i]].n_tokens;
            }
        }
    };
    if (!chunked) {
        add_segment(0, own.size());
        return;
    }
    auto used = seqs[seq_id].used;
    for (size_t i = 0; i < own.size(); ++i) {
        const uint32_t n = ubatches[own[i]].n_tokens;
        bool fits = true;
        for (uint32_t il = 0; il < layers.size(); ++il) {
            fits &= used[il] + n <= seqs[seq_id].budget[il];
        }
        if (fits) {
            steps.push_back({ own[i], -1, false, 0, n, true, true });
        } else {
            add_segment(i, i + 1);
        }
        for (uint32_t il = 0; il < layers.size(); ++il) {
            used[il] = std::min(used[il] + n, seqs[seq_id].budget[il]);
        }
    }
}

llama_memory_context_ptr ziggurat_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool) {
    refusal.clear();
    to_select.clear();
    balloc.split_reset();

    const auto failed = [] { return std::make_unique<ziggurat_kv_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE); };

    std::vector<uint32_t>     n_tokens;
    std::vector<llama_seq_id> order;
    if (!check_positions(balloc.get_batch(), n_tokens, order)) {
        return failed();
    }
    std::vector<need> needs(n_seq, need::in_place);
    for (const auto s : order) {
        needs[s] = classify(s, n_tokens[s]);
        if (needs[s] == need::refused) {
            to_select.clear();
            return failed();
        }
        if (needs[s] == need::selection) {
            to_select.push_back(s);
        }
    }
    if (!to_select.empty()) {
        return failed(); // llama_context lets the memory update itself, see init_update, and tries again
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
        steps.push_back({ i, -1, false, 0, ubatches[i].n_tokens, true, true });
    }
    // then one prompt after the other
    for (const auto s : order) {
        if (needs[s] == need::staged) {
            add_steps(steps, ubatches, split([&](llama_seq_id other) { return other == s; }), s);
        }
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        refusal = "the batch could not be split";
        return failed();
    }
    return std::make_unique<ziggurat_kv_context>(this, std::move(ubatches), std::move(steps));
}
