#include "ziggurat-kv-arena.h"

#include "llama-impl.h"

#include "ggml-alloc.h"

#include <stdexcept>

ggml_context * ziggurat_kv_arena::context(ggml_backend_buffer_type_t buft, size_t n_tensors) {
    auto & ctx = open[buft];
    if (!ctx) {
        ctx.reset(ggml_init({ n_tensors*ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true }));
        if (!ctx) {
            throw std::runtime_error("failed to create a ggml context for the KV rows");
        }
    }
    return ctx.get();
}

void ziggurat_kv_arena::allocate(bool no_alloc) {
    for (auto & [buft, ctx] : open) {
        ggml_backend_buffer_t buf = no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0)
                                             : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        if (!buf) {
            throw std::runtime_error(format("failed to allocate %.0f MiB of KV rows",
                        ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)/1048576.0));
        }
        if (no_alloc) {
            // with a buffer of their own the scheduler does not allocate them
            for (auto * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        }
        ggml_backend_buffer_clear(buf, 0); // no NaN in rows that are only masked
        closed.emplace_back(std::move(ctx), buf);
    }
    open.clear();
}

void ziggurat_kv_arena::clear() {
    for (auto & it : closed) {
        ggml_backend_buffer_clear(it.second.get(), 0);
    }
}

void ziggurat_kv_arena::add_sizes(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : closed) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        const size_t size = ggml_backend_buffer_get_size(buf.get());
        sizes[buft] += size > 0 ? size : ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
    }
}
