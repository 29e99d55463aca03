/* The log of the null GPU: one line for each call, fields separated by tabs. */
#include "null_gpu.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *file;
static pthread_once_t opened = PTHREAD_ONCE_INIT;

static void open_log(void) {
    const char *path = getenv("NULL_GPU_LOG");
    if (path)
        file = fopen(path, "a");
}

void null_gpu_log(const char *format, ...) {
    pthread_once(&opened, open_log);
    if (!file)
        return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments); /* locks the file, so lines stay whole */
    va_end(arguments);
}

/* Called by the benchmark before it reads the log. */
void null_gpu_flush(void) {
    if (file)
        fflush(file);
}

int null_gpu_launch(const char *kernel, const unsigned grid[3], const unsigned block[3],
                    size_t shared) {
    int fits = grid[0] && grid[1] && grid[2] && grid[0] <= GRID_X && grid[1] <= GRID_YZ &&
               grid[2] <= GRID_YZ && block[2] <= BLOCK_Z &&
               (unsigned long)block[0] * block[1] * block[2] <= THREADS_OF_A_BLOCK &&
               shared <= SHARED_OF_A_BLOCK_AT_MOST;
    null_gpu_log("%s\t%s\t%u\t%u\t%u\n", fits ? "kernel" : "refused", kernel, grid[0], grid[1],
                 grid[2]);
    return fits;
}
