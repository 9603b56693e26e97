// Antialiased resizing of uint8 photos in integers, to the bit what torch's kernel for a CPU gives:
// first the columns, rounded to uint8, then the rows. This file is compiled at run time, without
// headers. pipeline/photos/gpu/resize.py fills the jobs and calls the kernels;
// pipeline/photos/gpu/resize_tables.py explains windows, weights and precision.
//
// A launch works on many photos of different sizes: blockIdx.z is the job. The 256 threads of a
// block are 8 rows of 32 threads. Memory is read in words of four bytes, because a third of a
// thread's pixels would start new words anyway; rows begin at multiples of four bytes.
// A window's weights are padded with zeros to a multiple of four.

struct HorizontalJob {
    const unsigned char* photo;  // RGB; bytes behind a row may be read, but count for nothing
    unsigned char* columns;      // the result: `rows` rows of `stride` bytes
    const int* first;            // of each column of the result
    const short* weights;
    int pitch;  // bytes from one row of the photo to the next
    int rows, taps, precision;
};

struct VerticalJob {
    const unsigned char* columns;
    unsigned char* view;      // size x size RGB, or null
    unsigned char* mirrored;  // the same with left and right exchanged, or null
    const int* first;         // of each row of the result
    const short* weights;
    int taps, precision;
};

static const int ROWS = 4;  // of a thread of `horizontal`, which reads the weights once for all

__device__ int rounded(int sum, int precision)
{
    const int value = sum >> precision;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

// The four bytes that begin `bits` bits behind those of `low`.
__device__ unsigned from_two_words(unsigned low, unsigned high, int bits)
{
    return (unsigned)((((unsigned long long)high << 32) | low) >> bits);
}

extern "C" __global__ void horizontal(const HorizontalJob* jobs, int size, int stride)
{
    const HorizontalJob job = jobs[blockIdx.z];
    const int x = blockIdx.x * 32 + (threadIdx.x & 31);
    const int row = (blockIdx.y * 8 + (threadIdx.x >> 5)) * ROWS;
    if (x >= size || row >= job.rows) return;
    const int padded = (job.taps + 3) & ~3;
    const short* weights = job.weights + (long long)x * padded;
    const int start = job.first[x] * 3;
    const int bits = (start & 3) * 8;
    const unsigned* words[ROWS];
    unsigned carried[ROWS];
    int sums[ROWS][3];
    for (int r = 0; r < ROWS; ++r) {
        const int present = row + r < job.rows ? row + r : job.rows - 1;
        words[r] = (const unsigned*)(job.photo + (long long)present * job.pitch + (start & ~3));
        carried[r] = *words[r];
        sums[r][0] = sums[r][1] = sums[r][2] = (1 << job.precision) >> 1;
    }
    for (int k = 0; k < padded; k += 4) {
        const uint2 four = *(const uint2*)(weights + k);
        const int a = (short)four.x, b = (int)four.x >> 16, c = (short)four.y, d = (int)four.y >> 16;
        for (int r = 0; r < ROWS; ++r) {
            const unsigned next[3] = {words[r][1], words[r][2], words[r][3]};
            const unsigned rgbr = from_two_words(carried[r], next[0], bits);
            const unsigned gbrg = from_two_words(next[0], next[1], bits);
            const unsigned brgb = from_two_words(next[1], next[2], bits);
            sums[r][0] += a * (int)(rgbr & 255) + b * (int)(rgbr >> 24)
                + c * (int)((gbrg >> 16) & 255) + d * (int)((brgb >> 8) & 255);
            sums[r][1] += a * (int)((rgbr >> 8) & 255) + b * (int)(gbrg & 255)
                + c * (int)(gbrg >> 24) + d * (int)((brgb >> 16) & 255);
            sums[r][2] += a * (int)((rgbr >> 16) & 255) + b * (int)((gbrg >> 8) & 255)
                + c * (int)(brgb & 255) + d * (int)(brgb >> 24);
            carried[r] = next[2];
            words[r] += 3;
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        if (row + r >= job.rows) return;
        unsigned char* pixel = job.columns + (long long)(row + r) * stride + x * 3;
        for (int channel = 0; channel < 3; ++channel)
            pixel[channel] = (unsigned char)rounded(sums[r][channel], job.precision);
    }
}

extern "C" __global__ void vertical(const VerticalJob* jobs, int size, int stride)
{
    const VerticalJob job = jobs[blockIdx.z];
    const int byte = (blockIdx.x * 32 + (threadIdx.x & 31)) * 4;  // the first of four of a row
    const int y = blockIdx.y * 8 + (threadIdx.x >> 5);
    if (byte >= size * 3 || y >= size) return;
    const short* weights = job.weights + (long long)y * ((job.taps + 3) & ~3);
    const unsigned char* column = job.columns + (long long)job.first[y] * stride + byte;
    int sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = (1 << job.precision) >> 1;
    for (int k = 0; k < job.taps; ++k) {
        const unsigned word = *(const unsigned*)(column + (long long)k * stride);
        const int weight = weights[k];
        for (int i = 0; i < 4; ++i) sums[i] += weight * (int)((word >> (8 * i)) & 255);
    }
    const int row = y * size * 3;
    const int count = size * 3 - byte < 4 ? size * 3 - byte : 4;
    for (int i = 0; i < 4; ++i) sums[i] = rounded(sums[i], job.precision);
    if (job.view) {
        unsigned char* out = job.view + row + byte;
        if (count == 4 && ((unsigned long long)out & 3) == 0) {
            *(unsigned*)out = (unsigned)(sums[0] | sums[1] << 8 | sums[2] << 16 | sums[3] << 24);
        } else {
            for (int i = 0; i < count; ++i) out[i] = (unsigned char)sums[i];
        }
    }
    if (job.mirrored) {
        for (int i = 0; i < count; ++i) {
            const int x = (byte + i) / 3, channel = byte + i - 3 * x;
            job.mirrored[row + (size - 1 - x) * 3 + channel] = (unsigned char)sums[i];
        }
    }
}
