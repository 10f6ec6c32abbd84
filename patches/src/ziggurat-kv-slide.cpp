#include "ziggurat-kv-slide.h"

#include "llama-hparams.h"

#include <algorithm>

uint32_t ziggurat_kv_ring_rows(const llama_hparams & hparams, uint32_t n_ctx, uint32_t n_ubatch, bool endless) {
    // a step with its drafts is removed again as a whole
    const uint32_t rows = hparams.n_swa + std::max(n_ubatch, ZIGGURAT_KV_RING_SPARE);
    return GGML_PAD(endless ? rows : std::min(n_ctx, rows), ZIGGURAT_KV_ROW_PADDING);
}

uint32_t ziggurat_kv_ring_tail(const ziggurat_kv_cache & kv, const ziggurat_kv_sequence & seq, uint32_t il) {
    const uint32_t used   = seq.used[il];
    const uint32_t window = kv.hparams.n_swa - std::min(kv.hparams.n_swa, 1u); // what a token sees before it
    return used == (uint32_t) seq.next ? used : used - std::min(used, window);
}

bool ziggurat_kv_rings_outlive(const ziggurat_kv_cache & kv, const ziggurat_kv_sequence & seq, uint32_t n) {
    ziggurat_kv_sequence after = seq;
    after.next += n;
    for (uint32_t il = 0; il < kv.layers.size(); ++il) {
        const auto & layer = kv.layers[il];
        after.used[il] = std::min(after.used[il] + n, layer.capacity);
        if (layer.slides && seq.next > 0 && ziggurat_kv_ring_tail(kv, after, il) < n) {
            return false;
        }
    }
    return true;
}

bool ziggurat_kv_rings_wrap(const ziggurat_kv_cache & kv) {
    return std::any_of(kv.layers.begin(), kv.layers.end(), [&](const ziggurat_kv_layer & layer) {
        return layer.slides && (kv.evicts || layer.capacity < kv.n_ctx);
    });
}

std::vector<llama_pos> ziggurat_kv_ring_positions(uint32_t capacity, uint32_t n_kv, llama_pos last) {
    std::vector<llama_pos> res(n_kv);
    const llama_pos at = last % (llama_pos) capacity; // of the last one
    for (llama_pos i = 0; i < (llama_pos) n_kv; ++i) {
        res[i] = last - at + i - (i > at ? (llama_pos) capacity : 0);
    }
    return res;
}
