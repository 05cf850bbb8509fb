// The searches of ggml's k-quants, one sub-block of weights a lane: F is a float, or a vector of floats of as many
// sub-blocks, I the integers beside it. Every lane does the operations of ggml's reference in the reference's order,
// each rounded by itself, so that the bytes are the same. Whoever includes this defines FUNCTION, the words before a
// function; choose (by a comparison), absolute, nearest (F to I, as adding 1.5·2^23 rounds) and clamped (I to F);
// bits_of and float_of.

// What a search found: a weight is scale·level - minimum, and level is nearest(inverse·(weight - from)), clamped.
template <class F> struct Found {
    F scale, minimum, inverse, from;
};

template <class F> FUNCTION F level_of(F x, F inverse, F from, int lowest, int highest)
{
    return clamped(nearest(inverse * (x - from)), lowest, highest);
}

// Scale and minimum of COUNT weights for levels 0 … TOP, tried for steps + 1 scales from `first` on.
template <int COUNT, int TOP, class F>
FUNCTION Found<F> search_scale_and_minimum(const F *x, const F *w, float first, float step, int steps)
{
    F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < COUNT; i++) {
        low = choose(x[i] < low, x[i], low);
        high = choose(x[i] > high, x[i], high);
        sum_w = sum_w + w[i];
        sum_x = sum_x + w[i] * x[i];
    }
    const F zero = F{};
    low = choose(low > zero, zero, low);
    const F lowest = low;
    Found<F> found;
    found.inverse = float(TOP) / (high - low);
    found.scale = 1.0f / found.inverse;
    found.from = low;
    F least = zero;
    for (int i = 0; i < COUNT; i++) {
        const F off = found.scale * level_of(x[i], found.inverse, low, 0, TOP) + low - x[i];
        least = least + w[i] * (off * off);
    }
    for (int k = 0; k <= steps; k++) {
        const F inverse = (first + step * float(k) + float(TOP)) / (high - low);
        F levels[COUNT], sum_l = zero, sum_l2 = zero, sum_xl = zero;
        for (int i = 0; i < COUNT; i++) {
            const F level = level_of(x[i], inverse, low, 0, TOP), weighted = w[i] * level;
            levels[i] = level;
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * level;
            sum_xl = sum_xl + weighted * x[i];
        }
        const F determinant = sum_w * sum_l2 - sum_l * sum_l;
        F scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        F minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        scale = choose(minimum > zero, sum_xl / sum_l2, scale);
        minimum = choose(minimum > zero, zero, minimum);
        F error = zero;
        for (int i = 0; i < COUNT; i++) {
            const F off = scale * levels[i] + minimum - x[i];
            error = error + w[i] * (off * off);
        }
        const auto better = (determinant > zero) & (error < least);
        least = choose(better, error, least);
        found.scale = choose(better, scale, found.scale);
        found.inverse = choose(better, inverse, found.inverse);
        found.from = choose(better, low, found.from);
        low = choose(better, minimum, low);
    }
    const auto flat = high <= lowest;  // all weights are the same and not above zero: every level is 0
    found.minimum = -choose(flat, lowest, low);
    found.scale = choose(flat, zero, found.scale);
    found.inverse = choose(flat, zero, found.inverse);
    found.from = choose(flat, zero, found.from);
    return found;
}

// The scale of COUNT weights for levels -TOP … TOP - 1; the inverse of those that are zero is 0.
template <int COUNT, int TOP, class F> FUNCTION Found<F> search_scale(const F *x, const F *w)
{
    const F zero = F{};
    F largest = zero, extreme = zero;
    for (int i = 0; i < COUNT; i++) {
        const F size = absolute(x[i]);
        extreme = choose(size > largest, x[i], extreme);
        largest = choose(size > largest, size, largest);
    }
    Found<F> found;
    found.minimum = found.from = zero;
    F best = zero;
    for (int k = -10; k <= 9; k++) {  // the first is 0, the others follow in their order
        const int at = k == -10 ? 0 : k;
        if (k == 0)
            continue;
        const F inverse = -(float(TOP) + 0.1f * float(at)) / extreme;
        F sum_xl = zero, sum_l2 = zero;
        for (int i = 0; i < COUNT; i++) {
            const F level = clamped(nearest(inverse * x[i]), -TOP, TOP - 1);
            sum_xl = sum_xl + w[i] * x[i] * level;
            sum_l2 = sum_l2 + w[i] * level * level;
        }
        const F scale = sum_xl / sum_l2;
        if (k == -10) {
            found.scale = choose(sum_l2 != zero, scale, zero);
            found.inverse = inverse;
            best = found.scale * sum_xl;
            continue;
        }
        const auto better = (sum_l2 > zero) & (sum_xl * sum_xl > best * sum_l2);
        found.scale = choose(better, scale, found.scale);
        found.inverse = choose(better, inverse, found.inverse);
        best = choose(better, scale * sum_xl, best);
    }
    const auto nothing = largest < 1e-15f;
    found.scale = choose(nothing, zero, found.scale);
    found.inverse = choose(nothing, zero, found.inverse);
    return found;
}

// The common scale of the 8 scales (or minimums) of a super-block, and their levels 0 … TOP, by their weights.
template <int TOP> FUNCTION float search_common_scale(const float *x, const float *w, unsigned char *levels)
{
    const int count = 8;
    float largest = 0;
    for (int i = 0; i < count; i++)
        largest = largest > x[i] ? largest : x[i];
    if (largest < 1e-15f) {
        for (int i = 0; i < count; i++)
            levels[i] = 0;
        return 0;
    }
    float inverse = float(TOP) / largest, scale = 1.0f / inverse, least = 0;
    for (int i = 0; i < count; i++) {
        // A byte as in the reference: what is below zero comes round from above.
        levels[i] = (unsigned char)nearest(inverse * x[i]);
        const float off = x[i] - scale * float(levels[i]);
        least = least + w[i] * off * off;
    }
    for (int k = -4; k <= 4; k++) {
        if (k == 0)
            continue;
        const float other = (0.1f * float(k) + float(TOP)) / largest, step = 1.0f / other;
        float error = 0;
        for (int i = 0; i < count; i++) {
            const int level = nearest(other * x[i]);
            const float off = x[i] - step * float(level < TOP ? level : TOP);
            error = error + w[i] * off * off;
        }
        if (error < least) {
            least = error;
            inverse = other;
        }
    }
    float sum_xl = 0, sum_l2 = 0;
    for (int i = 0; i < count; i++) {
        const int rounded = nearest(inverse * x[i]), level = rounded < TOP ? rounded : TOP;
        levels[i] = (unsigned char)level;
        sum_xl = sum_xl + w[i] * x[i] * float(level);
        sum_l2 = sum_l2 + w[i] * float(level) * float(level);
    }
    for (int trial = 0; trial < 5; trial++) {
        bool changed = false;
        for (int i = 0; i < count; i++) {
            const float held = float(levels[i]);
            float xl = sum_xl - w[i] * x[i] * held, l2 = sum_l2 - w[i] * held * held;
            if (!(xl > 0 && l2 > 0))
                continue;
            const int rounded = nearest(x[i] * l2 / xl), level = rounded < TOP ? rounded : TOP;
            if (level == int(levels[i]))
                continue;
            xl = xl + w[i] * x[i] * float(level);
            l2 = l2 + w[i] * float(level) * float(level);
            if (xl * xl * sum_l2 > sum_xl * sum_xl * l2) {
                levels[i] = (unsigned char)level;
                sum_xl = xl;
                sum_l2 = l2;
                changed = true;
            }
        }
        if (!changed)
            break;
    }
    return sum_l2 > 0 ? sum_xl / sum_l2 : 0;
}

// The nearest float16, ties to even, as its bits.
FUNCTION unsigned short half_of(float value)
{
    const unsigned bits = bits_of(value), sign = (bits >> 16) & 0x8000u;
    unsigned size = bits & 0x7fffffffu;
    if (size > 0x7f800000u)  // no number; a GPU has another sign of it, and such a block is refused
        return (unsigned short)(sign | 0x7e00u);
    if (size >= 0x477ff000u)
        return (unsigned short)(sign | 0x7c00u);
    if (size < 0x38800000u) {  // below the normal ones: adding 0.5 leaves the fraction's bits at the right place
        const float shifted = float_of(size) + 0.5f;
        return (unsigned short)(sign | (bits_of(shifted) - 0x3f000000u));
    }
    size += ((size >> 13) & 1u) + 0x0fffu;
    return (unsigned short)(sign | ((size - 0x38000000u) >> 13));
}

FUNCTION float float_of_half(unsigned short half)
{
    const unsigned sign = (unsigned(half) & 0x8000u) << 16, size = half & 0x7fffu;
    if (size >= 0x7c00u)
        return float_of(sign | 0x7f800000u | ((size & 0x3ffu) << 13));
    if (size >= 0x0400u)
        return float_of(sign | ((size << 13) + 0x38000000u));
    return float_of(sign | bits_of(float(size) * 5.9604644775390625e-8f));  // 2^-24
}

// How the 6-bit scales and minimums of 8 sub-blocks lie in 12 bytes, and how they are read again.
FUNCTION void pack_scales(const unsigned char *scales, const unsigned char *minimums, unsigned char *packed)
{
    for (int j = 0; j < 4; j++) {
        packed[j] = scales[j];
        packed[j + 4] = minimums[j];
    }
    for (int j = 4; j < 8; j++) {
        packed[j + 4] = (unsigned char)((scales[j] & 15) | ((minimums[j] & 15) << 4));
        packed[j - 4] = (unsigned char)(packed[j - 4] | ((scales[j] >> 4) << 6));
        packed[j] = (unsigned char)(packed[j] | ((minimums[j] >> 4) << 6));
    }
}

FUNCTION int packed_scale(const unsigned char *packed, int j)
{
    return j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
}

FUNCTION int packed_minimum(const unsigned char *packed, int j)
{
    return j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
}

// What stands before the levels of a super-block of Q4_K or Q5_K: two halves and 12 bytes of packed scales.
struct Header {
    unsigned short scale, minimum;
    unsigned char packed[12];
};

FUNCTION Header common_header(const float *scales, const float *minimums)
{
    float largest[2] = {0, 0};
    for (int j = 0; j < 8; j++) {
        largest[0] = scales[j] > largest[0] ? scales[j] : largest[0];
        largest[1] = minimums[j] > largest[1] ? minimums[j] : largest[1];
    }
    unsigned char levels[2][8];
    for (int k = 0; k < 2; k++) {
        const float inverse = largest[k] > 0 ? 63.0f / largest[k] : 0.0f;
        for (int j = 0; j < 8; j++) {
            const unsigned char level = (unsigned char)nearest(inverse * (k ? minimums[j] : scales[j]));
            levels[k][j] = level < 63 ? level : 63;
        }
    }
    Header header;
    header.scale = half_of(largest[0] / 63.0f);
    header.minimum = half_of(largest[1] / 63.0f);
    pack_scales(levels[0], levels[1], header.packed);
    return header;
}

// The same where an importance matrix weighs the sub-blocks; `limited`: no level is above 63.
FUNCTION Header weighted_header(const float *scales, const float *minimums, const float *weights, bool limited)
{
    unsigned char levels[2][8];
    Header header;
    header.scale = half_of(search_common_scale<63>(scales, weights, levels[0]));
    header.minimum = half_of(search_common_scale<63>(minimums, weights, levels[1]));
    for (int j = 0; j < 8 && limited; j++)
        for (int k = 0; k < 2; k++)
            levels[k][j] = levels[k][j] < 63 ? levels[k][j] : 63;
    pack_scales(levels[0], levels[1], header.packed);
    return header;
}
