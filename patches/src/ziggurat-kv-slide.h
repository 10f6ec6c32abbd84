#pragma once

// Layers with a sliding window, in models that have others as well. No budget can shorten what they hold: as many rows
// as upstream's cache has for them, in a ring, where the row of a position is at position % rows. As long as nothing is
// removed that is where upstream's cache puts it as well, so attention sums in the same order.

#include "ziggurat-kv-cache.h"

// Rows of a ring: the window and what a ubatch overwrites, so that no token loses rows that it sees to one after it.
uint32_t ziggurat_kv_ring_rows(const llama_hparams & hparams, uint32_t n_ctx, uint32_t n_ubatch, bool endless);

// How many of a sequence's last tokens can be removed with a whole window before what is left, in layer il.
uint32_t ziggurat_kv_ring_tail(const ziggurat_kv_cache & kv, const ziggurat_kv_sequence & seq, uint32_t il);

// Whether a sequence could still be taken back to what it is after n tokens more.
bool ziggurat_kv_rings_outlive(const ziggurat_kv_cache & kv, const ziggurat_kv_sequence & seq, uint32_t n);

// Whether sequences can ever have more rows in a ring than it holds.
bool ziggurat_kv_rings_wrap(const ziggurat_kv_cache & kv);

// The positions of a ring's first n_kv rows when the last one written is `last`; negative where nothing was written.
std::vector<llama_pos> ziggurat_kv_ring_positions(uint32_t capacity, uint32_t n_kv, llama_pos last);
