// Sequences that are copied, saved and restored. Each of them has rows of its own, so a copy takes as much memory as the
// original.

#include "ziggurat-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

constexpr uint32_t STATE_MAGIC   = 0x53564b5a; // "ZKVS"
constexpr uint32_t STATE_VERSION = 2;

struct piece {
    uint32_t      il;
    ggml_tensor * tensor;
    size_t        offset; // bytes
    size_t        size;
};

// What a sequence in this state has in use, at the place of `seq_id`.
std::vector<piece> pieces_of(const ziggurat_kv_cache & kv, llama_seq_id seq_id, const ziggurat_kv_sequence & seq) {
    std::vector<piece> res;
    for (uint32_t il = 0; il < kv.layers.size(); ++il) {
        const auto & layer = kv.layers[il];
        for (ggml_tensor * t : { layer.k, layer.v }) {
            const uint32_t start = layer.slides ? (seq.next - seq.used[il]) % layer.capacity : 0;
            const uint32_t n_end = std::min(seq.used[il], layer.capacity - start); // then a ring begins anew
            res.push_back({ il, t, seq_id*t->nb[2] + start*t->nb[1], n_end*t->nb[1] });
            res.push_back({ il, t, seq_id*t->nb[2], (seq.used[il] - n_end)*t->nb[1] });
        }
        if (seq.fixed[il] > 0) {
            ggml_tensor * t = layer.positions;
            for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
                res.push_back({ il, t, seq_id*t->nb[2] + h*t->nb[1], seq.fixed[il]*t->nb[0] });
            }
        }
        if (ggml_tensor * t = layer.sums) { // rows whose queries are kept come last, and have nothing yet
            for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
                res.push_back({ il, t, seq_id*t->nb[2] + h*t->nb[1], (seq.used[il] - (seq.next - seq.queries_from))*t->nb[0] });
            }
        }
        if (ggml_tensor * t = layer.queries) {
            const uint32_t n     = seq.next - seq.queries_from;
            const uint32_t start = seq.queries_from % kv.n_ring;
            const uint32_t n_end = std::min(n, kv.n_ring - start); // then the ring begins anew
            res.push_back({ il, t, seq_id*t->nb[2] + start*t->nb[1], n_end*t->nb[1] });
            res.push_back({ il, t, seq_id*t->nb[2], (n - n_end)*t->nb[1] });
        }
    }
    res.erase(std::remove_if(res.begin(), res.end(), [](const piece & p) { return p.size == 0; }), res.end());
    return res;
}

// What rows, their selection and its scores depend on: the same in the context that a state is read into.
std::vector<std::pair<std::string, uint32_t>> identity_of(const ziggurat_kv_cache & kv) {
    const auto & p = kv.params;
    const ggml_context_ptr ctx { ggml_init({ 2*ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true }) };
    std::vector<std::pair<std::string, uint32_t>> res = {
        { "number of layers", kv.layers.size() },
        { "window",           p.window },
        { "sinks",            p.sinks },
        { "pooling width",    p.pool },
        { "kind of pooling",  p.pool_type },
        { "slack",            p.slack },
        { "score",            p.score },
        { "seed",             p.seed },
        { "rotation of K",    kv.rotation && kv.rotation->build_input_k_rot(ctx.get()) },
        { "rotation of V",    kv.rotation && kv.rotation->build_input_v_rot(ctx.get()) },
    };
    for (uint32_t il = 0; il < kv.layers.size(); ++il) {
        const auto & layer = kv.layers[il];
        const auto add = [&](const char * name, uint32_t value) {
            res.emplace_back(format("%s of layer %u", name, il), value);
        };
        add("type of K",           layer.k->type);
        add("type of V",           layer.v->type);
        add("width of K",          layer.k->ne[0]);
        add("width of V",          layer.v->ne[0]);
        add("number of heads",     layer.n_head);
        add("number of KV heads",  layer.n_head_kv);
        add("budget",              layer.budget);
        add("number of rows",      layer.capacity);
        if (layer.slides) {
            add("sliding window",  kv.hparams.n_swa);
        }
    }
    return res;
}

void write_number(llama_io_write_i & io, uint32_t value) {
    io.write(&value, sizeof(value));
}

uint32_t read_number(llama_io_read_i & io) {
    uint32_t value;
    io.read(&value, sizeof(value));
    return value;
}

void check_identity(const ziggurat_kv_cache & kv, llama_io_read_i & io) {
    if (read_number(io) != STATE_MAGIC) {
        throw std::runtime_error("this is no state of a sequence with a KV budget");
    }
    if (const uint32_t version = read_number(io); version != STATE_VERSION) {
        throw std::runtime_error(format("the state has version %u, this library reads %u", version, STATE_VERSION));
    }
    for (const auto & [name, value] : identity_of(kv)) {
        if (const uint32_t found = read_number(io); found != value) {
            throw std::runtime_error(format("the state was saved with another %s: %u, this context has %u",
                        name.c_str(), found, value));
        }
    }
}

void write_sequence(llama_io_write_i & io, const ziggurat_kv_cache & kv, llama_seq_id seq_id) {
    const auto & seq = kv.seqs[seq_id];
    write_number(io, seq.next);
    write_number(io, seq.queries_from);
    for (uint32_t il = 0; il < kv.layers.size(); ++il) {
        write_number(io, seq.used[il]);
        write_number(io, seq.fixed[il]);
        write_number(io, seq.budget[il]);
    }
    for (const auto & p : pieces_of(kv, seq_id, seq)) {
        io.write_tensor(p.tensor, p.offset, p.size);
    }
}

[[noreturn]] void fail_impossible(const char * what, uint32_t il) {
    throw std::runtime_error(format("the state is damaged: impossible %s in layer %u", what, il));
}

// Numbers that no sequence of this cache has would make later graphs read beyond its rows.
ziggurat_kv_sequence read_numbers(llama_io_read_i & io, const ziggurat_kv_cache & kv) {
    ziggurat_kv_sequence seq;
    seq.next         = read_number(io);
    seq.queries_from = read_number(io);
    if (seq.next < 0 || seq.queries_from < 0 || seq.queries_from > seq.next ||
        seq.next - seq.queries_from > (llama_pos) kv.n_ring) {
        throw std::runtime_error("the state is damaged: impossible positions");
    }
    for (uint32_t il = 0; il < kv.layers.size(); ++il) {
        const uint32_t used   = read_number(io);
        const uint32_t fixed  = read_number(io);
        const uint32_t budget = read_number(io);

        const auto [least, most] = kv.budget_range(il);
        if (budget < least || budget > most) {
            fail_impossible("budget", il);
        }
        // a selection leaves no queries to be summed up
        if (kv.sums_up() && !kv.layers[il].slides && used < fixed + (uint32_t) (seq.next - seq.queries_from)) {
            fail_impossible("number of queries", il);
        }
        const bool whole    = fixed == 0 && used == (uint32_t) seq.next;
        const bool slid     = fixed == 0 && used < (uint32_t) seq.next && used + 1 >= kv.hparams.n_swa;
        const bool selected = kv.evicts && fixed >= least && fixed <= most && fixed <= used && used <= (uint32_t) seq.next;
        if (used > kv.layers[il].capacity || !(whole || (kv.layers[il].slides ? slid : selected))) {
            fail_impossible("number of rows", il);
        }
        seq.used  .push_back(used);
        seq.fixed .push_back(fixed);
        seq.budget.push_back(budget);
    }
    return seq;
}

// Positions of one head ascend, and end before those of the rows that came after the selection.
void check_ascending(const std::vector<uint8_t> & bytes, llama_pos end, uint32_t il) {
    double last = -1;
    for (size_t i = 0; i < bytes.size(); i += sizeof(float)) {
        float value;
        memcpy(&value, bytes.data() + i, sizeof(value));
        // written so that NaN fails as well
        if (!(value > last && value < end && value == std::floor(value))) {
            fail_impossible("position", il);
        }
        last = value;
    }
}

struct saved_sequence {
    llama_seq_id seq_id = 0;
    ziggurat_kv_sequence seq;

    std::vector<piece> pieces;
    std::vector<std::vector<uint8_t>> bytes; // of each piece
};

saved_sequence read_sequence(llama_io_read_i & io, const ziggurat_kv_cache & kv, llama_seq_id seq_id) {
    saved_sequence res;
    res.seq_id = seq_id;
    res.seq    = read_numbers(io, kv);
    res.pieces = pieces_of(kv, seq_id, res.seq);
    for (const auto & p : res.pieces) {
        auto & bytes = res.bytes.emplace_back(p.size);
        io.read(bytes.data(), bytes.size());
        if (p.tensor == kv.layers[p.il].positions) {
            check_ascending(bytes, res.seq.next - (llama_pos) (res.seq.used[p.il] - res.seq.fixed[p.il]), p.il);
        }
    }
    return res;
}

// The sequences that a state is of; -1 stands for all.
std::vector<llama_seq_id> sequences_of(const ziggurat_kv_cache & kv, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        throw std::runtime_error("the state of a context with a KV budget goes through host memory");
    }
    std::vector<llama_seq_id> res;
    for (llama_seq_id s = 0; s < (llama_seq_id) kv.n_seq; ++s) {
        if (seq_id == -1 || seq_id == s) {
            res.push_back(s);
        }
    }
    if (res.empty()) {
        throw std::runtime_error(format("sequence %d is not one of %u", seq_id, kv.n_seq));
    }
    for (const auto s : res) {
        if (kv.reading_of(s) >= 0) {
            throw std::runtime_error(format("a prompt is being read for sequence %d", s));
        }
    }
    return res;
}

} // namespace

void ziggurat_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    const auto own = sequences_of(*this, seq_id, flags);
    write_number(io, STATE_MAGIC);
    write_number(io, STATE_VERSION);
    for (const auto & it : identity_of(*this)) {
        write_number(io, it.second);
    }
    write_number(io, own.size());
    for (const auto s : own) {
        write_sequence(io, *this, s);
    }
}

// Nothing is changed before all of it has been read and checked. llama_context catches what is thrown.
void ziggurat_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    refusal.clear();
    std::vector<saved_sequence> saved;
    try {
        const auto own = sequences_of(*this, seq_id, flags);
        check_identity(*this, io);
        if (const uint32_t n = read_number(io); n != own.size()) {
            throw std::runtime_error(format("the state is of %u sequences, not %zu", n, own.size()));
        }
        for (const auto s : own) {
            saved.push_back(read_sequence(io, *this, s));
        }
    } catch (const std::exception & e) {
        refusal = e.what();
        throw;
    }
    for (auto & it : saved) {
        for (size_t i = 0; i < it.pieces.size(); ++i) {
            const auto & p = it.pieces[i];
            ggml_backend_tensor_set(p.tensor, it.bytes[i].data(), p.offset, p.size);
        }
        seqs[it.seq_id] = std::move(it.seq);
    }
}

// The end of the original may be left out where it could be removed; what the copy's place held is gone.
void ziggurat_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    refusal.clear();
    if (seq_id_src == seq_id_dst) {
        return;
    }
    ziggurat_kv_sequence copy;
    if (!exists(seq_id_src) || !exists(seq_id_dst)) {
        refusal = format("sequence %d or %d is not one of %u", seq_id_src, seq_id_dst, n_seq);
    } else if (reading_of(seq_id_src) >= 0 || reading_of(seq_id_dst) >= 0) {
        refusal = format("sequence %d cannot be copied to %d: a prompt is being read for one of them", seq_id_src, seq_id_dst);
    } else if (p0 > 0) {
        refusal = format("sequence %d can only be copied from its beginning, not from position %d", seq_id_src, p0);
    } else {
        copy    = seqs[seq_id_src];
        refusal = p1 >= 0 && p1 < copy.next ? cut(copy, seq_id_src, p1) : "";
    }
    if (!refusal.empty()) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, refusal.c_str());
        return;
    }
    copy_plane(seq_id_src, seq_id_src, seq_id_dst);
    seqs[seq_id_dst] = std::move(copy);
}
