#include "ziggurat-kv-context.h"

#include "ziggurat-kv-fault.h"
#include "ziggurat-kv-select.h"
#include "ziggurat-kv-sums.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>

static constexpr uint32_t ROW_PADDING = ZIGGURAT_KV_ROW_PADDING;

ziggurat_kv_context::ziggurat_kv_context(
        ziggurat_kv_cache * kv, std::vector<llama_ubatch> ubatches, std::vector<ziggurat_kv_step> steps, int32_t reading) :
    kv(kv), what(kind::batch), status(LLAMA_MEMORY_STATUS_SUCCESS), ubatches(std::move(ubatches)), steps(std::move(steps)),
    reading(reading) {
}

ziggurat_kv_context::ziggurat_kv_context(ziggurat_kv_cache * kv, const ziggurat_kv_step * step) :
    kv(kv), what(kind::reserve), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    if (step != nullptr) {
        steps = { *step };
    }
}

ziggurat_kv_context::ziggurat_kv_context(
        ziggurat_kv_cache * kv, llama_context * lctx,
        std::vector<llama_seq_id> to_select, std::vector<llama_seq_id> to_settle) :
    kv(kv), what(kind::update), status(LLAMA_MEMORY_STATUS_SUCCESS), lctx(lctx),
    to_select(std::move(to_select)), to_settle(std::move(to_settle)) {
}

ziggurat_kv_context::~ziggurat_kv_context() {
    if (what == kind::batch && i_step < steps.size()) {
        undo();
    }
}

void ziggurat_kv_context::undo() {
    for (auto & [s, seq] : before) {
        kv->take_back(seq, kv->seqs[s]);
    }
    if (reading >= 0) {
        kv->drop_reading(reading);
    }
}

bool ziggurat_kv_context::has_outputs() const {
    return current().layer < 0 || current().layer + 1 == (int32_t) kv->layers.size();
}

uint32_t ziggurat_kv_context::n_seqs(const llama_ubatch & ubatch) const {
    return kv->n_seq > 1 ? ubatch.n_seqs : 1;
}

uint32_t ziggurat_kv_context::first_index(const llama_ubatch & ubatch) const {
    if (what != kind::batch) {
        return 0;
    }
    return current().copied ? kv->n_seq + reading : ubatch.seq_id[0][0];
}

uint32_t ziggurat_kv_context::first_plane(const llama_ubatch & ubatch) const {
    return what == kind::batch && current().copied ? kv->readings[reading].plane : first_index(ubatch);
}

// Called when a step has been computed: what it changed is true from now on.
bool ziggurat_kv_context::next() {
    const auto & step  = current();
    const auto   index = first_index(get_ubatch());
    if (step.staged && step.last) {
        for (uint32_t il = 0; il < kv->layers.size(); ++il) {
            if (step.layer >= 0 && step.layer != (int32_t) il) {
                continue;
            }
            const uint32_t n = kv->seqs[index].used[il] + step.total;
            if (kv->layers[il].slides) {
                kv->seqs[index].used[il] = std::min(n, kv->layers[il].capacity);
            } else {
                kv->note_selection(index, il, n, step_plans[il].target);
            }
        }
        if (has_outputs()) {
            kv->advance(index, step.total);
            kv->note_settled(index, kv->seqs[index].next);
        }
    }
    if (step.copied) {
        kv->readings[reading].done++;
    }
    if (step.ends) {
        kv->commit_reading(reading, step.staged);
        reading = -1;
    }
    return ++i_step < steps.size();
}

bool ziggurat_kv_context::apply() {
    if (what == kind::update) {
        return select();
    }
    if (what != kind::batch) {
        return true;
    }
    const auto & step   = current();
    const auto & ubatch = get_ubatch();
    if (step.begins && reading < 0) {
        reading = kv->begin_reading(ubatch.seq_id[0][0]);
        if (reading < 0) {
            return false;
        }
    }
    const uint32_t n_new = ubatch.n_tokens/n_seqs(ubatch);
    const uint32_t first = first_index(ubatch);

    if (step.staged) {
        step_plans = plans_staged(n_new, [&](uint32_t il) { return kv->seqs[first].used[il]; });
        return true;
    }
    step_plans = plans_in_place(first, n_seqs(ubatch), n_new);
    // the rows count from now on, and no longer if the step fails
    for (uint32_t s = first; s < first + n_seqs(ubatch); ++s) {
        if (!step.copied) {
            before.emplace(s, kv->seqs[s]);
        }
        kv->append(s, n_new);
    }
    return true;
}

std::vector<ziggurat_kv_plan> ziggurat_kv_context::plans(const llama_ubatch & ubatch) const {
    if (what == kind::batch) {
        return step_plans;
    }
    const uint32_t n_new = ubatch.n_tokens/n_seqs(ubatch);
    return current().staged ? plans_staged(n_new, [&](uint32_t il) { return kv->layers[il].capacity; })
                            : plans_largest(n_seqs(ubatch), n_new);
}

// A ring is read where it is, also by prompts: into the plane of the copy.
ziggurat_kv_plan ziggurat_kv_context::plan_sliding(
        uint32_t il, uint32_t first, uint32_t n_seqs, uint32_t offset, uint32_t n_new) const {
    const auto & layer = kv->layers[il];
    ziggurat_kv_plan plan;
    for (uint32_t s = first; s < first + n_seqs; ++s) {
        const auto &   seq  = kv->seqs[s];
        const uint32_t past = what == kind::batch ? seq.next + offset : 0;
        const bool     full = what != kind::batch || past + n_new > layer.capacity || seq.used[il] < (uint32_t) seq.next;
        plan.past.push_back(past);
        plan.n_kv = std::max(plan.n_kv, full ? layer.capacity : kv->padded_rows(layer, past + n_new));
    }
    return plan;
}

std::vector<ziggurat_kv_plan> ziggurat_kv_context::plans_in_place(uint32_t first, uint32_t n_seqs, uint32_t n_new) const {
    std::vector<ziggurat_kv_plan> res(kv->layers.size());
    for (uint32_t il = 0; il < res.size(); ++il) {
        if (kv->layers[il].slides) {
            res[il] = plan_sliding(il, first, n_seqs, 0, n_new);
            continue;
        }
        for (uint32_t s = first; s < first + n_seqs; ++s) {
            const auto & seq = kv->seqs[s];
            res[il].past.push_back(seq.used[il]);
            // once rows were evicted the number in use goes up and down, and a constant n_kv lets graphs be reused
            const uint32_t n = seq.fixed[il] > 0 ? kv->layers[il].capacity : seq.used[il] + n_new;
            res[il].n_kv = std::max(res[il].n_kv, kv->padded_rows(kv->layers[il], n));
        }
    }
    return res;
}

// Plans of a step through the stage, given how many rows each layer holds before the segment.
std::vector<ziggurat_kv_plan> ziggurat_kv_context::plans_staged(
        uint32_t n_new, const std::function<uint32_t(uint32_t)> & held) const {
    const auto & step = current();

    std::vector<uint32_t> before;
    for (uint32_t il = 0; il < kv->layers.size(); ++il) {
        // a graph that is cut down to one layer has all layers alike
        const uint32_t of   = step.layer < 0 ? il : step.layer;
        const uint32_t rows = kv->layers[of].slides ? 0 : held(of);
        before.push_back(std::min(rows, kv->stage_rows - step.total));
    }
    const uint32_t base = *std::max_element(before.begin(), before.end());

    std::vector<ziggurat_kv_plan> res(before.size());
    for (uint32_t il = 0; il < res.size(); ++il) {
        const bool     computed = step.layer < 0 || step.layer == (int32_t) il;
        const uint32_t n        = before[il] + step.total;

        auto & plan = res[il];
        if (kv->layers[il].slides) {
            plan = plan_sliding(il, what == kind::batch ? first_index(get_ubatch()) : 0, 1, step.offset, n_new);
            continue;
        }
        plan.past   = { base + step.offset };
        plan.shift  = base - before[il];
        plan.n_kv   = std::min(kv->stage_rows, std::max(ROW_PADDING, GGML_PAD(base + step.offset + n_new, ROW_PADDING)));
        plan.n_copy = computed && step.first ? before[il] : 0;
        plan.target = computed && step.last  ? std::min(n, budget(il)) : 0;
    }
    return res;
}

// The largest graph in place: of a decoding step on full layers, or of prompts that fit every layer's budget.
std::vector<ziggurat_kv_plan> ziggurat_kv_context::plans_largest(uint32_t n_seqs, uint32_t n_new) const {
    uint32_t budget   = kv->n_ctx;
    uint32_t capacity = kv->n_ctx;
    for (const auto & layer : kv->layers) {
        if (!layer.slides) {
            budget   = std::min(budget,   layer.budget);
            capacity = std::min(capacity, layer.capacity);
        }
    }
    const uint32_t common = std::min(capacity, GGML_PAD(std::max(budget, n_new), ROW_PADDING));

    std::vector<ziggurat_kv_plan> res(kv->layers.size());
    for (uint32_t il = 0; il < res.size(); ++il) {
        if (kv->layers[il].slides) {
            res[il] = plan_sliding(il, 0, n_seqs, 0, n_new);
            continue;
        }
        res[il].n_kv = n_new <= kv->step_tokens ? kv->layers[il].capacity : common;
        res[il].past.assign(n_seqs, res[il].n_kv - std::min(res[il].n_kv, n_new));
    }
    return res;
}

uint32_t ziggurat_kv_context::budget(uint32_t il) const {
    return what == kind::batch ? kv->seqs[first_index(get_ubatch())].budget[il] : kv->layers[il].budget;
}

// Selects in place, sequence by sequence: what a decode step needs that finds a layer full.
bool ziggurat_kv_context::select() {
    // both graphs are short, and what they make room for can be aborted
    const ziggurat_kv_uninterrupted guard(*lctx);
    bool done = true;
    for (const auto s : to_settle) {
        done = done && settle(s);
    }
    for (const auto s : to_select) {
        done = done && select(s);
    }
    if (!done) {
        kv->selected = ziggurat_kv_cache::selection::failed;
        return false;
    }
    kv->selected = ziggurat_kv_cache::selection::done;
    return true;
}

bool ziggurat_kv_context::select(llama_seq_id seq_id) {
    // Rows are moved when all layers have chosen theirs: whatever can fail comes before the first row changes place.
    if (!select(seq_id, false) || !select(seq_id, true)) {
        kv->refusal = format("selecting the rows of sequence %d failed", seq_id);
        return false;
    }
    auto & seq = kv->seqs[seq_id];
    for (uint32_t il = 0; il < kv->layers.size(); ++il) {
        if (seq.used[il] > seq.budget[il]) {
            kv->note_selection(seq_id, il, seq.used[il], seq.budget[il]);
        }
    }
    kv->note_settled(seq_id, seq.next);
    return true;
}

ziggurat_kv_selection ziggurat_kv_context::rows_of(llama_seq_id seq_id, uint32_t il) const {
    const auto & seq   = kv->seqs[seq_id];
    const auto & layer = kv->layers[il];

    ziggurat_kv_selection sel;
    sel.il       = il;
    sel.plane    = seq_id;
    sel.n        = seq.used[il];
    sel.fixed    = seq.fixed[il];
    sel.target   = std::min(seq.used[il], seq.budget[il]);
    sel.last     = seq.next - 1;
    sel.queries_from = seq.queries_from;
    sel.k        = layer.k;
    sel.v        = layer.v;
    sel.k_offset = seq_id*layer.k->nb[2];
    sel.v_offset = seq_id*layer.v->nb[2];
    return sel;
}

bool ziggurat_kv_context::select(llama_seq_id seq_id, bool move) {
    auto * res = lctx->get_gf_res_reserve();

    ggml_backend_sched_reset(lctx->get_sched());
    res->reset();

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    for (uint32_t il = 0; il < kv->layers.size(); ++il) {
        const auto & layer = kv->layers[il];
        if (layer.slides) {
            continue;
        }
        auto sel = rows_of(seq_id, il);
        if (kv->sums_up()) { // those of all layers, since queries are kept of all or of none
            ggml_tensor * next = ziggurat_kv_sums_view(ctx, layer.sums_next, 0, sel.n);
            if (!move) {
                next = ggml_cpy(ctx, ziggurat_kv_build_sums(ctx, gf, res, *kv, sel, sel.last + 1), next);
                ggml_build_forward_expand(gf, next);
            } else if (sel.target == sel.n) {
                ggml_build_forward_expand(gf, ggml_cpy(ctx, next, ziggurat_kv_sums_view(ctx, layer.sums, seq_id, sel.n)));
            }
            sel.sums = next;
        }
        if (sel.target == sel.n) {
            continue;
        }
        ggml_tensor * chosen = ggml_view_2d(ctx, layer.chosen, sel.target, layer.n_head_kv, layer.chosen->nb[1], 0);
        if (move) {
            ziggurat_kv_build_move(ctx, gf, *kv, sel, chosen);
        } else {
            ggml_build_forward_expand(gf, ggml_cpy(ctx, ziggurat_kv_build_choice(ctx, gf, res, *kv, sel), chosen));
        }
    }
    return compute(res);
}

// Adds the attention of the queries that are kept, but for those that may still be removed.
bool ziggurat_kv_context::settle(llama_seq_id seq_id) {
    auto * res = lctx->get_gf_res_reserve();

    ggml_backend_sched_reset(lctx->get_sched());
    res->reset();

    const llama_pos until = kv->seqs[seq_id].next - (llama_pos) ZIGGURAT_KV_RING_SPARE;
    for (uint32_t il = 0; il < kv->layers.size(); ++il) {
        if (kv->layers[il].slides) {
            continue;
        }
        const auto sel = rows_of(seq_id, il);
        auto * ctx = res->get_ctx();
        auto * now = ziggurat_kv_build_sums(ctx, res->get_gf(), res, *kv, sel, until);
        ggml_build_forward_expand(res->get_gf(), ggml_cpy(ctx, now, ziggurat_kv_sums_view(ctx, kv->layers[il].sums, seq_id, sel.n)));
    }
    if (!compute(res)) {
        kv->refusal = format("summing up the attention of sequence %d failed", seq_id);
        return false;
    }
    kv->note_settled(seq_id, until);
    return true;
}

bool ziggurat_kv_context::compute(llm_graph_result * res) {
    auto * sched = lctx->get_sched();
    auto * gf    = res->get_gf();
    if (ggml_graph_n_nodes(gf) == 0) {
        return true;
    }
    kv->topology.tell_apart(res->get_ctx(), gf, kv->layers[0].k);
    if (ziggurat_kv_fails(kv) || !ggml_backend_sched_alloc_graph(sched, gf)) {
        return false;
    }
    res->set_inputs(nullptr);
    return lctx->graph_compute(gf, true) == GGML_STATUS_SUCCESS;
}
