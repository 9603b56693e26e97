// The operations of a training step around its matrix products, on an NVIDIA GPU: one kernel for
// about ten of PyTorch's. This file is compiled at run time, without headers.
// train/step/cuda/compiled_kernels.py calls the kernels; train/step/kernels.py says what they do.
// With -DBFLOAT16 `low_t` is bfloat16, otherwise float.
//
// Matrices are contiguous and row-major. A pointer whose flag says that it is unused is not read.

#ifdef BFLOAT16

typedef unsigned short low_t;

__device__ float to_float(low_t bits) { return __uint_as_float((unsigned)bits << 16); }

// Rounds to nearest, ties to even. NaN stays NaN.
__device__ unsigned to_low_pair(float first, float second)
{
#ifdef __CUDA_ARCH__
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else  // for tests of this file on a CPU
    const float values[2] = {first, second};
    unsigned halves[2];
    for (int i = 0; i < 2; ++i) {
        const unsigned bits = __float_as_uint(values[i]);
        const bool number = values[i] == values[i];
        halves[i] = number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
    }
    return halves[0] | (halves[1] << 16);
#endif
}

__device__ low_t to_low(float value) { return (low_t)(to_low_pair(value, 0.0f) & 0xffffu); }

// Four consecutive numbers, aligned to 8 bytes.
__device__ void load4(const low_t* from, float* values)
{
    const uint2 bits = *(const uint2*)from;
    values[0] = __uint_as_float(bits.x << 16);
    values[1] = __uint_as_float(bits.x & 0xffff0000u);
    values[2] = __uint_as_float(bits.y << 16);
    values[3] = __uint_as_float(bits.y & 0xffff0000u);
}

__device__ void store4(low_t* to, const float* values)
{
    uint2 bits;
    bits.x = to_low_pair(values[0], values[1]);
    bits.y = to_low_pair(values[2], values[3]);
    *(uint2*)to = bits;
}

// Its error of about 1e-6 does not matter beside bfloat16's 4e-3.
__device__ float exponential(float x) { return __expf(x); }

#else

typedef float low_t;

__device__ float to_float(low_t value) { return value; }
__device__ low_t to_low(float value) { return value; }

// Four consecutive numbers, aligned to 16 bytes.
__device__ void load4(const low_t* from, float* values)
{
    const float4 four = *(const float4*)from;
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

__device__ void store4(low_t* to, const float* values)
{
    float4 four;
    four.x = values[0];
    four.y = values[1];
    four.z = values[2];
    four.w = values[3];
    *(float4*)to = four;
}

__device__ float exponential(float x) { return expf(x); }

#endif

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One thread for each row of the batch. Rows are ordered by step, then by caption.
extern "C" __global__ void gather_words(
    const long long* captions,  // (B,)
    const long long* starts,    // (M,) place of each caption's first token
    const long long* lengths,   // (M,) number of its targets: its tokens and <end>
    const int* tokens,          // of all captions
    long long* words,           // (T * B,) out: the word each row reads; <pad> at step 0
    long long* targets,         // (T * B,) out
    int batch, int rows, int pad, int end)
{
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int step = row / batch;
    const long long caption = captions[row - step * batch];
    const int* mine = tokens + starts[caption];
    const int last = (int)lengths[caption] - 1;  // the step whose target is <end>
    words[row] = step > 0 && step <= last ? mine[step - 1] : pad;
    targets[row] = step < last ? mine[step] : step == last ? end : pad;
}

// One thread for each number. Writes the inputs of the first LSTM layer: the photo at step 0, then
// the words, to which the photo may be added; then applies dropout.
extern "C" __global__ void read_inputs(
    const long long* words,   // (R,)
    const float* embeddings,  // (W, E)
    const float* photos,      // (B, E)
    const low_t* mask,        // (R, E) if `masked`
    low_t* inputs,            // (R, E) out
    int batch, int size, int count, int photo_every_step, int masked)
{
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= count) return;
    const int row = n / size, unit = n - row * size;
    const float photo = photos[(row % batch) * size + unit];
    float value = photo;
    if (row >= batch) {
        value = embeddings[words[row] * size + unit];
        if (photo_every_step) value += photo;
    }
    if (masked) value *= to_float(mask[n]);
    inputs[n] = to_low(value);
}

// One thread for each unit of a caption's state. Gates are in the order i, f, g, o.
extern "C" __global__ void cell_forward(
    float* gates,            // (B, 4H): the inputs' part of the sums, without biases; out: the gates
    const float* recurrent,  // (B, 4H): the hidden state's part of the sums, unless `first`
    const float* bias_ih, const float* bias_hh,  // (4H,)
    const float* before,     // (B, H): the cells of the step before, unless `first`
    const low_t* mask,       // (B, H) if `masked`
    float* cells,            // (B, H) out
    low_t* hidden,           // (B, H) out
    low_t* dropped,          // (B, H) out if `masked`: hidden times mask
    int count, int size, int first, int masked)
{
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= count) return;
    const int row = n / size, unit = n - row * size;
    float* mine = gates + (long long)row * 4 * size + unit;
    const float* from_before = recurrent + (long long)row * 4 * size + unit;
    float sums[4];
    for (int k = 0; k < 4; ++k) {
        sums[k] = mine[k * size] + (bias_ih[k * size + unit] + bias_hh[k * size + unit]);
        if (!first) sums[k] += from_before[k * size];
    }
    const float i = sigmoid(sums[0]), f = sigmoid(sums[1]), g = tanhf(sums[2]);
    const float o = sigmoid(sums[3]);
    float cell = i * g;
    if (!first) cell += f * before[n];
    const float output = o * tanhf(cell);
    mine[0] = i;
    mine[size] = f;
    mine[2 * size] = g;
    mine[3 * size] = o;
    cells[n] = cell;
    hidden[n] = to_low(output);
    if (masked) dropped[n] = to_low(output * to_float(mask[n]));
}

extern "C" __global__ void cell_backward(
    const low_t* d_outputs,    // (B, H): gradient of the outputs after the mask
    const low_t* mask,         // (B, H) if `masked`: of the outputs
    const float* d_recurrent,  // (B, H): gradient of the hidden state from the step after, unless `last`
    float* d_cells,            // (B, H): gradient of the cells from the step after, unless `last`;
                               // out: that of the cells of the step before
    const float* gates,        // (B, 4H): as `cell_forward` wrote them
    const float* cells,        // (B, H)
    const float* before,       // (B, H): the cells of the step before, unless `first`
    low_t* d_gates,            // (B, 4H) out
    int count, int size, int first, int last, int masked)
{
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= count) return;
    const int row = n / size, unit = n - row * size;
    const long long place = (long long)row * 4 * size + unit;
    const float i = gates[place], f = gates[place + size], g = gates[place + 2 * size];
    const float o = gates[place + 3 * size];
    float d_hidden = to_float(d_outputs[n]);
    if (masked) d_hidden *= to_float(mask[n]);
    if (!last) d_hidden += d_recurrent[n];
    const float squashed = tanhf(cells[n]);
    float d_cell = d_hidden * o * (1.0f - squashed * squashed);
    if (!last) d_cell += d_cells[n];
    const float past = first ? 0.0f : before[n];
    d_gates[place] = to_low(d_cell * g * i * (1.0f - i));
    d_gates[place + size] = to_low(d_cell * past * f * (1.0f - f));
    d_gates[place + 2 * size] = to_low(d_cell * i * (1.0f - g * g));
    d_gates[place + 3 * size] = to_low(d_hidden * squashed * o * (1.0f - o));
    d_cells[n] = d_cell * f;
}

// One thread for every four parameters. Divides gradients, which are sums over tokens, by the number
// of tokens and clips them to a norm; updates by AdamW (Loshchilov & Hutter, 2019) with β 0.9 and
// 0.999; then updates the moving average of the parameters, and writes them in the products' dtype.
extern "C" __global__ void adamw(
    float* values,           // (P,)
    const float* gradients,  // (P,)
    float* means, float* squares,  // (P,) moving averages of the gradient and of its square
    float* average,          // (P,) if `averaged`
    low_t* low,              // (P,) out if `converted`
    const float* norm,       // the norm of all gradients
    const float* tokens,     // the number of tokens that the gradients are summed over
    const float* rate,       // the learning rate
    const float* weight,     // of the new parameters in the average, if `averaged`
    const float* steps,      // the number of steps, with this one
    int count,               // P, a multiple of 4, as is `matrices`
    int matrices,            // the number of parameters that decay, which come first
    float decay, float clip_norm, int averaged, int converted)
{
    const int n = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= count) return;
    // Written so that a norm of NaN spreads to the parameters and is noticed.
    const float excess = norm[0] / clip_norm;
    const float divisor = excess <= tokens[0] ? tokens[0] : excess;
    // 1 - β^steps, without rounding a number close to 1. The constants are log 0.9 and log 0.999.
    const float first = -expm1f(-0.105360515657826f * steps[0]);
    const float second = sqrtf(-expm1f(-0.00100050033358353f * steps[0]));
    const float step_size = rate[0] / first, kept = n < matrices ? 1.0f - rate[0] * decay : 1.0f;
    const float4 gradient = *(const float4*)(gradients + n);
    float4 value = *(float4*)(values + n), mean = *(float4*)(means + n);
    float4 square = *(float4*)(squares + n);
    const float g[4] = {gradient.x, gradient.y, gradient.z, gradient.w};
    float v[4] = {value.x, value.y, value.z, value.w}, m[4] = {mean.x, mean.y, mean.z, mean.w};
    float s[4] = {square.x, square.y, square.z, square.w};
    for (int k = 0; k < 4; ++k) {
        const float scaled = g[k] / divisor;
        m[k] += 0.1f * (scaled - m[k]);
        s[k] = 0.999f * s[k] + 0.001f * scaled * scaled;
        v[k] = kept * v[k] - step_size * m[k] / (sqrtf(s[k]) / second + 1e-8f);
    }
    value.x = v[0]; value.y = v[1]; value.z = v[2]; value.w = v[3];
    mean.x = m[0]; mean.y = m[1]; mean.z = m[2]; mean.w = m[3];
    square.x = s[0]; square.y = s[1]; square.z = s[2]; square.w = s[3];
    *(float4*)(values + n) = value;
    *(float4*)(means + n) = mean;
    *(float4*)(squares + n) = square;
    if (averaged) {
        float4 past = *(float4*)(average + n);
        past.x += weight[0] * (v[0] - past.x);
        past.y += weight[0] * (v[1] - past.y);
        past.z += weight[0] * (v[2] - past.z);
        past.w += weight[0] * (v[3] - past.w);
        *(float4*)(average + n) = past;
    }
    if (converted) store4(low + n, v);
}

// One block for each row. Writes its loss, and its gradient over the logits:
//     loss = lse - (1 - ε) logit[target] - ε mean(logits)
//     gradient = softmax - (1 - ε) [target] - ε / W
// Both are multiplied by the row's weight. One pass computes the maximum and the sum of exponentials
// (Milakov & Gimelshein, 2018, "Online normalizer calculation for softmax").
extern "C" __global__ void cross_entropy(
    low_t* logits,             // (R, padded); out: the gradient
    const long long* targets,  // (R,); rows whose target is `ignored` have no loss and no gradient
    const float* weights,      // (R,) if `weighted`
    float* losses,             // (R,) out
    int padded,                // a multiple of 4
    int words,                 // the columns after these are padding, with logits of about -10,000
    int ignored, int weighted, float smoothing)
{
    __shared__ float maxima[32], sums[32], totals[32];
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warps = blockDim.x / 32, stride = 4 * blockDim.x;
    low_t* mine = logits + (long long)row * padded;
    const int target = (int)targets[row];
    float four[4];
    if (target == ignored) {
        for (int k = 0; k < 4; ++k) four[k] = 0.0f;
        for (int n = 4 * threadIdx.x; n < padded; n += stride) store4(mine + n, four);
        if (threadIdx.x == 0) losses[row] = 0.0f;
        return;
    }
    // Read before the barrier below, after which threads overwrite the logits.
    const float target_logit = to_float(mine[target]);
    float best = -3.0e38f, sum = 0.0f, total = 0.0f;
    for (int n = 4 * threadIdx.x; n < padded; n += stride) {
        load4(mine + n, four);
        const float most = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3]));
        if (most > best) {
            sum *= exponential(best - most);
            best = most;
        }
        for (int k = 0; k < 4; ++k) {
            sum += exponential(four[k] - best);
            if (n + k < words) total += four[k];
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best, offset);
        const float other_sum = __shfl_xor_sync(0xffffffffu, sum, offset);
        total += __shfl_xor_sync(0xffffffffu, total, offset);
        const float most = fmaxf(best, other);
        sum = sum * exponential(best - most) + other_sum * exponential(other - most);
        best = most;
    }
    if (lane == 0) {
        maxima[warp] = best;
        sums[warp] = sum;
        totals[warp] = total;
    }
    __syncthreads();
    best = maxima[0];
    for (int w = 1; w < warps; ++w) best = fmaxf(best, maxima[w]);
    sum = total = 0.0f;
    for (int w = 0; w < warps; ++w) {
        sum += sums[w] * exponential(maxima[w] - best);
        total += totals[w];
    }
    const float log_sum = best + logf(sum), weight = weighted ? weights[row] : 1.0f;
    const float hit = 1.0f - smoothing, everywhere = smoothing / words;
    if (threadIdx.x == 0)
        losses[row] = weight * (log_sum - hit * target_logit - everywhere * total);
    for (int n = 4 * threadIdx.x; n < padded; n += stride) {
        load4(mine + n, four);
        for (int k = 0; k < 4; ++k) {
            float gradient = exponential(four[k] - log_sum);
            if (n + k < words) gradient -= everywhere;
            if (n + k == target) gradient -= hit;
            four[k] = weight * gradient;
        }
        store4(mine + n, four);
    }
}
