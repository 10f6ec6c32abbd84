#include "ziggurat-kv-cache.h"

#include "ziggurat-kv-context.h"
#include "ziggurat-kv-cut.h"
#include "ziggurat-kv-slide.h"
#include "ziggurat-kv-sums.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

static constexpr uint32_t ROW_PADDING = ZIGGURAT_KV_ROW_PADDING;

//
// what is allocated
//

static void check_params(const ziggurat_kv_params & params, const llama_hparams & hparams, const llama_cparams & cparams) {
    const auto fail = [](const std::string & what) { throw std::runtime_error("KV budget: " + what); };

    if (params.rows == nullptr || params.n_layer != hparams.n_layer()) {
        fail(format("rows of %u layers for a model of %u", params.n_layer, hparams.n_layer()));
    }
    if (params.window < 1 || params.window > cparams.n_ctx_seq) {
        fail(format("a window of %u tokens; it has 1 to the context's %u", params.window, cparams.n_ctx_seq));
    }
    if (params.n_reading < 1) {
        fail("no prompt may be read at all: n_reading has to be 1 or more");
    }
    if (params.pool % 2 != 1 || params.pool > 255) {
        fail(format("a pooling width of %u; it is odd and at most 255", params.pool));
    }
    if (params.slack < 1 || params.slack > (1u << 20)) {
        fail(format("a slack of %u rows; it has 1 to %u", params.slack, 1u << 20));
    }
    if (params.pool_type < ZIGGURAT_KV_POOL_AVG || params.pool_type > ZIGGURAT_KV_POOL_MAX ||
        params.score < ZIGGURAT_KV_SCORE_SNAPKV || params.score > ZIGGURAT_KV_SCORE_H2O ||
        params.prefill < ZIGGURAT_KV_PREFILL_EXACT || params.prefill > ZIGGURAT_KV_PREFILL_LANE) {
        fail("an unknown pooling, score or prefill");
    }
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        if (!hparams.is_swa(il) && params.rows[il] < (uint64_t) params.window + params.sinks) {
            fail(format("%u rows in layer %u are less than window and sinks (%u + %u)",
                        params.rows[il], il, params.window, params.sinks));
        }
    }
    if (cparams.kv_unified) {
        fail("sequences have rows of their own: kv_unified has to be off");
    }
}

ziggurat_kv_cache::ziggurat_kv_cache(
        const llama_model         & model,
        const llama_memory_params & memory_params,
        const llama_cparams       & cparams,
        const ziggurat_kv_params  & asked) :
    model(model), hparams(model.hparams), params(asked),
    n_seq(cparams.n_seq_max), n_reading(std::min(asked.n_reading, n_seq)), n_copies(std::min(asked.n_copies, n_reading)),
    n_ctx(GGML_PAD(cparams.n_ctx_seq, ROW_PADDING)), n_ubatch(cparams.n_ubatch),
    n_ring(observed(asked) + ZIGGURAT_KV_RING_SPARE),
    cparams(cparams), type_k(memory_params.type_k), type_v(memory_params.type_v), offload(cparams.offload_kqv) {
    check_params(params, hparams, cparams);

    rows.assign(params.rows, params.rows + params.n_layer);
    params.rows = rows.data();

    make_rows();
    readings.resize(n_reading);
    seqs.resize(n_seq + n_reading);
    for (uint32_t s = 0; s < n_seq; ++s) {
        clear_seq(s);
    }

    if (ggml_is_quantized(type_k) || ggml_is_quantized(type_v)) {
        rotation = make_rotation(false);
        if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
            rotation_swa = make_rotation(true);
        }
    }

    if (evicts) {
        layer_major = params.prefill != ZIGGURAT_KV_PREFILL_LANE && can_cut();
        if (!layer_major && params.prefill == ZIGGURAT_KV_PREFILL_BOUNDED) {
            throw std::runtime_error("KV budget: this model's graph cannot be cut into layers, so that reading a prompt "
                                     "exactly takes the full cache of one prompt; use the exact or the chunked prefill");
        }
        make_stage(layer_major);
    }

    const auto size = layout();
    LLAMA_LOG_INFO("%s: rows %.2f MiB, positions %.2f MiB, queries and sums %.2f MiB, copies %.2f MiB, stage %.2f MiB (%u rows, %s), hidden %.2f MiB\n",
            __func__, size.rows_bytes/1048576.0, size.position_bytes/1048576.0, (size.query_bytes + size.sum_bytes)/1048576.0,
            size.copy_bytes/1048576.0, size.stage_bytes/1048576.0, stage_rows, layer_major ? "layer by layer" : "lane", size.hidden_bytes/1048576.0);
}

std::unique_ptr<llama_kv_cache> ziggurat_kv_cache::make_rotation(bool slides) const {
    return std::make_unique<llama_kv_cache>(
            model, hparams, type_k, type_v, /*v_trans =*/ false, offload, /*unified =*/ true,
            /*kv_size =*/ 1, /*n_seq_max =*/ 1, /*n_pad =*/ 1, 0, LLAMA_SWA_TYPE_NONE, nullptr,
            [&](int32_t il) { return il < (int32_t) hparams.n_layer() && hparams.is_swa(il) == slides; },
            nullptr, nullptr, slides ? "rotation_swa_" : "rotation_");
}

void ziggurat_kv_cache::make_rows() {
    const uint32_t n_layer = hparams.n_layer();

    layers.resize(n_layer);
    for (uint32_t il = 0; il < n_layer; ++il) {
        layers[il].slides = hparams.is_swa(il);
        // rows beyond the context would never be used
        evicts |= !layers[il].slides && rows[il] < n_ctx;
    }
    for (auto & layer : layers) {
        if (layer.slides) {
            layer.budget = layer.capacity = ziggurat_kv_ring_rows(hparams, n_ctx, n_ubatch, evicts);
        }
    }
    overwrites = evicts || ziggurat_kv_rings_wrap(*this);

    // where nothing is lost a prompt is written beside what is there
    const uint32_t n_planes = n_seq + (overwrites ? n_copies : 0);

    for (uint32_t il = 0; il < n_layer; ++il) {
        auto & layer = layers[il];
        layer.n_head    = hparams.n_head(il);
        layer.n_head_kv = hparams.n_head_kv(il);
        if (!layer.slides) {
            layer.budget   = std::min(rows[il], n_ctx);
            layer.capacity = evicts ? GGML_PAD(layer.budget + params.slack, ROW_PADDING) : n_ctx;
        }
        layer.buft      = offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        ggml_context * ctx = rows_arena.context(layer.buft, 7*n_layer);

        layer.k = ggml_new_tensor_3d(ctx, type_k, hparams.n_embd_k_gqa(il), layer.capacity, n_planes);
        layer.v = ggml_new_tensor_3d(ctx, type_v, hparams.n_embd_v_gqa(il), layer.capacity, n_planes);
        ggml_format_name(layer.k, "cache_k_l%u", il);
        ggml_format_name(layer.v, "cache_v_l%u", il);

        if (!evicts || layer.slides) {
            continue;
        }
        layer.positions = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.budget, layer.n_head_kv, n_planes);
        layer.chosen    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.budget, layer.n_head_kv);
        ggml_format_name(layer.positions, "cache_positions_l%u", il);
        ggml_format_name(layer.chosen,    "cache_chosen_l%u", il);
        if (uses_queries()) {
            // half precision is what the products with half precision keys round queries to
            const auto type = type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
            layer.queries = ggml_new_tensor_3d(ctx, type, hparams.n_embd_head_k(il)*layer.n_head, n_ring, n_planes);
            ggml_format_name(layer.queries, "cache_queries_l%u", il);
        }
        if (sums_up()) {
            layer.sums      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.capacity, layer.n_head_kv, n_planes);
            layer.sums_next = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.capacity, layer.n_head_kv);
            ggml_format_name(layer.sums,      "cache_sums_l%u", il);
            ggml_format_name(layer.sums_next, "cache_sums_next_l%u", il);
        }
    }
    rows_arena.allocate(hparams.no_alloc);
}

bool ziggurat_kv_cache::can_cut() const {
    const uint32_t n_tokens = 2;

    llm_graph_result    res(16*model.n_tensors() + 4096);
    llama_adapter_cvec  cvec;
    llama_adapter_loras loras;
    llama_cross         cross;
    llama_batch_allocr  balloc(hparams.n_pos_per_embd());

    auto probe = cparams;
    probe.offload_kqv  = true; // there is no scheduler to place tensors with
    probe.pooling_type = LLAMA_POOLING_TYPE_NONE;

    ziggurat_kv_context mctx(const_cast<ziggurat_kv_cache *>(this), nullptr);

    res.reset();
    model.build_graph({
        /*.arch        =*/ model.arch,
        /*.hparams     =*/ hparams,
        /*.cparams     =*/ probe,
        /*.ubatch      =*/ balloc.ubatch_reserve(n_tokens, 1),
        /*.gtype       =*/ LLM_GRAPH_TYPE_DEFAULT,
        /*.sched       =*/ nullptr,
        /*.backend_cpu =*/ nullptr,
        /*.cvec        =*/ &cvec,
        /*.loras       =*/ &loras,
        /*.mctx        =*/ &mctx,
        /*.cross       =*/ &cross,
        /*.prec_policy =*/ &model.prec_policy,
        /*.samplers    =*/ {},
        /*.n_outputs   =*/ 1,
        /*.cb          =*/ [](const llama_ubatch &, ggml_tensor * cur, const char * name, int il) {
            il < 0 ? ggml_set_name(cur, name) : ggml_format_name(cur, "%s-%d", name, il);
        },
        /*.res         =*/ &res,
    });
    return ziggurat_kv_can_cut(res, *this, n_tokens);
}

void ziggurat_kv_cache::make_stage(bool shared) {
    uint32_t max_capacity = 0;
    for (const auto & layer : layers) {
        max_capacity = std::max(max_capacity, layer.slides ? 0 : layer.capacity);
    }
    const bool chunked = params.prefill == ZIGGURAT_KV_PREFILL_CHUNKED;

    stage_rows = chunked ? GGML_PAD(max_capacity + n_ubatch, ROW_PADDING) : n_ctx;

    // Per buffer type, for K and for V: the bytes of one prompt in the widest layer, or in all. K and V lie apart, and
    // each prompt's rows apart from the others', whichever layer they are of: what is masked may be of another layer
    // but not of another type, and the prompts are in different layers at a time.
    struct pool { size_t size[2] = {}; size_t used[2] = {}; ggml_tensor * bytes = nullptr; };
    std::map<ggml_backend_buffer_type_t, pool> pools;

    for (const auto & layer : layers) {
        if (layer.slides) {
            continue; // read where its rows stay
        }
        auto & p = pools[layer.buft];
        for (const bool value : { false, true }) {
            const size_t size = (value ? layer.v : layer.k)->nb[1]*stage_rows;
            p.size[value] = shared ? std::max(p.size[value], size) : p.size[value] + size;
        }
    }
    for (auto & [buft, p] : pools) {
        p.bytes = ggml_new_tensor_1d(stage_arena.context(buft, 4*layers.size() + 2), GGML_TYPE_I8, (p.size[0] + p.size[1])*n_reading);
        ggml_set_name(p.bytes, "kv_stage");
    }
    for (auto & layer : layers) {
        if (layer.slides) {
            continue;
        }
        auto & p = pools[layer.buft];
        for (const bool value : { false, true }) {
            const ggml_tensor * like = value ? layer.v : layer.k;
            ggml_tensor * t = ggml_view_tensor(stage_arena.context(layer.buft, 0), p.bytes);
            t->type  = like->type;
            t->ne[0] = like->ne[0];
            t->ne[1] = stage_rows;
            t->ne[2] = n_reading;
            t->nb[0] = like->nb[0];
            t->nb[1] = like->nb[1];
            t->nb[2] = p.size[value];
            t->nb[3] = t->nb[2]*n_reading;
            t->view_offs = (value ? p.size[0]*n_reading : 0) + p.used[value];
            if (!shared) {
                p.used[value] += t->nb[1]*stage_rows;
            }
            (value ? layer.stage_v : layer.stage_k) = t;
        }
    }
    if (shared) {
        const uint32_t n_tokens = chunked ? n_ubatch : n_ctx;
        hidden = ggml_new_tensor_3d(stage_arena.context(layers[0].buft, 0), GGML_TYPE_F32, hparams.n_embd, n_tokens, n_reading);
        ggml_set_name(hidden, "kv_hidden");
    }
    if (sums_up()) {
        make_stage_sums(shared);
    }
    stage_arena.allocate(hparams.no_alloc);
}

uint32_t ziggurat_kv_cache::n_extra_nodes() const {
    uint32_t n = 0;
    for (const auto & layer : layers) {
        n += 64 + 12*layer.n_head_kv;
    }
    return n + (sums_up() ? (layer_major ? 1 : layers.size())*ziggurat_kv_paid_nodes(n_ubatch) : 0);
}

ziggurat_kv_layout ziggurat_kv_cache::layout() const {
    ziggurat_kv_layout res = {};
    std::map<const ggml_tensor *, size_t> stages;
    for (const auto & layer : layers) {
        const auto add = [&](const ggml_tensor * t, uint64_t & bytes) {
            if (t != nullptr) {
                bytes          += t->nb[2]*n_seq;
                res.copy_bytes += t->nb[2]*(t->ne[2] - n_seq);
            }
        };
        add(layer.k, res.rows_bytes);
        add(layer.v, res.rows_bytes);
        add(layer.positions, res.position_bytes);
        add(layer.queries,   res.query_bytes);
        add(layer.sums,      res.sum_bytes);
        res.position_bytes += layer.chosen    ? ggml_nbytes(layer.chosen)    : 0;
        res.sum_bytes      += layer.sums_next ? ggml_nbytes(layer.sums_next) : 0;
        for (const ggml_tensor * t : { layer.stage_k, layer.stage_sums }) {
            if (t != nullptr) {
                stages[t->view_src] = ggml_nbytes(t->view_src);
            }
        }
    }
    for (const auto & it : stages) {
        res.stage_bytes += it.second;
    }
    res.hidden_bytes = hidden ? ggml_nbytes(hidden) : 0;
    res.stage_rows   = stage_rows;
    res.layer_major  = layer_major;
    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> ziggurat_kv_cache::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> sizes;
    for (const auto * cache : { rotation.get(), rotation_swa.get() }) {
        if (cache != nullptr) {
            for (const auto & [buft, size] : cache->memory_breakdown()) {
                sizes[buft] += size;
            }
        }
    }
    rows_arena .add_sizes(sizes);
    stage_arena.add_sizes(sizes);
    return sizes;
}

//
// sequences
//

uint32_t ziggurat_kv_cache::observed(const ziggurat_kv_params & params) {
    switch (params.score) {
        case ZIGGURAT_KV_SCORE_SNAPKV: return params.window;
        case ZIGGURAT_KV_SCORE_TOVA:   return 1;
        case ZIGGURAT_KV_SCORE_H2O:    return ZIGGURAT_KV_SETTLED;
        default:                       return 0;
    }
}

uint32_t ziggurat_kv_cache::padded_rows(const ziggurat_kv_layer & layer, uint32_t n) const {
    return std::min(layer.capacity, std::max<uint32_t>(ROW_PADDING, GGML_PAD(n, ROW_PADDING)));
}

std::pair<uint32_t, uint32_t> ziggurat_kv_cache::budget_range(uint32_t il) const {
    const uint32_t most = layers[il].budget;
    // a context that never evicts has nothing to select with
    return { evicts && !layers[il].slides ? std::min(most, params.window + params.sinks) : most, most };
}

void ziggurat_kv_cache::clear_seq(llama_seq_id seq_id) {
    const int32_t reading = reading_of(seq_id);
    if (reading >= 0) {
        drop_reading(reading);
    }
    auto & seq = seqs[seq_id];
    auto budget = std::move(seq.budget); // outlives what it bounds
    seq = {};
    seq.used .assign(layers.size(), 0);
    seq.fixed.assign(layers.size(), 0);
    seq.budget = std::move(budget);
    if (seq.budget.empty()) {
        for (const auto & layer : layers) {
            seq.budget.push_back(layer.budget);
        }
    }
}

void ziggurat_kv_cache::clear(bool data) {
    for (uint32_t s = 0; s < n_seq; ++s) {
        clear_seq(s);
    }
    if (data) {
        rows_arena.clear();
    }
    refusal.clear();
}

void ziggurat_kv_cache::append(uint32_t index, uint32_t n) {
    for (uint32_t il = 0; il < layers.size(); ++il) {
        auto & used = seqs[index].used[il];
        used = layers[il].slides ? std::min(used + n, layers[il].capacity) : used + n;
    }
    advance(index, n);
}

void ziggurat_kv_cache::advance(uint32_t index, uint32_t n) {
    auto & seq = seqs[index];
    seq.next += n;
    seq.queries_from = std::max(seq.queries_from, seq.next - (llama_pos) n_ring);
}

void ziggurat_kv_cache::note_read(uint32_t index, uint32_t n) {
    auto & seq = seqs[index];
    if (n > observed(params)) {
        seq.queries_from = std::max(seq.queries_from, seq.next - (llama_pos) observed(params));
    }
}

void ziggurat_kv_cache::note_settled(uint32_t index, llama_pos until) {
    auto & from = seqs[index].queries_from;
    from = sums_up() ? std::max(from, until) : from;
}

void ziggurat_kv_cache::note_selection(uint32_t index, uint32_t il, uint32_t n_rows, uint32_t target) {
    auto & seq = seqs[index];
    seq.used[il] = target;
    if (target < n_rows) {
        seq.fixed[il] = target;
    }
}

void ziggurat_kv_cache::take_back(const ziggurat_kv_sequence & before, ziggurat_kv_sequence & now) const {
    const uint32_t n = now.next - before.next;
    std::vector<uint32_t> used = before.used;
    for (uint32_t il = 0; il < layers.size(); ++il) {
        if (layers[il].slides) {
            used[il] = now.used[il] - std::min(now.used[il], n);
        }
    }
    now = before;
    now.used = std::move(used);
}

// Rows that came after the last selection of every layer, with a window before them in layers that slide.
uint32_t ziggurat_kv_cache::tail(const ziggurat_kv_sequence & seq) const {
    uint32_t n = seq.next;
    for (uint32_t il = 0; il < layers.size(); ++il) {
        n = std::min(n, layers[il].slides ? ziggurat_kv_ring_tail(*this, seq, il) : seq.used[il] - seq.fixed[il]);
    }
    return n;
}

llama_pos ziggurat_kv_cache::removable_from(llama_seq_id seq_id) const {
    const auto & seq = seqs[seq_id];
    return reading_of(seq_id) >= 0 ? seq.next : seq.next - (llama_pos) tail(seq);
}

std::string ziggurat_kv_cache::cut(ziggurat_kv_sequence & seq, llama_seq_id seq_id, llama_pos p0) const {
    const uint32_t n = seq.next - p0;
    if (n > tail(seq)) {
        return format("position %d of sequence %d lies before its last selection, or too far back for the sliding windows:"
                      " rows of that time are gone", p0, seq_id);
    }
    for (auto & used : seq.used) {
        used -= n;
    }
    seq.queries_from = std::min(seq.queries_from, p0);
    seq.next = p0;
    return "";
}

bool ziggurat_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    refusal.clear();
    if (seq_id < 0) {
        bool all = true;
        for (uint32_t s = 0; s < n_seq; ++s) {
            all &= seq_rm(s, p0, p1);
        }
        return all;
    }
    if (!exists(seq_id)) {
        refusal = format("sequence %d is not one of %u", seq_id, n_seq);
        return false;
    }
    auto & seq = seqs[seq_id];

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 == 0 && p1 >= seq.next) {
        clear_seq(seq_id);
        return true;
    }
    if (p0 >= seq.next || p0 >= p1) {
        return true;
    }
    if (reading_of(seq_id) >= 0) {
        refusal = format("a prompt is being read for sequence %d", seq_id);
        return false;
    }
    if (p1 < seq.next) {
        refusal = format("positions %d to %d lie in the middle of sequence %d; only its end can be removed", p0, p1 - 1, seq_id);
        return false;
    }
    refusal = cut(seq, seq_id, p0);
    return refusal.empty();
}

void ziggurat_kv_cache::seq_keep(llama_seq_id seq_id) {
    refusal.clear();
    for (uint32_t s = 0; s < n_seq; ++s) {
        if ((llama_seq_id) s != seq_id) {
            clear_seq(s);
        }
    }
}

void ziggurat_kv_cache::seq_add(llama_seq_id seq_id, llama_pos, llama_pos, llama_pos shift) {
    if (shift != 0) {
        refusal = format("positions of sequence %d cannot be shifted: with a budget they stay the true ones", seq_id);
        LLAMA_LOG_ERROR("%s: %s\n", __func__, refusal.c_str());
    }
}

void ziggurat_kv_cache::seq_div(llama_seq_id seq_id, llama_pos, llama_pos, int d) {
    if (d != 1) {
        refusal = format("positions of sequence %d cannot be divided: with a budget they stay the true ones", seq_id);
        LLAMA_LOG_ERROR("%s: %s\n", __func__, refusal.c_str());
    }
}

llama_pos ziggurat_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    if (!exists(seq_id) || seqs[seq_id].next == 0) {
        return -1;
    }
    // the first position from which on all layers hold every row
    const auto & seq = seqs[seq_id];
    uint32_t n = seq.next;
    for (uint32_t il = 0; il < layers.size(); ++il) {
        n = std::min(n, seq.fixed[il] == 0 ? seq.used[il] : seq.used[il] - seq.fixed[il] + params.window);
    }
    return seq.next - n;
}

llama_pos ziggurat_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    if (!exists(seq_id)) {
        return -1;
    }
    const llama_pos last = seqs[seq_id].next - 1;
    // llama_context asks where the batch has to go on that is a step of this sequence's prompt
    return resumed >= 0 && readings[resumed].seq_id == seq_id ? last + (llama_pos) step_begin(resumed) : last;
}

//
// memory contexts
//

llama_memory_context_ptr ziggurat_kv_cache::init_full() {
    return std::make_unique<ziggurat_kv_context>(this, nullptr);
}

std::vector<llama_memory_context_ptr> ziggurat_kv_cache::init_staged() {
    std::vector<llama_memory_context_ptr> res;
    if (!evicts) {
        return res;
    }
    const uint32_t tokens = std::min(n_ubatch, n_ctx);
    const uint32_t total  = params.prefill == ZIGGURAT_KV_PREFILL_CHUNKED ? tokens : stage_rows;

    ziggurat_kv_step step;
    step.staged = true;
    step.offset = total - tokens;
    step.total  = total;
    step.first  = total == tokens;
    if (!layer_major) {
        res.push_back(std::make_unique<ziggurat_kv_context>(this, &step));
        return res;
    }
    std::set<uint32_t> which = { 0, (uint32_t) layers.size()/2, (uint32_t) layers.size() - 1 };
    for (const bool slides : { false, true }) {
        const auto first = std::find_if(layers.begin(), layers.end(), [&](const auto & layer) { return layer.slides == slides; });
        if (first != layers.end()) {
            which.insert(first - layers.begin());
        }
    }
    for (const uint32_t il : which) {
        step.layer = il;
        res.push_back(std::make_unique<ziggurat_kv_context>(this, &step));
    }
    return res;
}

llama_memory_context_ptr ziggurat_kv_cache::init_update(llama_context * ctx, bool optimize) {
    lctx = ctx;
    if (!optimize || (to_select.empty() && to_settle.empty())) {
        return std::make_unique<ziggurat_kv_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
    }
    return std::make_unique<ziggurat_kv_context>(this, lctx, std::move(to_select), std::move(to_settle));
}

//
// creation
//

llama_memory_i * ziggurat_kv_create(
        const llama_model & model, const llama_memory_params & memory_params, const llama_cparams & cparams) {
    if (memory_params.kv_budget == nullptr) {
        return nullptr;
    }
    const char * reason = ziggurat_kv_unsupported(&model);
    if (reason == nullptr && memory_params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        reason = "this kind of context keeps no rows of the whole model";
    }
    if (reason != nullptr) {
        LLAMA_LOG_WARN("%s: no KV budget, the full cache instead: %s\n", __func__, reason);
        return nullptr;
    }
    return new ziggurat_kv_cache(model, memory_params, cparams, *memory_params.kv_budget);
}
