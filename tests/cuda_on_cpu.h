// Just enough of CUDA to run train/step/cuda/kernels.cu on a CPU, thread after thread: the threads of a block
// take turns at every barrier, as coroutines. Stands in for the driver's cuLaunchKernel.
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <utility>
#include <vector>

#define __device__ static
#define __global__
#define __shared__ static  // one block runs at a time

struct uint2 { unsigned x, y; };
struct float4 { float x, y, z, w; };
struct Index { int x; };
static Index threadIdx, blockIdx, blockDim;

static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
#define __expf expf  // glibc has a function of that name

static ucontext_t scheduler;
static std::vector<ucontext_t> coroutines;
static std::vector<char> finished;
static std::function<void()> body;

static void __syncthreads()
{
    const int me = threadIdx.x;
    swapcontext(&coroutines[me], &scheduler);
    threadIdx.x = me;
}

static float __shfl_xor_sync(unsigned, float value, int offset)
{
    static float offered[1024];
    offered[threadIdx.x] = value;
    __syncthreads();
    const float other = offered[threadIdx.x ^ offset];
    __syncthreads();
    return other;
}

static void one_thread()
{
    body();
    finished[threadIdx.x] = 1;
}

static void one_block(int threads)
{
    static std::vector<std::vector<char>> stacks(1024, std::vector<char>(65536));
    coroutines.assign(threads, ucontext_t());
    finished.assign(threads, 0);
    for (int n = 0; n < threads; ++n) {
        getcontext(&coroutines[n]);
        coroutines[n].uc_stack.ss_sp = stacks[n].data();
        coroutines[n].uc_stack.ss_size = stacks[n].size();
        coroutines[n].uc_link = &scheduler;
        makecontext(&coroutines[n], one_thread, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (int n = 0; n < threads; ++n) {
            if (finished[n]) continue;
            threadIdx.x = n;
            swapcontext(&scheduler, &coroutines[n]);
            running = running || !finished[n];
        }
    }
}

template <class... Arguments, size_t... Places>
static void run(
    void (*kernel)(Arguments...), int blocks, int threads, void** given,
    std::index_sequence<Places...>)
{
    blockDim.x = threads;
    body = [=] { kernel(*(Arguments*)given[Places]...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) one_block(threads);
}

template <class... Arguments>
static void run(void (*kernel)(Arguments...), int blocks, int threads, void** given)
{
    run(kernel, blocks, threads, given, std::index_sequence_for<Arguments...>());
}

#include "kernels.cu"

#define LAUNCH(name) if (!strcmp(function, #name)) { run(name, blocks, threads, given); return 0; }

extern "C" int cuLaunchKernel(
    const char* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
    unsigned, void*, void** given, void**)
{
    LAUNCH(gather_words)
    LAUNCH(read_inputs)
    LAUNCH(cell_forward)
    LAUNCH(cell_backward)
    LAUNCH(cross_entropy)
    LAUNCH(adamw)
    return 1;
}

extern "C" int cuGetErrorString(int, const char** text)
{
    *text = "no such kernel";
    return 0;
}
