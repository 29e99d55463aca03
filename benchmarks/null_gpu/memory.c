/* Memory and copies of CUDA's runtime on a card that is not there.
 *
 * Device memory is address space without pages behind it, so a peak of 141 GB costs a few MB. Small
 * copies are made, so that what the host reads is what was written; large ones are only logged.
 */
#include "null_gpu.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RANGES 65536
#define COPIED_AT_MOST 65536
#define RESERVED 2000000000UL /* of the card, as its context takes it */

typedef struct {
    char *start;
    size_t size;
    enum cudaMemoryType type;
} Range;

static Range ranges[RANGES];
static int range_count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int keep(void *start, size_t size, enum cudaMemoryType type) {
    pthread_mutex_lock(&lock);
    int kept = range_count < RANGES;
    if (kept)
        ranges[range_count++] = (Range){start, size, type};
    pthread_mutex_unlock(&lock);
    return kept;
}

static Range find(const void *address, int forget) {
    Range found = {0};
    pthread_mutex_lock(&lock);
    for (int i = 0; i < range_count; i++) {
        const char *start = ranges[i].start;
        if ((const char *)address >= start && (const char *)address < start + ranges[i].size) {
            found = ranges[i];
            if (forget)
                ranges[i] = ranges[--range_count];
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    if (used + size > CARD_BYTES - RESERVED) {
        null_gpu_log("full\t%zu\n", size);
        return cudaErrorMemoryAllocation;
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED || !keep(start, size, cudaMemoryTypeDevice))
        return cudaErrorMemoryAllocation;
    __sync_add_and_fetch(&used, size);
    *address = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    Range range = find(address, 1);
    if (range.start) {
        munmap(range.start, range.size);
        __sync_sub_and_fetch(&used, range.size);
    }
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    *address = calloc(1, size);
    return *address && keep(*address, size, cudaMemoryTypeHost) ? cudaSuccess
                                                                : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *address) {
    find(address, 1);
    free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
    keep(address, size, cudaMemoryTypeHost);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
    find(address, 1);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = CARD_BYTES;
    *free_bytes = CARD_BYTES - RESERVED - used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    Range range = find(address, 0);
    memset(found, 0, sizeof *found);
    found->type = range.start ? range.type : cudaMemoryTypeUnregistered;
    found->devicePointer = found->type == cudaMemoryTypeDevice ? (void *)address : NULL;
    found->hostPointer = found->type == cudaMemoryTypeHost ? (void *)address : NULL;
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t size, int kind, const char *how) {
    null_gpu_log("copy\t%s\t%d\t%zu\n", how, kind, size);
    if (size <= COPIED_AT_MOST)
        memmove(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    null_gpu_log("wait\tcudaMemcpy\n");
    return copy(to, from, size, kind, "cudaMemcpy");
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy(to, from, size, kind, stream ? "side stream" : "stream");
}

cudaError_t cudaMemset(void *to, int value, size_t size) {
    null_gpu_log("set\t%zu\n", size);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return cudaMemset(to, value, size);
}
