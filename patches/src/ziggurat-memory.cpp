#include "ziggurat-memory.h"

#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace {

template <size_t N>
void copy_name(char (&target)[N], const char * source) {
    std::strncpy(target, source, N - 1);
    target[N - 1] = '\0';
}

// A GPU's pinned buffers name the GPU as their device, though they take the host's memory; the CPU's own buffer type
// names no device at all.
const char * device_name(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    return ggml_backend_buft_is_host(buft) || device == nullptr ? "CPU" : ggml_backend_dev_name(device);
}

std::vector<ziggurat_memory_row> breakdown(const llama_context * ctx) {
    std::vector<ziggurat_memory_row> rows;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
        ziggurat_memory_row row = {};
        copy_name(row.device, device_name(buft));
        copy_name(row.buffer, ggml_backend_buft_name(buft));
        row.model   = data.model;
        row.context = data.context;
        row.compute = data.compute;
        rows.push_back(row);
    }
    // the map is ordered by address, which differs from run to run
    std::sort(rows.begin(), rows.end(), [](const ziggurat_memory_row & a, const ziggurat_memory_row & b) {
        return std::make_pair(std::string(a.device), std::string(a.buffer)) <
               std::make_pair(std::string(b.device), std::string(b.buffer));
    });
    return rows;
}

int32_t fail(char * error, size_t error_size, const char * message) {
    if (error != nullptr && error_size > 0) {
        std::strncpy(error, message, error_size - 1);
        error[error_size - 1] = '\0';
    }
    return -1;
}

} // namespace

extern "C" int32_t ziggurat_memory_breakdown(
        const struct llama_context * ctx,
        struct ziggurat_memory_row * rows,
        size_t                       n_rows,
        char                       * error,
        size_t                       error_size) {
    if (ctx == nullptr || (n_rows > 0 && rows == nullptr)) {
        return fail(error, error_size, "a required pointer is null");
    }
    try {
        const auto found = breakdown(ctx);
        std::copy_n(found.begin(), std::min(n_rows, found.size()), rows);
        return (int32_t) found.size();
    } catch (const std::exception & e) {
        return fail(error, error_size, e.what());
    } catch (...) {
        return fail(error, error_size, "unknown error");
    }
}
