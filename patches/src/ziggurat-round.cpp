#include "ziggurat-round.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int MAX_COLUMNS = 256, MAX_GROUP = 32;

// Rows that are worked on at once: a column of so many is a few vector registers, a block of them fits into L1.
constexpr int STRIP = 32;

// A column of a strip. All arithmetic is on whole ones, so that a row's results do not depend on where in it it lies.
struct alignas(64) lanes {
    float x[STRIP];

    // f(i) for each lane: a loop that compilers turn into vector instructions.
    template <typename F> static inline lanes each(F f) {
        lanes result;
        for (int i = 0; i < STRIP; ++i) {
            result.x[i] = f(i);
        }
        return result;
    }
};

inline lanes operator+(const lanes & a, const lanes & b) { return lanes::each([&](int i) { return a.x[i] + b.x[i]; }); }
inline lanes operator-(const lanes & a, const lanes & b) { return lanes::each([&](int i) { return a.x[i] - b.x[i]; }); }
inline lanes operator*(const lanes & a, const lanes & b) { return lanes::each([&](int i) { return a.x[i] * b.x[i]; }); }
inline lanes operator*(float a, const lanes & b) { return lanes::each([&](int i) { return a * b.x[i]; }); }

// The strip of a matrix that begins at `row`; the last one may be shorter, its other lanes are zero.
struct strip {
    int64_t n_rows, row;

    size_t bytes() const { return std::min<int64_t>(STRIP, n_rows - row) * sizeof(float); }

    lanes load(const float * matrix, int64_t column) const {
        lanes result = {};
        std::memcpy(result.x, matrix + column * n_rows + row, bytes());
        return result;
    }

    void store(float * matrix, int64_t column, const lanes & values) const {
        std::memcpy(matrix + column * n_rows + row, values.x, bytes());
    }
};

// to[k] += factors[k] * by
inline void push(lanes * to, const float * factors, int count, const lanes & by) {
    const lanes local = by; // is none of `to`: it stays in registers
    for (int k = 0; k < count; ++k) {
        for (int i = 0; i < STRIP; ++i) {
            to[k].x[i] += factors[k] * local.x[i];
        }
    }
}

// The nearest integers from `low` to `high`, ties to even; both are integers below 2^22.
inline lanes integers_within(const lanes & a, float low, float high) {
    return lanes::each([&](int i) {
        constexpr float shift = 12582912.0f; // 1.5 * 2^23, at which floats are integers
        const float     above = a.x[i] < low ? low : a.x[i];
        return ((above > high ? high : above) + shift) - shift;
    });
}

inline lanes levels_of(const ziggurat_round_grid & grid, const lanes & codes) {
    if (grid.levels == nullptr) {
        return lanes::each([&](int i) { return codes.x[i] + grid.zero; });
    }
    return lanes::each([&](int i) { return grid.levels[(int) codes.x[i]]; });
}

// What the codes of a group stand for.
class group_values {
  public:
    group_values(const ziggurat_round_grid & grid, const lanes & scale, const lanes & min) :
        grid(grid), scale(scale), min(min), inverse(lanes::each([&](int i) {
            const float one_over = 1.0f / scale.x[i];
            return scale.x[i] == 0.0f ? 0.0f : one_over; // of the levels the one nearest to 0, then
        })) {}

    lanes of(const lanes & codes) const { return levels_of(grid, codes) * scale - min; }

    lanes nearest_codes(const lanes & wanted) const {
        const lanes level = (wanted + min) * inverse;
        if (grid.levels == nullptr) {
            return integers_within(lanes::each([&](int i) { return level.x[i] - grid.zero; }), grid.lowest, grid.highest);
        }
        lanes codes = {};
        for (int k = 0; k < grid.highest; ++k) {
            const float between = (grid.levels[k] + grid.levels[k + 1]) / 2;
            codes = lanes::each([&](int i) { return codes.x[i] + (level.x[i] > between ? 1.0f : 0.0f); });
        }
        return codes;
    }

  private:
    const ziggurat_round_grid & grid;
    lanes                       scale, min, inverse;
};

// Moves an integer, by which a group's errors change along `u`, to where the cost is least.
void fit_integer(const ziggurat_round_grid & grid, const float * metric, const lanes * u, lanes & integer,
        lanes * gradient, lanes * change) {
    lanes hu[MAX_GROUP] = {}, uu = {}, ug = {};
    for (int k = 0; k < grid.group; ++k) {
        push(hu, metric + k * grid.columns, grid.group, u[k]);
    }
    for (int k = 0; k < grid.group; ++k) {
        uu = uu + u[k] * hu[k];
        ug = ug + u[k] * gradient[k];
    }
    const lanes best = lanes::each([&](int i) { return integer.x[i] - ug.x[i] / uu.x[i]; });
    const lanes move = integers_within(best, grid.first, grid.last) - integer;
    const lanes cost = move * (move * uu + 2.0f * ug);
    const lanes step = lanes::each([&](int i) { return (uu.x[i] > 0.0f) & (cost.x[i] < 0.0f) ? move.x[i] : 0.0f; });
    integer = integer + step;
    for (int k = 0; k < grid.group; ++k) {
        change[k]   = change[k] + step * u[k];
        gradient[k] = gradient[k] + step * hu[k];
    }
}

} // namespace

extern "C" void ziggurat_round_feed_back(
        const ziggurat_round_grid * grid,
        int64_t                     n_rows,
        const float               * factor,
        const float               * scales,
        const float               * mins,
        const float               * base,
        const float               * target,
        float                     * codes,
        float                     * errors) {
    lanes wanted[MAX_COLUMNS];
    for (strip at = { n_rows, 0 }; at.row < n_rows; at.row += STRIP) {
        for (int j = 0; j < grid->columns; ++j) {
            wanted[j] = at.load(base, j);
        }
        for (int begin = 0, g = 0; begin < grid->columns; begin += grid->group, ++g) {
            const group_values values(*grid, at.load(scales, g), at.load(mins, g));
            for (int j = begin; j < begin + grid->group; ++j) {
                const float * row   = factor + (int64_t) j * grid->columns;
                const lanes   code  = values.nearest_codes(wanted[j]);
                const lanes   error = values.of(code) - at.load(target, j);
                push(wanted + j + 1, row + j + 1, grid->columns - j - 1, -1.0f * error);
                at.store(codes, j, code);
                at.store(errors, j, error);
            }
        }
    }
}

extern "C" void ziggurat_round_descend(
        const ziggurat_round_grid * grid,
        int64_t                     n_rows,
        const float               * metric,
        const float               * d,
        const float               * dmin,
        float                     * scales,
        float                     * mins,
        float                     * codes,
        float                     * errors,
        const float               * gradient) {
    const int size = grid->group;
    lanes     slope[MAX_COLUMNS], code[MAX_GROUP], u[MAX_GROUP], change[MAX_GROUP];
    for (strip at = { n_rows, 0 }; at.row < n_rows; at.row += STRIP) {
        const lanes half = at.load(d, 0), half_min = at.load(dmin, 0);
        for (int j = 0; j < grid->columns; ++j) {
            slope[j] = at.load(gradient, j);
        }
        for (int begin = 0, g = 0; begin < grid->columns; begin += size, ++g) {
            const float * inner = metric + (int64_t) begin * grid->columns + begin;
            const int     left  = grid->columns - begin - size;
            lanes         scale = at.load(scales, g), min = at.load(mins, g);
            for (int j = 0; j < size; ++j) {
                code[j]   = at.load(codes, begin + j);
                change[j] = {};
                u[j]      = levels_of(*grid, code[j]) * half;
            }
            if (grid->first < grid->last) {
                fit_integer(*grid, inner, u, scale, slope + begin, change);
            }
            if (grid->first < grid->last && grid->has_mins) {
                std::fill_n(u, size, -1.0f * half_min);
                fit_integer(*grid, inner, u, min, slope + begin, change);
            }
            const group_values values(*grid, scale * half, min * half_min);
            for (int j = 0; j < size; ++j) {
                const float * row    = inner + (int64_t) j * grid->columns;
                const lanes   before = values.of(code[j]);
                code[j] = values.nearest_codes(before - (1.0f / row[j]) * slope[begin + j]);
                const lanes step = values.of(code[j]) - before;
                change[j]        = change[j] + step;
                push(slope + begin + j + 1, row + j + 1, size - j - 1, step); // within the group
                push(slope + begin + size, row + size, left, change[j]);     // behind it
                at.store(codes, begin + j, code[j]);
                at.store(errors, begin + j, at.load(errors, begin + j) + change[j]);
            }
            at.store(scales, g, scale);
            at.store(mins, g, min);
        }
    }
}
