// ggml's k-quants on a GPU: a thread for each sub-block. Compiled at run time, with IEEE division and square root and
// no fused multiply-add, as the options that it is compiled with say.
#define FUNCTION static __device__ __forceinline__
typedef float F;
typedef int I;
typedef unsigned char uint8_t;

FUNCTION F choose(bool which, F yes, F no) { return which ? yes : no; }
FUNCTION F absolute(F x) { return fabsf(x); }
FUNCTION unsigned bits_of(float x) { return __float_as_uint(x); }
FUNCTION float float_of(unsigned bits) { return __uint_as_float(bits); }
FUNCTION I nearest(F x)
{
    const float sum = x + 12582912.0f;
    // What is no number on an x86-64 has these bits of zero, here it has ones.
    return sum != sum ? 0 : int(bits_of(sum) & 0x007fffff) - 0x00400000;
}
FUNCTION F clamped(I level, int lowest, int highest)
{
    level = level < highest ? level : highest;
    return float(level > lowest ? level : lowest);
}

#include "k_quants.h"

static const int THREADS = 128;

// Q4_K (TOP 15) and Q5_K (TOP 31): 8 threads for a super-block of 256 weights.
template <int TOP>
FUNCTION void quantize(const float *from, const float *matrix, uint8_t *to, long long blocks, long long across)
{
    const int COUNT = 32, BYTES = (TOP == 31 ? 32 : 0) + 144;
    __shared__ float scales[THREADS], minimums[THREADS], weights[THREADS];
    __shared__ uint8_t levels[THREADS * COUNT];
    const int thread = threadIdx.x, j = thread % 8, first = thread - j;
    const long long wanted = blockIdx.x * (long long)(THREADS / 8) + thread / 8;
    const long long block = wanted < blocks ? wanted : blocks - 1;
    const float *const whole = from + 256 * block;
    float x[COUNT], w[COUNT];
    for (int i = 0; i < COUNT; i++)
        x[i] = whole[COUNT * j + i];
    float sum = 0;
    if (matrix) {
        for (int i = 0; i < 256; i++)
            sum = sum + whole[i] * whole[i];
        const float variance = 2 * sum / 256;
        sum = 0;
        for (int i = 0; i < COUNT; i++) {
            w[i] = matrix[256 * (block % across) + COUNT * j + i] * sqrtf(variance + x[i] * x[i]);
            sum = sum + w[i];
        }
        weights[thread] = sum;
    } else {
        for (int i = 0; i < COUNT; i++)
            sum = sum + x[i] * x[i];
        const float average = sqrtf(sum / 32);
        for (int i = 0; i < COUNT; i++)
            w[i] = average + fabsf(x[i]);
    }
    const Found<F> found = matrix ? search_scale_and_minimum<COUNT, TOP>(x, w, -0.9f, 0.05f, 36)
                                  : search_scale_and_minimum<COUNT, TOP>(x, w, TOP == 15 ? -1.0f : -0.5f, 0.1f,
                                                                         TOP == 15 ? 20 : 15);
    scales[thread] = found.scale;
    minimums[thread] = found.minimum;
    __syncthreads();
    const Header header = matrix ? weighted_header(scales + first, minimums + first, weights + first, TOP == 31)
                                 : common_header(scales + first, minimums + first);
    const float step = float_of_half(header.scale) * float(packed_scale(header.packed, j));
    const float minimum = float_of_half(header.minimum) * float(packed_minimum(header.packed, j));
    for (int i = 0; i < COUNT; i++) {
        const F level = step == 0 ? level_of(x[i], found.inverse, found.from, 0, TOP)
                                  : clamped(nearest((x[i] + minimum) / step), 0, TOP);
        levels[COUNT * thread + i] = uint8_t(int(level));
    }
    __syncthreads();
    if (wanted >= blocks)
        return;
    uint8_t *const out = to + BYTES * block;
    const uint8_t *const level = levels + COUNT * first;
    if (j == 0) {
        out[0] = uint8_t(header.scale);
        out[1] = uint8_t(header.scale >> 8);
        out[2] = uint8_t(header.minimum);
        out[3] = uint8_t(header.minimum >> 8);
        for (int i = 0; i < 12; i++)
            out[4 + i] = header.packed[i];
    }
    uint8_t *const packed = out + BYTES - 128;
    for (int i = 16 * j; i < 16 * j + 16; i++) {
        const int group = i / 32 * 64 + i % 32;
        packed[i] = uint8_t((level[group] & 15) | (level[group + 32] << 4));
    }
    if (TOP == 31)
        for (int i = 4 * j; i < 4 * j + 4; i++) {
            int high = 0;
            for (int k = 0; k < 8; k++)
                high |= (level[32 * k + i] >> 4) << k;
            out[16 + i] = uint8_t(high);
        }
}

extern "C" __global__ void quantize_q4_k(const float *from, const float *matrix, uint8_t *to, long long blocks,
                                         long long across)
{
    quantize<15>(from, matrix, to, blocks, across);
}

extern "C" __global__ void quantize_q5_k(const float *from, const float *matrix, uint8_t *to, long long blocks,
                                         long long across)
{
    quantize<31>(from, matrix, to, blocks, across);
}

// 16 threads for a super-block.
extern "C" __global__ void quantize_q6_k(const float *from, const float *matrix, uint8_t *to, long long blocks,
                                         long long across)
{
    const int COUNT = 16, TOP = 32, BYTES = 210;
    __shared__ float scales[THREADS];
    __shared__ uint8_t levels[THREADS * COUNT];
    const int thread = threadIdx.x, j = thread % 16, first = thread - j;
    const long long wanted = blockIdx.x * (long long)(THREADS / 16) + thread / 16;
    const long long block = wanted < blocks ? wanted : blocks - 1;
    float x[COUNT], w[COUNT];
    for (int i = 0; i < COUNT; i++) {
        x[i] = from[256 * block + COUNT * j + i];
        w[i] = matrix ? matrix[256 * (block % across) + COUNT * j + i] : x[i] * x[i];
    }
    const Found<F> found = search_scale<COUNT, TOP>(x, w);
    scales[thread] = found.scale;
    __syncthreads();
    float largest = 0, extreme = 0;
    for (int k = 0; k < 16; k++) {
        const float size = fabsf(scales[first + k]);
        if (size > largest) {
            largest = size;
            extreme = scales[first + k];
        }
    }
    const bool nothing = largest < 1e-15f;
    const float inverse = -128.0f / extreme;
    const unsigned short common = nothing ? 0 : half_of(1 / inverse);
    const int rounded = nearest(inverse * found.scale);
    const signed char scale = nothing ? 0 : (signed char)(rounded < 127 ? rounded : 127);
    const float step = float_of_half(common) * float(scale);
    for (int i = 0; i < COUNT; i++) {
        const F level = step == 0 ? level_of(x[i], found.inverse, found.from, -TOP, TOP - 1)
                                  : clamped(nearest(x[i] / step), -TOP, TOP - 1);
        levels[COUNT * thread + i] = nothing || (step == 0 && found.inverse == 0) ? 0 : uint8_t(int(level) + TOP);
    }
    __syncthreads();
    if (wanted >= blocks)
        return;
    uint8_t *const out = to + BYTES * block;
    const uint8_t *const level = levels + COUNT * first;
    for (int i = 4 * j; i < 4 * j + 4; i++) {
        const uint8_t *const half = level + i / 32 * 128 + i % 32;
        const int a = half[0], b = half[32], c = half[64], d = half[96];
        out[i / 32 * 64 + i % 32] = uint8_t((a & 15) | (c << 4));
        out[i / 32 * 64 + i % 32 + 32] = uint8_t((b & 15) | (d << 4));
        out[128 + i] = uint8_t((a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6));
    }
    out[192 + j] = uint8_t(scale);
    if (j == 0) {
        out[208] = uint8_t(common);
        out[209] = uint8_t(common >> 8);
    }
}

// A thread for a block of 32 weights.
extern "C" __global__ void quantize_q8_0(const float *from, const float *matrix, uint8_t *to, long long blocks,
                                         long long across)
{
    const long long block = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (block >= blocks)
        return;
    const float *const x = from + 32 * block;
    float largest = 0;
    for (int i = 0; i < 32; i++)
        largest = largest > fabsf(x[i]) ? largest : fabsf(x[i]);
    const float step = largest / 127.0f, inverse = step == 0 ? 0.0f : 1.0f / step;
    uint8_t *const out = to + 34 * block;
    const unsigned short scale = half_of(step);
    out[0] = uint8_t(scale);
    out[1] = uint8_t(scale >> 8);
    for (int i = 0; i < 32; i++) {
        const float level = roundf(x[i] * inverse);
        // Beyond an integer's range, where `step` is too small for its inverse, an x86-64 gives 0.
        out[2 + i] = fabsf(level) < 2147483648.0f ? uint8_t(int(level)) : 0;
    }
}
