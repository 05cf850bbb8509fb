// ggml's k-quants on a CPU, a vector of sub-blocks at a time: 16 floats of 16 sub-blocks, whatever its registers hold.
#include <cstddef>
#include <cstdint>
#include <cstring>

#define FUNCTION static inline
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
static const int LANES = 16;
static const float ROUNDING = 12582912.0f;  // 1.5·2^23

FUNCTION F choose(I which, F yes, F no) { return (F)((which & (I)yes) | (~which & (I)no)); }
FUNCTION F absolute(F x) { return (F)((I)x & 0x7fffffff); }
FUNCTION I nearest(F x) { return ((I)(x + ROUNDING) & 0x007fffff) - 0x00400000; }
FUNCTION F clamped(I level, int lowest, int highest)
{
    level = level < highest ? level : I{} + highest;
    return __builtin_convertvector(level > lowest ? level : I{} + lowest, F);
}
FUNCTION F root(F x)
{
    for (int lane = 0; lane < LANES; lane++)
        x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}
FUNCTION unsigned bits_of(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
FUNCTION float float_of(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
FUNCTION int nearest(float x) { return int(bits_of(x + ROUNDING) & 0x007fffff) - 0x00400000; }

#include "k_quants.h"

// COUNT weights of each of 16 sub-blocks that lie one behind another, weight by weight.
template <int COUNT> FUNCTION void gather(const float *from, F *x)
{
    for (int i = 0; i < COUNT; i++)
        for (int lane = 0; lane < LANES; lane++)
            x[i][lane] = from[lane * COUNT + i];
}

// Levels of the weights from `from` and a step, as a super-block's header has them; where the step is 0, the search's.
template <int COUNT>
FUNCTION void set_levels(const F *x, F step, F minimum, const Found<F> &found, int lowest, int highest, uint8_t *levels)
{
    for (int i = 0; i < COUNT; i++) {
        const F searched = level_of(x[i], found.inverse, found.from, lowest, highest);
        const F level = choose(step == F{}, searched, clamped(nearest((x[i] + minimum) / step), lowest, highest));
        for (int lane = 0; lane < LANES; lane++)
            levels[lane * COUNT + i] = uint8_t(int(level[lane]) - lowest);
    }
}

// Q4_K (TOP 15) and Q5_K (TOP 31): 2 super-blocks of 256 weights.
template <int TOP> static void two_blocks(const float *from, const float *const matrix[2], uint8_t *const to[2])
{
    const int COUNT = 32;
    F x[COUNT], w[COUNT];
    gather<COUNT>(from, x);
    float weights[LANES] = {};
    if (matrix[0]) {
        F variance;
        for (int block = 0; block < 2; block++) {
            float sum = 0;
            for (int i = 0; i < 256; i++)
                sum = sum + from[256 * block + i] * from[256 * block + i];
            for (int j = 0; j < 8; j++)
                variance[8 * block + j] = 2 * sum / 256;
        }
        F sum = F{};
        for (int i = 0; i < COUNT; i++) {
            F importance;
            for (int lane = 0; lane < LANES; lane++)
                importance[lane] = matrix[lane / 8][lane % 8 * COUNT + i];
            w[i] = importance * root(variance + x[i] * x[i]);
            sum = sum + w[i];
        }
        memcpy(weights, &sum, sizeof weights);
    } else {
        F sum = F{};
        for (int i = 0; i < COUNT; i++)
            sum = sum + x[i] * x[i];
        const F average = root(sum / 32);
        for (int i = 0; i < COUNT; i++)
            w[i] = average + absolute(x[i]);
    }
    const Found<F> found = matrix[0] ? search_scale_and_minimum<COUNT, TOP>(x, w, -0.9f, 0.05f, 36)
                                     : search_scale_and_minimum<COUNT, TOP>(x, w, TOP == 15 ? -1.0f : -0.5f, 0.1f,
                                                                            TOP == 15 ? 20 : 15);
    float scales[LANES], minimums[LANES];
    memcpy(scales, &found.scale, sizeof scales);
    memcpy(minimums, &found.minimum, sizeof minimums);
    F step, minimum;
    for (int block = 0; block < 2; block++) {
        const float *const s = scales + 8 * block, *const m = minimums + 8 * block;
        const Header header = matrix[0] ? weighted_header(s, m, weights + 8 * block, TOP == 31) : common_header(s, m);
        memcpy(to[block], &header, sizeof header);
        for (int j = 0; j < 8; j++) {
            step[8 * block + j] = float_of_half(header.scale) * float(packed_scale(header.packed, j));
            minimum[8 * block + j] = float_of_half(header.minimum) * float(packed_minimum(header.packed, j));
        }
    }
    uint8_t levels[LANES * COUNT];
    set_levels<COUNT>(x, step, minimum, found, 0, TOP, levels);
    for (int block = 0; block < 2; block++) {
        const uint8_t *level = levels + 256 * block;
        uint8_t *packed = to[block] + sizeof(Header);
        if (TOP == 31) {
            for (int i = 0; i < 32; i++) {
                int high = 0;
                for (int j = 0; j < 8; j++)
                    high |= (level[32 * j + i] >> 4) << j;
                packed[i] = uint8_t(high);
            }
            packed += 32;
        }
        for (int j = 0; j < 256; j += 64)
            for (int i = 0; i < 32; i++)
                packed[j / 2 + i] = uint8_t((level[j + i] & 15) | (level[j + i + 32] << 4));
    }
}

// Q6_K: a super-block of 16 sub-blocks of 16 weights.
static void six_bit_block(const float *from, const float *matrix, uint8_t *to)
{
    const int COUNT = 16, TOP = 32, BYTES = 210;
    F x[COUNT], w[COUNT];
    gather<COUNT>(from, x);
    if (matrix)
        gather<COUNT>(matrix, w);
    else
        for (int i = 0; i < COUNT; i++)
            w[i] = x[i] * x[i];
    const Found<F> found = search_scale<COUNT, TOP>(x, w);
    float scales[LANES], largest = 0, extreme = 0;
    memcpy(scales, &found.scale, sizeof scales);
    for (int j = 0; j < LANES; j++) {
        const float size = scales[j] < 0 ? -scales[j] : scales[j];
        if (size > largest) {
            largest = size;
            extreme = scales[j];
        }
    }
    if (largest < 1e-15f) {
        memset(to, 0, BYTES);
        return;
    }
    const float inverse = -128.0f / extreme;
    const uint16_t common = half_of(1 / inverse);
    memcpy(to + 208, &common, sizeof common);
    F step;
    for (int j = 0; j < LANES; j++) {
        const int rounded = nearest(inverse * scales[j]);
        const int8_t scale = int8_t(rounded < 127 ? rounded : 127);
        to[192 + j] = uint8_t(scale);
        step[j] = float_of_half(common) * float(scale);
    }
    uint8_t level[LANES * COUNT];
    set_levels<COUNT>(x, step, F{}, found, -TOP, TOP - 1, level);
    for (int j = 0; j < LANES; j++)
        if (step[j] == 0 && found.inverse[j] == 0)  // all of them zero
            memset(level + COUNT * j, 0, COUNT);
    uint8_t *low = to, *high = to + 128;
    for (int j = 0; j < 256; j += 128, low += 64, high += 32)
        for (int i = 0; i < 32; i++) {
            const uint8_t a = level[j + i], b = level[j + i + 32], c = level[j + i + 64], d = level[j + i + 96];
            low[i] = uint8_t((a & 15) | (c << 4));
            low[i + 32] = uint8_t((b & 15) | (d << 4));
            high[i] = uint8_t((a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6));
        }
}

template <int TOP>
static void all_blocks(const float *from, size_t rows, size_t columns, const float *matrix, uint8_t *to)
{
    const size_t bytes = sizeof(Header) + (TOP == 31 ? 32 : 0) + 128, across = columns / 256, blocks = rows * across;
    for (size_t block = 0; block < blocks; block += 2) {
        const bool both = block + 1 < blocks;
        float copy[512];
        uint8_t unused[sizeof(Header) + 160];
        if (!both) {
            memcpy(copy, from + 256 * block, 256 * sizeof(float));
            memcpy(copy + 256, copy, 256 * sizeof(float));
        }
        const float *const importance[2] = {matrix ? matrix + 256 * (block % across) : nullptr,
                                            matrix ? matrix + 256 * ((block + both) % across) : nullptr};
        uint8_t *const places[2] = {to + bytes * block, both ? to + bytes * (block + 1) : unused};
        two_blocks<TOP>(both ? from + 256 * block : copy, importance, places);
    }
}

// from: (rows, columns), columns a multiple of 256; matrix: (columns,) or null; to: the rows in their type.
extern "C" {
void quantize_q4_k(const float *from, size_t rows, size_t columns, const float *matrix, uint8_t *to)
{
    all_blocks<15>(from, rows, columns, matrix, to);
}

void quantize_q5_k(const float *from, size_t rows, size_t columns, const float *matrix, uint8_t *to)
{
    all_blocks<31>(from, rows, columns, matrix, to);
}

void quantize_q6_k(const float *from, size_t rows, size_t columns, const float *matrix, uint8_t *to)
{
    const size_t across = columns / 256;
    for (size_t block = 0; block < rows * across; block++)
        six_bit_block(from + 256 * block, matrix ? matrix + 256 * (block % across) : nullptr, to + 210 * block);
}
}
