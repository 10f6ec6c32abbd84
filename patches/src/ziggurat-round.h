#pragma once

// Choosing the codes of quantized weights one column after the other, each making up for the errors of those before it.
//
// A weight stands for scale * level[code] - min. Arrays are [columns][rows], float unless said otherwise, contiguous;
// rows do not depend on each other, nor on how many there are. One thread, no allocation; thread safe.

#include <stdbool.h>
#include <stdint.h>

#include "ziggurat-quant.h" // ZIGGURAT_API

#ifdef __cplusplus
extern "C" {
#endif

// Not checked: 0 <= lowest < highest < 2^22, columns <= 256, group <= 32, which divides columns, first <= last.
struct ziggurat_round_grid {
    const float * levels;   // of codes 0 .. highest, ascending; NULL: level[code] = zero + code
    float         zero;     // level of code 0
    int32_t       lowest;   // first code to use; 0 if there are `levels`
    int32_t       highest;  // last code
    int32_t       columns;  // of a block
    int32_t       group;    // columns that share a scale and a min
    int32_t       first;    // smallest integer scale (and min) of a group
    int32_t       last;     // largest; equal to `first` if they are not to be chosen
    bool          has_mins; // whether mins are to be chosen
};

// A block's codes by error feedback: column j is rounded to the value nearest to
//
//     base[j] - sum over i < j of factor[i][j] * errors[i],   errors[i] = its value - target[i]
//
//   factor              [columns][columns], the part above the diagonal is read
//   scales, mins        [groups][rows]
//   base, target        [columns][rows]
//   codes, errors       [columns][rows], results
ZIGGURAT_API void ziggurat_round_feed_back(
        const struct ziggurat_round_grid * grid,
        int64_t                            n_rows,
        const float                      * factor,
        const float                      * scales,
        const float                      * mins,
        const float                      * base,
        const float                      * target,
        float                            * codes,
        float                            * errors);

// One pass of coordinate descent over a block, group by group: the integer scale, the integer min, and then the codes
// one after the other go to where the cost e H e^T of the row's errors e is least.
//
//   metric              [columns][columns], the block's part of H; symmetric, diagonal above zero
//   d, dmin             [rows]; a group's scale is d times its integer scale, its min dmin times its integer min
//   scales, mins        [groups][rows], integers; changed
//   codes, errors       [columns][rows]; changed
//   gradient            [columns][rows], H e, the block's part
ZIGGURAT_API void ziggurat_round_descend(
        const struct ziggurat_round_grid * grid,
        int64_t                            n_rows,
        const float                      * metric,
        const float                      * d,
        const float                      * dmin,
        float                            * scales,
        float                            * mins,
        float                            * codes,
        float                            * errors,
        const float                      * gradient);

#ifdef __cplusplus
}
#endif
