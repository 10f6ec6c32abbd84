#include "ziggurat-kv.h"

#include "ziggurat-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <numeric>

namespace {

ziggurat_kv_cache * cache_of(const llama_context * ctx) {
    return ctx == nullptr ? nullptr : dynamic_cast<ziggurat_kv_cache *>(ctx->get_memory());
}

int32_t write_rows(const std::vector<uint32_t> & found, uint32_t * rows, size_t n) {
    if (rows != nullptr) {
        std::copy_n(found.begin(), std::min(n, found.size()), rows);
    }
    return (int32_t) found.size();
}

// memory of another kind than one row per token, layer and KV head
bool is_other_memory(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return true;
        default:
            return false;
    }
}

} // namespace

const char * ziggurat_kv_unsupported(const struct llama_model * model) {
    if (model == nullptr) {
        return "there is no model";
    }
    const auto & hparams = model->hparams;
    if (llm_arch_is_recurrent(model->arch))             { return "it keeps a recurrent state, not rows per token"; }
    if (llm_arch_is_hybrid(model->arch))                { return "some of its layers keep a recurrent state"; }
    if (hparams.is_mla())                               { return "it compresses keys and values (MLA)"; }
    if (is_other_memory(model->arch))                   { return "its attention keeps more than keys and values"; }
    if (llama_model_has_encoder(model))                 { return "it has an encoder"; }
    if (!hparams.causal_attn)                           { return "its attention is not causal"; }
    if (hparams.use_alibi)                              { return "its attention depends on distances (ALiBi)"; }
    if (model->arch == LLM_ARCH_GROK)                   { return "it scales and caps attention scores in a way of its own"; }
    if (hparams.n_pos_per_embd() != 1)                  { return "its positions have several dimensions (M-RoPE)"; }
    bool all_slide = true;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0) {
            return "some of its layers have no keys and values of their own";
        }
        all_slide &= hparams.is_swa(il);
    }
    return all_slide ? "all of its layers have a sliding window, which bounds their rows already" : nullptr;
}

int32_t ziggurat_kv_windows(const struct llama_model * model, uint32_t * windows, size_t n) {
    if (model == nullptr) {
        return -1;
    }
    const auto & hparams = model->hparams;
    std::vector<uint32_t> found;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        found.push_back(hparams.is_swa(il) ? hparams.n_swa : 0);
    }
    return write_rows(found, windows, n);
}

bool ziggurat_kv_active(const struct llama_context * ctx) {
    return cache_of(ctx) != nullptr;
}

const char * ziggurat_kv_refusal(const struct llama_context * ctx) {
    const auto * kv = cache_of(ctx);
    return kv == nullptr ? "" : kv->refusal.c_str();
}

int32_t ziggurat_kv_get_layout(const struct llama_context * ctx, struct ziggurat_kv_layout * layout) {
    const auto * kv = cache_of(ctx);
    if (kv == nullptr || layout == nullptr) {
        return -1;
    }
    *layout = kv->layout();
    return 0;
}

int32_t ziggurat_kv_capacity(const struct llama_context * ctx, uint32_t * rows, size_t n) {
    const auto * kv = cache_of(ctx);
    if (kv == nullptr) {
        return -1;
    }
    std::vector<uint32_t> found;
    for (const auto & layer : kv->layers) {
        found.push_back(layer.capacity);
    }
    return write_rows(found, rows, n);
}

int32_t ziggurat_kv_rows(const struct llama_context * ctx, int32_t seq_id, uint32_t * rows, size_t n) {
    const auto * kv = cache_of(ctx);
    if (kv == nullptr || !kv->exists(seq_id)) {
        return -1;
    }
    return write_rows(kv->seqs[seq_id].used, rows, n);
}

int32_t ziggurat_kv_positions(struct llama_context * ctx, int32_t seq_id, int32_t il, int32_t * positions, size_t n) {
    const auto * kv = cache_of(ctx);
    if (kv == nullptr || !kv->exists(seq_id) || il < 0 || (size_t) il >= kv->layers.size()) {
        return -1;
    }
    const auto & layer = kv->layers[il];
    const auto & seq   = kv->seqs[seq_id];

    const uint32_t used  = seq.used[il];
    const uint32_t fixed = seq.fixed[il];

    std::vector<int32_t> found(used*layer.n_head_kv);
    std::vector<float>   kept(fixed);
    ctx->synchronize();
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        if (fixed > 0) {
            const auto * t = layer.positions;
            ggml_backend_tensor_get(t, kept.data(), seq_id*t->nb[2] + h*t->nb[1], fixed*sizeof(float));
        }
        auto * head = found.data() + h*used;
        std::copy(kept.begin(), kept.end(), head);
        std::iota(head + fixed, head + used, seq.next - (llama_pos) (used - fixed));
    }
    if (positions != nullptr) {
        std::copy_n(found.begin(), std::min(n, found.size()), positions);
    }
    return (int32_t) found.size();
}

int32_t ziggurat_kv_set_budget(struct llama_context * ctx, int32_t seq_id, const uint32_t * rows, size_t n) {
    auto * kv = cache_of(ctx);
    if (kv == nullptr || !kv->exists(seq_id) || (rows != nullptr && n != kv->layers.size())) {
        return -1;
    }
    kv->refusal.clear();
    std::vector<uint32_t> budget;
    for (size_t il = 0; il < kv->layers.size(); ++il) {
        const auto [least, most] = kv->budget_range(il);
        const uint32_t value = rows == nullptr || kv->layers[il].slides ? most : std::min(rows[il], kv->n_ctx);
        if (value < least || value > most) {
            kv->refusal = format("%u rows in layer %zu; the context has been made for %u to %u", value, il, least, most);
            return -1;
        }
        budget.push_back(value);
    }
    kv->seqs[seq_id].budget = std::move(budget);
    return 0;
}

int32_t ziggurat_kv_select(struct llama_context * ctx, int32_t seq_id) {
    auto * kv = cache_of(ctx);
    if (kv == nullptr || !kv->exists(seq_id)) {
        return -1;
    }
    kv->refusal.clear();
    if (kv->reading_of(seq_id) >= 0) {
        kv->refusal = format("a prompt is being read for sequence %d", seq_id);
        return -1;
    }
    const auto & seq = kv->seqs[seq_id];

    int32_t n_layers = 0;
    for (size_t il = 0; il < seq.used.size(); ++il) {
        n_layers += seq.used[il] > seq.budget[il];
    }
    if (n_layers == 0) {
        return 0;
    }
    if (kv->is_blind(seq)) {
        kv->refusal = format("sequence %d has no queries to select by: all of its last %u tokens were removed",
                seq_id, kv->observed(kv->params));
        return -1;
    }
    try {
        ctx->synchronize();
        ctx->sched_reserve();
        kv->to_select = { seq_id };
        ctx->memory_update(true);
    } catch (const std::exception & e) {
        kv->refusal = e.what();
    }
    kv->selected = ziggurat_kv_cache::selection::none;
    return kv->refusal.empty() ? n_layers : -2;
}

int32_t ziggurat_kv_set_step(struct llama_context * ctx, uint32_t n) {
    auto * kv = cache_of(ctx);
    return kv == nullptr ? -1 : kv->set_step(*ctx, n);
}

int32_t ziggurat_kv_removable_from(const struct llama_context * ctx, int32_t seq_id) {
    const auto * kv = cache_of(ctx);
    return kv == nullptr || !kv->exists(seq_id) ? -1 : kv->removable_from(seq_id);
}

int32_t ziggurat_kv_prompt_begin(struct llama_context * ctx, int32_t seq_id, const int32_t * tokens, size_t n) {
    auto * kv = cache_of(ctx);
    return kv != nullptr && kv->begin_prompt(seq_id, tokens, n) ? 0 : -1;
}

int32_t ziggurat_kv_prompt_step(
        struct llama_context * ctx, int32_t seq_id, uint32_t max_steps, struct ziggurat_kv_progress * progress) {
    auto * kv = cache_of(ctx);
    return kv == nullptr ? -1 : kv->step_prompt(*ctx, seq_id, max_steps, progress);
}

int32_t ziggurat_kv_prompt_cancel(struct llama_context * ctx, int32_t seq_id) {
    auto * kv = cache_of(ctx);
    const int32_t reading = kv == nullptr || seq_id < 0 ? -1 : kv->reading_of(seq_id);
    if (reading < 0) {
        return -1;
    }
    kv->drop_reading(reading);
    return 0;
}

int32_t ziggurat_kv_test_fail_at(struct llama_context * ctx, int64_t n) {
    auto * kv = cache_of(ctx);
    if (kv == nullptr) {
        return -1;
    }
    kv->fail_in = n;
    return 0;
}
