/* libcuda.so.1, as far as torch and Triton call it: modules are names, launches are logged. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <dlfcn.h>
#include <string.h>

/* CUdevice_attribute and CUfunction_attribute, those that are asked for */
enum {
    MAX_THREADS_OF_A_BLOCK = 1,
    MAX_BLOCK_X = 2,
    MAX_BLOCK_Y = 3,
    MAX_BLOCK_Z = 4,
    MAX_GRID_X = 5,
    MAX_GRID_Y = 6,
    MAX_GRID_Z = 7,
    MAX_SHARED_OF_A_BLOCK = 8,
    WARP_SIZE = 10,
    MAX_REGISTERS_OF_A_BLOCK = 12,
    CLOCK_RATE = 13,
    MULTIPROCESSOR_COUNT = 16,
    MEMORY_CLOCK_RATE = 36,
    MEMORY_BUS_WIDTH = 37,
    MAX_THREADS_OF_A_MULTIPROCESSOR = 39,
    MAJOR = 75,
    MINOR = 76,
    MAX_SHARED_OF_A_MULTIPROCESSOR = 81,
    MAX_REGISTERS_OF_A_MULTIPROCESSOR = 82,
    MAX_SHARED_OF_A_BLOCK_OPTIN = 97,
    FUNCTION_MAX_THREADS = 0,
    FUNCTION_REGISTERS = 4,
};
enum { SUCCESS = 0, INVALID_VALUE = 1 };

#define SUCCEEDS(name)                                                                             \
    int name(void) { return SUCCESS; }

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuFuncLoad)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLaunchCooperativeKernel)

int cuDriverGetVersion(int *version) { return *version = CUDA_VERSION_CLAIMED, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int number) { return *device = number, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuCtxGetCurrent(void **context) { return *context = (void *)8, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)8, SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "refused", SUCCESS; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    return *active = 1, SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    return strncpy(name, CARD_NAME, length), SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case MAX_THREADS_OF_A_BLOCK:
    case MAX_BLOCK_X:
    case MAX_BLOCK_Y: *value = THREADS_OF_A_BLOCK; break;
    case MAX_BLOCK_Z: *value = BLOCK_Z; break;
    case MAX_GRID_X: *value = GRID_X; break;
    case MAX_GRID_Y:
    case MAX_GRID_Z: *value = GRID_YZ; break;
    case MAX_SHARED_OF_A_BLOCK: *value = SHARED_OF_A_BLOCK; break;
    case WARP_SIZE: *value = WARP; break;
    case MAX_REGISTERS_OF_A_BLOCK:
    case MAX_REGISTERS_OF_A_MULTIPROCESSOR: *value = REGISTERS; break;
    case CLOCK_RATE: *value = CLOCK_KHZ; break;
    case MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case MEMORY_CLOCK_RATE: *value = MEMORY_CLOCK_KHZ; break;
    case MEMORY_BUS_WIDTH: *value = MEMORY_BUS_BITS; break;
    case MAX_THREADS_OF_A_MULTIPROCESSOR: *value = THREADS_OF_A_MULTIPROCESSOR; break;
    case MAJOR: *value = CAPABILITY_MAJOR; break;
    case MINOR: *value = CAPABILITY_MINOR; break;
    case MAX_SHARED_OF_A_MULTIPROCESSOR: *value = SHARED_OF_A_MULTIPROCESSOR; break;
    case MAX_SHARED_OF_A_BLOCK_OPTIN: *value = SHARED_OF_A_BLOCK_AT_MOST; break;
    default: *value = 0;
    }
    return SUCCESS;
}

/* Triton asks where a tensor is: an address of this process is one of the device. */
int cuPointerGetAttribute(void *value, int attribute, unsigned long address) {
    return memcpy(value, &address, sizeof address), SUCCESS;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == FUNCTION_MAX_THREADS ? THREADS_OF_A_BLOCK
             : attribute == FUNCTION_REGISTERS ? 40
                                               : 0;
    return SUCCESS;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 2, SUCCESS; }
int cuOccupancyMaxActiveClusters(int *clusters) { return *clusters = 2, SUCCESS; }

/* A function is its name, which lives as long as the process. */
int cuModuleLoad(void **module) { return *module = (void *)16, SUCCESS; }
int cuModuleLoadData(void **module) { return *module = (void *)16, SUCCESS; }
int cuModuleLoadDataEx(void **module) { return *module = (void *)16, SUCCESS; }
int cuModuleGetFunction(char **function, void *module, const char *name) {
    return *function = strdup(name), SUCCESS;
}

/* libnull_gpu.so is preloaded, so that its log is found among all symbols. */
static int launch(const char *function, const unsigned grid[3], const unsigned block[3],
                  unsigned shared) {
    static int (*logged)(const char *, const unsigned[3], const unsigned[3], size_t);
    if (!logged)
        logged = (int (*)(const char *, const unsigned[3], const unsigned[3], size_t))dlsym(
            RTLD_DEFAULT, "null_gpu_launch");
    return logged(function, grid, block, shared) ? SUCCESS : INVALID_VALUE;
}

int cuLaunchKernel(const char *function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared) {
    const unsigned grid[3] = {x, y, z}, block[3] = {block_x, block_y, block_z};
    return launch(function, grid, block, shared);
}

typedef struct { /* the beginning of CUlaunchConfig */
    unsigned grid[3], block[3], shared;
} LaunchConfig;

int cuLaunchKernelEx(const LaunchConfig *config, const char *function) {
    return launch(function, config->grid, config->block, config->shared);
}
