// Just enough of CUDA to run kernels on a CPU, one thread after the other. SOURCE is their file in
// quotes, LAUNCHES a LAUNCH(name, with_barriers) for each; tests/cuda_on_cpu.py builds a library.
// The threads of a kernel with barriers are coroutines, which take turns at every barrier. Once
// started they are switched by _setjmp and _longjmp: swapcontext makes a system call at every
// switch. The functions at the end stand in for the driver's, so that a library built from this
// file can be loaded as `libcuda.so.1`.
#undef _FORTIFY_SOURCE  // it forbids _longjmp to another stack
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
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
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim;

static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
#define __expf expf  // glibc has a function of that name

static const int MAX_THREADS = 1024;
static std::function<void()> body;
static bool in_coroutines;
static jmp_buf scheduler, paused[MAX_THREADS];
static bool started[MAX_THREADS], finished[MAX_THREADS];

static void pause_thread()
{
    const int me = threadIdx.x;
    if (!_setjmp(paused[me])) _longjmp(scheduler, 1);
    threadIdx.x = me;
}

static void all_blocks_of_one_thread()
{
    for (;;) {
        body();
        finished[threadIdx.x] = true;
        pause_thread();
    }
}

static void resume_thread(int n)
{
    threadIdx.x = n;
    if (_setjmp(scheduler)) return;
    if (started[n]) _longjmp(paused[n], 1);
    started[n] = true;
    static std::vector<std::vector<char>> stacks(MAX_THREADS);
    stacks[n].resize(65536);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[n].data();
    context.uc_stack.ss_size = stacks[n].size();
    makecontext(&context, all_blocks_of_one_thread, 0);
    setcontext(&context);
}

static void __syncthreads()
{
    if (!in_coroutines) {
        fputs("a kernel with barriers is launched as one without\n", stderr);
        abort();
    }
    pause_thread();
}

static float __shfl_xor_sync(unsigned, float value, int offset)
{
    static float offered[MAX_THREADS];
    offered[threadIdx.x] = value;
    __syncthreads();
    const float other = offered[threadIdx.x ^ offset];
    __syncthreads();
    return other;
}

static void one_block(int threads)
{
    if (!in_coroutines) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) body();
        return;
    }
    memset(finished, 0, sizeof finished);
    for (bool running = true; running;) {
        running = false;
        for (int n = 0; n < threads; ++n) {
            if (finished[n]) continue;
            resume_thread(n);
            running = running || !finished[n];
        }
    }
}

template <class... Arguments, size_t... Places>
static void run(
    void (*kernel)(Arguments...), Index blocks, int threads, void** given,
    std::index_sequence<Places...>)
{
    blockDim.x = threads;
    body = [=] { kernel(*(Arguments*)given[Places]...); };
    for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) one_block(threads);
}

template <class... Arguments>
static void run(void (*kernel)(Arguments...), Index blocks, int threads, void** given)
{
    run(kernel, blocks, threads, given, std::index_sequence_for<Arguments...>());
}

#include SOURCE

#define LAUNCH(name, with_barriers) \
    if (!strcmp(function, #name)) { \
        in_coroutines = with_barriers; \
        run(name, {(int)x, (int)y, (int)z}, threads, given); \
        return 0; \
    }

extern "C" int cuLaunchKernel(
    const char* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
    unsigned, void*, void** given, void**)
{
    LAUNCHES
    return 1;
}

extern "C" int cuModuleLoadData(void** module, const void*)
{
    static int only;
    *module = &only;
    return 0;
}

// The handle of a function is its name.
extern "C" int cuModuleGetFunction(void** function, void*, const char* name)
{
    *function = strdup(name);
    return 0;
}

#define FIND(function) if (!strcmp(name, #function)) *address = (void*)function;

// How cuda-bindings finds the others.
extern "C" int cuGetProcAddress_v2(const char* name, void** address, int, unsigned long long, void*)
{
    *address = nullptr;
    FIND(cuModuleLoadData)
    FIND(cuModuleGetFunction)
    FIND(cuLaunchKernel)
    return *address ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
