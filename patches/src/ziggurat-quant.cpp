#include "ziggurat-quant.h"

#include "llama-arch.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"
#include "llama.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct model_deleter {
    void operator()(llama_model * model) const { llama_model_free(model); }
};

struct state_deleter {
    void operator()(quantize_state_impl * state) const { llama_quant_free(state); }
};

// The recipes ask for one model size only: a 70B gets more bits for attn_v. Loading a file works the size out of the
// layer count, per architecture (load_arch_hparams in src/models); llama_quant_model_from_metadata knows Llama's rule
// alone. The rules of the others:
bool is_70b(llm_arch arch, const ziggurat_quant_desc & desc) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_LLAMA_EMBED:
            return desc.n_layer == 80 && desc.n_expert != 8 && desc.n_head != desc.n_head_kv;
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_DECI:
        case LLM_ARCH_OLMO:
            return desc.n_layer == 80;
        case LLM_ARCH_JAIS2:
            return desc.n_layer == 68;
        default:
            return false;
    }
}

std::unique_ptr<llama_model, model_deleter> make_model(const ziggurat_quant_desc & desc) {
    if (desc.arch == nullptr) {
        throw std::runtime_error("no architecture given");
    }
    const llm_arch arch = llm_arch_from_string(desc.arch);
    if (arch == LLM_ARCH_UNKNOWN) {
        throw std::runtime_error(format("unknown model architecture: '%s'", desc.arch));
    }
    if (desc.n_layer == 0 || desc.n_layer > LLAMA_MAX_LAYERS) {
        throw std::runtime_error(format("n_layer is %u; it must be between 1 and %d", desc.n_layer, LLAMA_MAX_LAYERS));
    }

    llama_quant_model_desc native = {};
    native.architecture  = desc.arch;
    native.n_embd        = desc.n_embd;
    native.n_ff          = desc.n_ff;
    native.n_layer       = desc.n_layer;
    native.n_head        = desc.n_head;
    native.n_head_kv     = desc.n_head_kv;
    native.n_expert      = desc.n_expert;
    native.n_embd_head_k = desc.n_embd_head_k;
    native.n_embd_head_v = desc.n_embd_head_v;

    std::unique_ptr<llama_model, model_deleter> model(llama_quant_model_from_metadata(&native));
    model->type = is_70b(arch, desc) ? LLM_TYPE_70B : LLM_TYPE_UNKNOWN;
    return model;
}

// What reading a GGUF would check, so that the recipe is never asked about a tensor that no file can hold.
ggml_tensor make_tensor(const ziggurat_quant_tensor & source) {
    if (source.name == nullptr) {
        throw std::runtime_error("a tensor has no name");
    }
    if (std::strlen(source.name) >= GGML_MAX_NAME) {
        throw std::runtime_error(format("tensor name '%s' is longer than %d bytes", source.name, GGML_MAX_NAME - 1));
    }
    if (source.type < 0 || source.type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) source.type) == 0) {
        throw std::runtime_error(format("tensor '%s' has the unknown type %d", source.name, source.type));
    }

    ggml_tensor tensor = {};
    tensor.type = (ggml_type) source.type;
    std::memcpy(tensor.name, source.name, std::strlen(source.name) + 1);

    int64_t count = 1;
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        if (source.ne[i] < 1 || source.ne[i] > INT64_MAX / count) {
            throw std::runtime_error(format("tensor '%s' has an impossible shape", source.name));
        }
        count *= source.ne[i];
        tensor.ne[i] = source.ne[i];
    }
    if (tensor.ne[0] % ggml_blck_size(tensor.type) != 0) {
        throw std::runtime_error(format("tensor '%s' of type %s must have a multiple of %d columns", source.name,
                ggml_type_name(tensor.type), (int) ggml_blck_size(tensor.type)));
    }
    return tensor;
}

// Positions in the caller's list, in the order in which the quantizer walks the model.
std::vector<size_t> quantizer_order(const ziggurat_quant_tensor * tensors, size_t n_tensors) {
    const llama_model_loader::weight_name_comparer less = {};

    std::vector<size_t> order(n_tensors);
    std::iota(order.begin(), order.end(), size_t(0));
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return less(tensors[a].name, tensors[b].name); });

    for (size_t i = 1; i < n_tensors; ++i) {
        if (std::strcmp(tensors[order[i - 1]].name, tensors[order[i]].name) == 0) {
            throw std::runtime_error(format("tensor '%s' is given twice", tensors[order[i]].name));
        }
    }
    return order;
}

void quant_types(
        const ziggurat_quant_desc   & desc,
        llama_ftype                   ftype,
        bool                          has_imatrix,
        const ziggurat_quant_tensor * tensors,
        size_t                        n_tensors,
        int32_t                     * result_types,
        uint8_t                     * requires_imatrix) {
    if (llama_ftype_get_default_type(ftype) == GGML_TYPE_COUNT) {
        throw std::runtime_error(format("invalid output file type %d", (int) ftype));
    }

    std::vector<ggml_tensor> natives;
    natives.reserve(n_tensors);
    for (size_t i = 0; i < n_tensors; ++i) {
        natives.push_back(make_tensor(tensors[i]));
    }

    const std::vector<size_t> order = quantizer_order(tensors, n_tensors);
    std::vector<ggml_tensor *> sorted;
    sorted.reserve(n_tensors);
    for (const size_t i : order) {
        sorted.push_back(&natives[i]);
    }

    // an empty list: the recipes ask whether there is importance data, never what it says
    static const llama_model_imatrix_data no_entries = {};

    const auto model = make_model(desc);
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype   = ftype;
    params.imatrix = has_imatrix ? &no_entries : nullptr;

    // All tensors, not only the quantizable ones: the others count too when the quantizer numbers its attn_v.
    std::unique_ptr<quantize_state_impl, state_deleter> state(llama_quant_init(model.get(), &params));
    std::vector<ggml_type> types(n_tensors);
    llama_quant_compute_types(state.get(), ftype, sorted.data(), types.data(), n_tensors);

    for (size_t k = 0; k < n_tensors; ++k) {
        const ggml_tensor & tensor = *sorted[k];
        if (types[k] != tensor.type && ggml_is_quantized(tensor.type)) {
            throw std::runtime_error(format("tensor '%s' is quantized already: requantizing from type %s is disabled",
                    tensor.name, ggml_type_name(tensor.type)));
        }
        result_types[order[k]] = types[k];
        if (requires_imatrix != nullptr) {
            requires_imatrix[order[k]] = llama_quant_tensor_allows_quantization(state.get(), &tensor) &&
                llama_quant_tensor_requires_imatrix(tensor.name, types[k], ftype);
        }
    }
}

int32_t fail(char * error, size_t error_size, const char * message) {
    if (error != nullptr && error_size > 0) {
        std::strncpy(error, message, error_size - 1);
        error[error_size - 1] = '\0';
    }
    return 1;
}

} // namespace

extern "C" int32_t ziggurat_quant_types(
        const ziggurat_quant_desc   * desc,
        int32_t                       ftype,
        bool                          has_imatrix,
        const ziggurat_quant_tensor * tensors,
        size_t                        n_tensors,
        int32_t                     * result_types,
        uint8_t                     * requires_imatrix,
        char                        * error,
        size_t                        error_size) {
    if (desc == nullptr || (n_tensors > 0 && (tensors == nullptr || result_types == nullptr))) {
        return fail(error, error_size, "a required pointer is null");
    }
    try {
        quant_types(*desc, (llama_ftype) ftype, has_imatrix, tensors, n_tensors, result_types, requires_imatrix);
    } catch (const std::exception & e) {
        return fail(error, error_size, e.what());
    } catch (...) {
        return fail(error, error_size, "unknown error");
    }
    return 0;
}

extern "C" int32_t ziggurat_ftype_default_type(int32_t ftype) {
    const ggml_type type = llama_ftype_get_default_type((llama_ftype) ftype);
    return type == GGML_TYPE_COUNT ? -1 : (int32_t) type;
}
