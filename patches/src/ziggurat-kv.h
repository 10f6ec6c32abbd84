#pragma once

// KV budgets: every layer keeps a bounded number of rows per KV head and evicts the rest after a prompt.
//
// llama_context_params::kv_budget points to a ziggurat_kv_params while a context is made (it is copied); NULL leaves
// everything as it is upstream. "How many" rows a layer keeps is in `rows` and comes from the caller; "which" is
// `score`. Models it does not fit run with the full cache; ziggurat_kv_unsupported says why.
//
// Layers with a sliding window have none: they keep the rows that upstream's cache keeps (never the whole context, swa_full
// or not), and all that is said of budgets and selections here is about the other layers.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ziggurat-quant.h" // ZIGGURAT_API

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;
struct llama_context;

enum ziggurat_kv_score {
    ZIGGURAT_KV_SCORE_SNAPKV = 0, // attention that the last `window` queries pay to a row (SnapKV, arXiv 2404.14469)
    ZIGGURAT_KV_SCORE_RECENT = 1, // the latest rows, beside the sinks (StreamingLLM, arXiv 2309.17453)
    ZIGGURAT_KV_SCORE_RANDOM = 2, // rows drawn by `seed`: the control
    ZIGGURAT_KV_SCORE_TOVA   = 3, // attention that the last query pays to a row, the mean over all heads of a layer, whose KV
                                  // heads so keep the same rows (TOVA, arXiv 2401.06104)
    ZIGGURAT_KV_SCORE_KEYDIFF = 4, // how little a key is like the others of its KV head: 1 - its cosine similarity to the
                                  // mean of all keys at length 1 (KeyDiff, arXiv 2504.15364)
    ZIGGURAT_KV_SCORE_H2O    = 5, // attention that a row has been paid by all queries so far, the mean of the query heads of
                                  // its KV head (H2O, arXiv 2306.14048); the products of a prompt are computed twice for it
};

enum ziggurat_kv_prefill {
    ZIGGURAT_KV_PREFILL_EXACT   = 0, // select once, after the whole prompt: layer by layer where the model's graph can
                                     // be cut, else in a lane that holds the full cache of one prompt
    ZIGGURAT_KV_PREFILL_BOUNDED = 1, // the same, but never a lane: a model whose graph cannot be cut is refused
    ZIGGURAT_KV_PREFILL_CHUNKED = 2, // select after every ubatch: lossy
    ZIGGURAT_KV_PREFILL_LANE    = 3, // as exact, but in the lane though the graph could be cut: fewer and larger graphs
};

enum ziggurat_kv_pool {
    ZIGGURAT_KV_POOL_AVG = 0, // zeros beside the borders count
    ZIGGURAT_KV_POOL_MAX = 1,
};

// What llama.h's functions do on a context with a budget, beyond decoding. What they refuse changes nothing.
//   llama_memory_seq_rm   removes a whole sequence, or the end of one as far as its last selection, and no further than
//                         leaves a whole window of rows in layers that have a sliding one.
//   llama_memory_seq_cp   copies a whole sequence, or one without an end that could be removed; what the other held is
//                         gone. Every sequence has rows of its own, so a copy takes as many. Both go on alike.
//   llama_state_seq_*     save a sequence and restore it, also in another context, if it has the same budgets, types and
//                         selection. What cannot be a sequence of this context is refused; rows are taken as they are.
//   llama_state_*         the same for all sequences together, with no logits.
//   shifting and dividing positions is refused: they stay the true ones.

struct ziggurat_kv_params {
    uint32_t         n_layer; // length of rows; the model's number of layers
    const uint32_t * rows;    // rows per KV head that a layer keeps after a prompt, window and sinks included; of a layer
                              // with a sliding window: anything
    uint32_t         window;  // last tokens, which always stay, and whose queries score if any do (tova: the last one's)
    uint32_t         sinks;   // first tokens that always stay
    uint32_t         pool;    // width of the pooling of scores over positions, odd; 1 for none
    int32_t          pool_type;
    uint32_t         slack;   // rows a layer has at least beyond its budget, for generated tokens
    int32_t          score;
    int32_t          prefill;
    uint32_t         seed;
    uint32_t         n_reading; // prompts that may be read at a time, each with a stage
    uint32_t         n_copies;  // of these, how many may follow what their sequence holds, each with a copy of it
};

// What a context with a budget has allocated. Bytes are of all sequences together.
struct ziggurat_kv_layout {
    uint64_t rows_bytes;     // K and V rows of the sequences
    uint64_t position_bytes; // positions of the selected rows
    uint64_t query_bytes;    // queries of each sequence's last tokens, where they score
    uint64_t sum_bytes;      // sums of attention, where they are the score
    uint64_t copy_bytes;     // all of these again, of the sequences that prompts are being read for
    uint64_t stage_bytes;    // K and V rows (and sums) of the prompts being read: of one layer, or of all (the lane)
    uint64_t hidden_bytes;   // hidden states of the prompts being read
    uint32_t stage_rows;     // of one prompt
    uint32_t layer_major;    // 1: prompts are read layer by layer; 0: in the lane
};

// Why a model cannot have a budget, or NULL if it can. The text is static.
ZIGGURAT_API const char * ziggurat_kv_unsupported(const struct llama_model * model);

// The sliding window of each layer in tokens, 0 for a layer that sees everything; writes at most n, returns the number of
// layers.
ZIGGURAT_API int32_t ziggurat_kv_windows(const struct llama_model * model, uint32_t * windows, size_t n);

// Whether this context has a budget.
ZIGGURAT_API bool ziggurat_kv_active(const struct llama_context * ctx);

// Why the last call on this context's cache was refused (a decode that returned 1, a removal, a copy, a state); "" if it was
// not. Valid until the next call.
ZIGGURAT_API const char * ziggurat_kv_refusal(const struct llama_context * ctx);

// All of the following return -1 on a context without a budget and on a sequence or layer that does not exist.

ZIGGURAT_API int32_t ziggurat_kv_get_layout(const struct llama_context * ctx, struct ziggurat_kv_layout * layout);

// Rows allocated per layer and sequence; writes at most n, returns the number of layers.
ZIGGURAT_API int32_t ziggurat_kv_capacity(const struct llama_context * ctx, uint32_t * rows, size_t n);

// Rows in use per layer; writes at most n, returns the number of layers.
ZIGGURAT_API int32_t ziggurat_kv_rows(const struct llama_context * ctx, int32_t seq_id, uint32_t * rows, size_t n);

// Positions of the rows of one layer, [n_head_kv][rows in use], ascending per head; writes at most n, returns how many
// there are (0 for a layer without attention). Waits for the computation that is running.
ZIGGURAT_API int32_t ziggurat_kv_positions(
        struct llama_context * ctx, int32_t seq_id, int32_t layer, int32_t * positions, size_t n);

// Give one sequence a budget of its own, for its next selections; n is the number of layers, no rows[i] more than the
// context's nor less than window and sinks. NULL takes the context's again. Returns 0.
ZIGGURAT_API int32_t ziggurat_kv_set_budget(
        struct llama_context * ctx, int32_t seq_id, const uint32_t * rows, size_t n);

// Select now: every layer of the sequence that holds more than its budget is brought down to it. Returns the number of
// layers that were, -2 if the computation failed (the sequence is then as before).
ZIGGURAT_API int32_t ziggurat_kv_select(struct llama_context * ctx, int32_t seq_id);

// From now on up to n tokens of a sequence in one llama_decode are a decoding step, as a single one always is: drafts, say.
// They are written beside the rows that are there, and layers above their budget select before them if they do not all
// fit, never after: so as many of them as are not wanted can be removed again, and the next selection is by the queries
// of those that stay. More than n tokens, or the first ones of a sequence, are a prompt.
//
// The results are those of n single tokens, except that a selection comes up to n - 1 tokens earlier: when the step does
// not fit. (Which step is that depends on the sequence's own tokens and steps; and if other sequences in the batches are
// about to select as well, it may come earlier by as many steps as it takes for not all to select in the same one.)
// A step of which k tokens were removed is likewise one of n - k that selected before it if n did not fit.
//
// It holds whatever `prefill` is: in a context that reads prompts in chunks, too, only what is no step is a chunk. Where
// nothing can ever be evicted it changes nothing. n is 1 to 16, 1 in a new context, and no more than every layer has rows
// beyond its budget (`slack` at least). Returns 0; -1 with a refusal; -2 if there is no memory for the largest step.
ZIGGURAT_API int32_t ziggurat_kv_set_step(struct llama_context * ctx, uint32_t n);

// The first position from which on a sequence's end can be removed: from any position there or later llama_memory_seq_rm
// removes the end. 0 while nothing was evicted; what follows the last token if nothing can be removed, as while a prompt
// is being read. (The rows are then exactly those of before. Queries are of the last `window` (tova: 1) + 16 tokens that
// there ever were, so a selection that comes less than `window` tokens after a longer removal is by fewer of them. With
// the score h2o what a prompt's tokens, and more than the last 16 of others, had paid stays in the sums of the rows left.)
ZIGGURAT_API int32_t ziggurat_kv_removable_from(const struct llama_context * ctx, int32_t seq_id);

// Reading a prompt in steps, with whatever else the context is asked in between. A step is one ubatch in one layer, or in
// all of them where it is written in place or in the lane. The sequence stays as it is until the last step is done: an
// abort, a failure or a cancellation at any step changes nothing in it. While it is being read it can be asked about,
// cleared or removed as a whole (which cancels), and refuses everything else.
//
// The results are those of one llama_decode of the whole prompt, to the last bit. (Of so few tokens that they are a
// decoding step they are not where layers are full: a step selects before it, a prompt after.)

struct ziggurat_kv_progress {
    uint32_t steps_done;
    uint32_t steps;
    uint32_t tokens;   // of the prompt
    uint32_t finished; // 1: the sequence has them now, and llama_get_logits_ith(ctx, -1) is what follows the last one
};

// Makes ready to read n tokens that follow the sequence's last; they are copied, and nothing is computed yet. Returns 0,
// or -1 with a refusal: when n_reading prompts are being read, when the sequence is, or when it has no room for them.
ZIGGURAT_API int32_t ziggurat_kv_prompt_begin(struct llama_context * ctx, int32_t seq_id, const int32_t * tokens, size_t n);

// Computes at most max_steps further steps. Returns 0; -1 if no prompt is being read for the sequence; 2 if the abort
// callback ended the computation and -2 if it failed: in both cases the prompt is cancelled.
ZIGGURAT_API int32_t ziggurat_kv_prompt_step(
        struct llama_context * ctx, int32_t seq_id, uint32_t max_steps, struct ziggurat_kv_progress * progress);

// Gives the prompt up. Returns 0, or -1 if none is being read for the sequence.
ZIGGURAT_API int32_t ziggurat_kv_prompt_cancel(struct llama_context * ctx, int32_t seq_id);

// For tests: the n-th allocation or computation of a graph from now on fails (0: the next), once. Negative: none does.
// Returns 0.
ZIGGURAT_API int32_t ziggurat_kv_test_fail_at(struct llama_context * ctx, int64_t n);

#ifdef __cplusplus
}
#endif
