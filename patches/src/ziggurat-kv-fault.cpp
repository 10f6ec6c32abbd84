#include "ziggurat-kv-fault.h"

#include "ziggurat-kv-cache.h"

#include "llama-context.h"

bool ziggurat_kv_fails(llama_memory_i * memory) {
    auto * kv = dynamic_cast<ziggurat_kv_cache *>(memory);
    return kv != nullptr && kv->fail_in >= 0 && kv->fail_in-- == 0;
}

ziggurat_kv_uninterrupted::ziggurat_kv_uninterrupted(llama_context & ctx) :
    ctx(ctx), callback(ctx.abort_callback), data(ctx.abort_callback_data) {
    ctx.set_abort_callback(nullptr, nullptr);
}

ziggurat_kv_uninterrupted::~ziggurat_kv_uninterrupted() {
    ctx.set_abort_callback(callback, data);
}
