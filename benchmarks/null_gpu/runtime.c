/* The rest of CUDA's runtime: the card, streams, events, and launches by the names of kernels. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The card */

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION_CLAIMED, 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    memset(card, 0, sizeof *card);
    strcpy(card->name, CARD_NAME);
    card->major = CAPABILITY_MAJOR;
    card->minor = CAPABILITY_MINOR;
    card->totalGlobalMem = CARD_BYTES;
    card->multiProcessorCount = MULTIPROCESSORS;
    card->warpSize = WARP;
    card->maxThreadsPerBlock = THREADS_OF_A_BLOCK;
    card->maxThreadsPerMultiProcessor = THREADS_OF_A_MULTIPROCESSOR;
    card->maxBlocksPerMultiProcessor = 32;
    card->sharedMemPerBlock = SHARED_OF_A_BLOCK;
    card->sharedMemPerBlockOptin = SHARED_OF_A_BLOCK_AT_MOST;
    card->sharedMemPerMultiprocessor = SHARED_OF_A_MULTIPROCESSOR;
    card->regsPerBlock = card->regsPerMultiprocessor = REGISTERS;
    card->l2CacheSize = L2_BYTES;
    card->memoryBusWidth = MEMORY_BUS_BITS;
    card->textureAlignment = 512;
    card->unifiedAddressing = 1;
    card->maxGridSize[0] = GRID_X;
    card->maxGridSize[1] = card->maxGridSize[2] = GRID_YZ;
    card->maxThreadsDim[0] = card->maxThreadsDim[1] = THREADS_OF_A_BLOCK;
    card->maxThreadsDim[2] = BLOCK_Z;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = CAPABILITY_MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = CAPABILITY_MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrWarpSize: *value = WARP; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = THREADS_OF_A_BLOCK; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS_OF_A_MULTIPROCESSOR; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_OF_A_BLOCK; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OF_A_BLOCK_AT_MOST; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_OF_A_MULTIPROCESSOR; break;
    case cudaDevAttrMaxGridDimX: *value = GRID_X; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = GRID_YZ; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *name, int length, int device) {
    snprintf(name, length, "0000:00:01.0");
    return cudaSuccess;
}

/* Functions of the driver that the runtime looks up: those of driver.c, and success for others. */
static int succeed(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    static void *driver;
    if (!driver)
        driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (!*function)
        *function = (void *)succeed;
    if (result)
        *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* Errors */

static __thread cudaError_t last_error;

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "an error of the null GPU";
    }
}

const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

/* Streams and events */

static void *new_handle(void) {
    static unsigned long last = 4096;
    return (void *)__sync_add_and_fetch(&last, 16);
}

static cudaError_t waited(const char *name, const void *stream) {
    null_gpu_log("wait\t%s%s\n", name, stream ? " of a side stream" : "");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return *stream = new_handle(), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = new_handle(), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return *milliseconds = 1, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return waited("cudaStreamSynchronize", stream);
}
cudaError_t cudaDeviceSynchronize(void) { return waited("cudaDeviceSynchronize", NULL); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited("cudaEventSynchronize", NULL); }

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

/* Kernels: libraries register the names of theirs as they are loaded. */

typedef struct {
    const void *function;
    char *name;
} Kernel;

static Kernel *kernels;
static size_t kernel_count, kernel_space, sorted_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void __cudaRegisterFunction(void **module, const char *function, char *device_function,
                            const char *name, int threads, void *thread, void *block, void *block_size,
                            void *grid_size, int *warp) {
    pthread_mutex_lock(&lock);
    if (kernel_count == kernel_space) {
        kernel_space = kernel_space ? 2 * kernel_space : 65536;
        kernels = realloc(kernels, kernel_space * sizeof *kernels);
    }
    kernels[kernel_count++] = (Kernel){function, strdup(name)};
    pthread_mutex_unlock(&lock);
}

static int by_function(const void *a, const void *b) {
    const void *first = ((const Kernel *)a)->function, *second = ((const Kernel *)b)->function;
    return first < second ? -1 : first > second;
}

static const char *name_of(const void *function) {
    pthread_mutex_lock(&lock);
    if (sorted_count != kernel_count) {
        qsort(kernels, kernel_count, sizeof *kernels, by_function);
        sorted_count = kernel_count;
    }
    Kernel wanted = {function, NULL};
    Kernel *found = bsearch(&wanted, kernels, kernel_count, sizeof *kernels, by_function);
    const char *name = found ? found->name : "unknown";
    pthread_mutex_unlock(&lock);
    return name;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
    const unsigned sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
    if (null_gpu_launch(name_of(function), sizes[0], sizes[1], shared))
        return cudaSuccess;
    return last_error = cudaErrorInvalidConfiguration;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **arguments) {
    return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments,
                            config->dynamicSmemBytes, config->stream);
}

/* What `kernel<<<...>>>` compiles to. */

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    return *kernel = (void *)function, cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute kind, int value) {
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = THREADS_OF_A_BLOCK;
    found->numRegs = 64;
    found->ptxVersion = found->binaryVersion = 10 * CAPABILITY_MAJOR + CAPABILITY_MINOR;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
    return *blocks = 2, cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char symbols[1 << 20];
    return *address = symbols, cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}
