// Prompts that are read into a copy of their sequence, in one batch or in calls of their own.

#include "ziggurat-kv-context.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <numeric>

// Some bytes of a tensor, from one place in it to another.
static void copy_bytes(ggml_tensor * t, size_t from, size_t to, size_t n) {
    const auto bytes_at = [&](size_t offset) {
        ggml_tensor view = *t;
        view.type  = GGML_TYPE_I8;
        view.data  = (char *) t->data + offset;
        view.ne[0] = n;
        view.nb[0] = 1;
        for (int i = 1; i < GGML_MAX_DIMS; ++i) {
            view.ne[i] = 1;
            view.nb[i] = n;
        }
        return view;
    };
    const ggml_tensor src = bytes_at(from);
    ggml_tensor       dst = bytes_at(to);
    if (n > 0) {
        ggml_backend_tensor_copy(&src, &dst);
    }
}

void ziggurat_kv_cache::copy_plane(uint32_t index, uint32_t from, uint32_t to) {
    const auto & seq = seqs[index];
    if (from == to || seq.next == 0) {
        return;
    }
    if (lctx != nullptr) {
        lctx->synchronize();
    }
    for (uint32_t il = 0; il < layers.size(); ++il) {
        const auto & layer = layers[il];
        for (ggml_tensor * t : { layer.k, layer.v }) {
            // a ring is whole, or begins with its first row
            const uint32_t n = layer.slides && seq.used[il] < (uint32_t) seq.next ? layer.capacity : seq.used[il];
            copy_bytes(t, from*t->nb[2], to*t->nb[2], n*t->nb[1]);
        }
        for (ggml_tensor * t : { seq.fixed[il] > 0 ? layer.positions : nullptr, layer.queries, layer.sums }) {
            if (t != nullptr) {
                copy_bytes(t, from*t->nb[2], to*t->nb[2], t->nb[2]);
            }
        }
    }
}

int32_t ziggurat_kv_cache::reading_of(llama_seq_id seq_id) const {
    for (uint32_t r = 0; r < n_reading; ++r) {
        if (readings[r].seq_id == seq_id) {
            return r;
        }
    }
    return -1;
}

bool ziggurat_kv_cache::needs_copy(llama_seq_id seq_id) const {
    // an empty sequence loses nothing, and rows that come after the others destroy none
    return overwrites && seqs[seq_id].next > 0;
}

int32_t ziggurat_kv_cache::free_reading(llama_seq_id seq_id) const {
    const int32_t n = needs_copy(seq_id) ? n_copies : n_reading;
    for (int32_t r = n - 1; r >= 0; --r) { // those without a copy first
        if (readings[r].seq_id < 0) {
            return r;
        }
    }
    return -1;
}

int32_t ziggurat_kv_cache::begin_reading(llama_seq_id seq_id) {
    const int32_t r = free_reading(seq_id);
    if (r < 0) {
        return -1;
    }
    readings[r] = {};
    readings[r].seq_id = seq_id;
    readings[r].plane  = needs_copy(seq_id) ? n_seq + r : seq_id;
    seqs[n_seq + r] = seqs[seq_id];
    copy_plane(seq_id, seq_id, readings[r].plane);
    return r;
}

void ziggurat_kv_cache::commit_reading(int32_t r, bool staged) {
    const auto seq_id = readings[r].seq_id;
    if (staged) {
        note_read(n_seq + r, seqs[n_seq + r].next - seqs[seq_id].next);
    }
    copy_plane(n_seq + r, readings[r].plane, seq_id);
    auto budget = std::move(seqs[seq_id].budget); // may have been set since
    seqs[seq_id] = seqs[n_seq + r];
    seqs[seq_id].budget = std::move(budget);
    drop_reading(r);
}

void ziggurat_kv_cache::drop_reading(int32_t r) {
    readings[r] = {};
}

std::vector<ziggurat_kv_step> ziggurat_kv_cache::prompt_steps(
        llama_seq_id seq_id, const std::vector<uint32_t> & sizes) const {
    const bool chunked = params.prefill == ZIGGURAT_KV_PREFILL_CHUNKED;

    std::vector<ziggurat_kv_step> steps;

    const auto add_in_place = [&](size_t i) {
        ziggurat_kv_step step;
        step.ubatch = i;
        step.total  = sizes[i];
        steps.push_back(step);
    };
    // layer after layer and in it ubatch after ubatch, or ubatch after ubatch
    const auto add_segment = [&](size_t begin, size_t end) {
        const uint32_t total   = std::accumulate(sizes.begin() + begin, sizes.begin() + end, 0u);
        const int32_t  n_layer = layer_major ? layers.size() : 1;
        for (int32_t il = 0; il < n_layer; ++il) {
            uint32_t offset = 0;
            for (size_t i = begin; i < end; ++i) {
                ziggurat_kv_step step;
                step.ubatch = i;
                step.layer  = layer_major ? il : -1;
                step.staged = true;
                step.offset = offset;
                step.total  = total;
                step.first  = i == begin;
                step.last   = i + 1 == end;
                steps.push_back(step);
                offset += sizes[i];
            }
        }
    };
    const uint32_t n_tokens = std::accumulate(sizes.begin(), sizes.end(), 0u);
    const auto &   before   = seqs[seq_id].used;
    // a single token selects nothing: it takes a row of the slack
    bool has_room = n_tokens == 1 && (!sums_up() || seqs[seq_id].next - seqs[seq_id].queries_from < (llama_pos) n_ring);
    for (uint32_t il = 0; il < layers.size(); ++il) {
        has_room &= layers[il].slides || before[il] < layers[il].capacity;
    }
    if (has_room) {
        add_in_place(0);
    } else if (!chunked && (sums_up() || !fits_budget(seq_id, n_tokens))) {
        add_segment(0, sizes.size());
    } else {
        uint32_t read = 0;
        for (size_t i = 0; i < sizes.size(); ++i) {
            read += sizes[i];
            // once it does not fit, the layer that was too small stays full
            fits_budget(seq_id, read) && !sums_up() ? add_in_place(i) : add_segment(i, i + 1);
        }
    }
    for (auto & step : steps) {
        step.copied = true;
    }
    steps.front().begins = true;
    steps.back().ends    = true;
    return steps;
}

bool ziggurat_kv_cache::begin_prompt(llama_seq_id seq_id, const llama_token * tokens, size_t n) {
    refusal.clear();
    if (tokens == nullptr || n == 0 || n > (size_t) std::numeric_limits<llama_pos>::max()) {
        refusal = "a prompt has at least one token";
        return false;
    }
    for (size_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || (uint32_t) tokens[i] >= model.vocab.n_tokens()) {
            refusal = format("token %zu of the prompt is %d, which the vocabulary does not have", i, tokens[i]);
            return false;
        }
    }
    if (!can_go_on(seq_id, n) || !has_place(seq_id, n) || !has_free_reading(seq_id)) {
        return false;
    }
    const int32_t r = begin_reading(seq_id);
    std::vector<uint32_t> sizes;
    for (size_t i = 0; i < n; i += n_ubatch) {
        sizes.push_back(std::min<size_t>(n - i, n_ubatch));
    }
    readings[r].tokens.assign(tokens, tokens + n);
    readings[r].steps = prompt_steps(seq_id, sizes);
    return true;
}

size_t ziggurat_kv_cache::step_begin(int32_t r) const {
    return readings[r].steps[readings[r].done].ubatch*n_ubatch;
}

// One step is a batch of its ubatch's tokens alone.
int32_t ziggurat_kv_cache::compute_step(llama_context & ctx, int32_t r) {
    auto &       reading = readings[r];
    const auto & step    = reading.steps[reading.done];

    const size_t begin = step_begin(r);
    const size_t n     = std::min<size_t>(reading.tokens.size() - begin, n_ubatch);

    llama_seq_id seq_id = reading.seq_id;
    std::vector<llama_pos>      pos(n);
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id *> seq_ids(n, &seq_id);
    std::vector<int8_t>         output(n, 0);
    std::iota(pos.begin(), pos.end(), seqs[seq_id].next + (llama_pos) begin);
    output.back() = step.ends;

    llama_batch batch = {};
    batch.n_tokens = n;
    batch.token    = reading.tokens.data() + begin;
    batch.pos      = pos.data();
    batch.n_seq_id = n_seq_id.data();
    batch.seq_id   = seq_ids.data();
    batch.logits   = output.data();
    return ctx.decode(batch);
}

int32_t ziggurat_kv_cache::step_prompt(
        llama_context & ctx, llama_seq_id seq_id, uint32_t max_steps, ziggurat_kv_progress * progress) {
    refusal.clear();
    const int32_t r = reading_of(seq_id);
    if (seq_id < 0 || r < 0) {
        refusal = format("no prompt is being read for sequence %d", seq_id);
        return -1;
    }
    ziggurat_kv_progress at = {};
    at.steps      = readings[r].steps.size();
    at.steps_done = readings[r].done;
    at.tokens     = readings[r].tokens.size();

    int32_t status = 0;
    while (status == 0 && at.steps_done < at.steps && max_steps-- > 0) {
        resumed = r;
        try {
            status = compute_step(ctx, r);
        } catch (const std::exception & e) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
            status = -2;
        }
        resumed = -1;
        at.steps_done += status == 0;
    }
    at.finished = at.steps_done == at.steps;
    if (status != 0 && reading_of(seq_id) == r) {
        drop_reading(r);
    }
    if (progress != nullptr) {
        *progress = at;
    }
    return status == 0 || status == 2 ? status : -2;
}

llama_memory_context_ptr ziggurat_kv_cache::init_prompt_step(llama_batch_allocr & balloc, uint32_t n_ubatch) {
    auto step = readings[resumed].steps[readings[resumed].done];
    step.ubatch = 0;
    std::vector<llama_ubatch> ubatches = { balloc.split_equal(n_ubatch, true, 0) };
    return std::make_unique<ziggurat_kv_context>(
            this, std::move(ubatches), std::vector<ziggurat_kv_step>{ step }, resumed);
}
