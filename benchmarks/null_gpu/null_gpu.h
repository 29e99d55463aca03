/* What the parts of the null GPU share: the card that it claims to be, and the log of calls. */
#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stddef.h>

/* An H200 as its driver describes it; limits of grids are those of every card since 2012. */
enum {
    CAPABILITY_MAJOR = 9,
    CAPABILITY_MINOR = 0,
    MULTIPROCESSORS = 132,
    WARP = 32,
    THREADS_OF_A_BLOCK = 1024,
    THREADS_OF_A_MULTIPROCESSOR = 2048,
    REGISTERS = 65536,
    SHARED_OF_A_BLOCK = 49152,
    SHARED_OF_A_BLOCK_AT_MOST = 232448,
    SHARED_OF_A_MULTIPROCESSOR = 233472,
    L2_BYTES = 62914560,
    MEMORY_BUS_BITS = 6144,
    CLOCK_KHZ = 1980000,
    MEMORY_CLOCK_KHZ = 3201000,
    GRID_X = 2147483647,
    GRID_YZ = 65535,
    BLOCK_Z = 64,
    CUDA_VERSION_CLAIMED = 13000,
};
#define CARD_NAME "NVIDIA H200"
#define CARD_BYTES 150754820096UL

/* Append a line to the file named by NULL_GPU_LOG; does nothing without it. */
void null_gpu_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Log a launch; return 0 if a card would refuse its grid or its block. */
int null_gpu_launch(const char *kernel, const unsigned grid[3], const unsigned block[3],
                    size_t shared);

#endif
