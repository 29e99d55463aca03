/* Strikes exactly one of the calls that change files below a folder; preloaded by LD_PRELOAD.
 *
 * Calls are counted over all threads and processes in a shared file, named by FAULTS_STATE or given
 * to faults_arm(). The N-th of them kills the process group, fails, or is cut short. With a shadow
 * folder, everything that is flushed by fsync is copied there, as a power cut would leave it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL, SHORTEN };
enum { NOTHING, STRUCK_FAIL, STRUCK_SHORT };

struct state {
    char root[4096], shadow[4096], log[4096];
    long count, target;
    int mode, error, from_there_on, struck;
};

static struct state *state;

int faults_arm(const char *path) {
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return errno;
    void *map = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (map == MAP_FAILED) return errno;
    state = map;
    return 0;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULTS_STATE");
    if (path && *path) faults_arm(path);
}

/* Write the absolute path of a name relative to a directory; return whether it is below the root. */
static int below(int dir, const char *name, char *path) {
    if (!state || !name) return 0;
    if (name[0] == '/') {
        snprintf(path, 4096, "%s", name);
    } else {
        char link[64], base[3000];
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
        if (n < 0) return 0;
        base[n] = 0;
        snprintf(path, 4096, *name ? "%s/%.1000s" : "%s", base, name);
    }
    size_t size = strlen(state->root);
    return !strncmp(path, state->root, size) && (path[size] == '/' || path[size] == 0);
}

static void note(long number, const char *call, const char *path) {
    if (!state->log[0]) return;
    int fd = syscall(SYS_openat, AT_FDCWD, state->log, O_WRONLY | O_APPEND | O_CREAT, 0644);
    char line[4300];
    int n = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, call, path);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, n);
        syscall(SYS_close, fd);
    }
}

/* Count a call, and say what is to become of it; one that is to kill does not return. */
static int strike_call(const char *call, const char *path, int is_write, int needs_room) {
    if (state->mode == SHORTEN && !is_write) return NOTHING;
    long number = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    int later = state->from_there_on && state->target && number > state->target;
    if (number != state->target && !later) {
        if (state->mode == COUNT) note(number, call, path);
        return NOTHING;
    }
    state->struck = 1;
    note(number, call, path);
    if (state->mode == KILL) {
        syscall(SYS_kill, 0, SIGKILL);
        for (;;) pause();
    }
    if (state->mode == SHORTEN) return STRUCK_SHORT;
    if (later && !(is_write ? needs_room : !strcmp(call, "create") || !strcmp(call, "mkdir")))
        return NOTHING; /* what takes no room works on a full disk */
    errno = state->error;
    return STRUCK_FAIL;
}

static int strike(const char *call, const char *path, int is_write) {
    return strike_call(call, path, is_write, 1);
}

static void copy_file(const char *from, const char *to) {
    int in = syscall(SYS_openat, AT_FDCWD, from, O_RDONLY | O_CLOEXEC, 0);
    int out = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    char block[65536];
    ssize_t n;
    while (in >= 0 && out >= 0 && (n = syscall(SYS_read, in, block, sizeof block)) > 0)
        syscall(SYS_write, out, block, n);
    if (in >= 0) syscall(SYS_close, in);
    if (out >= 0) syscall(SYS_close, out);
}

/* Keep what fsync has flushed: the content of a file, or the names in a folder. */
static void keep_flushed(int fd, const char *path) {
    struct stat found;
    if (!state->shadow[0] || fstat(fd, &found)) return;
    char target[4300];
    if (S_ISDIR(found.st_mode)) {
        snprintf(target, sizeof target, "%s/%ld.dir", state->shadow, (long)found.st_ino);
        int out = syscall(SYS_openat, AT_FDCWD, target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        DIR *folder = opendir(path);
        struct dirent *entry;
        while (folder && (entry = readdir(folder)))
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) {
                char line[600];
                int n = snprintf(line, sizeof line, "%d %ld %s\n", entry->d_type == DT_DIR,
                                 (long)entry->d_ino, entry->d_name);
                syscall(SYS_write, out, line, n);
            }
        if (folder) closedir(folder);
        syscall(SYS_close, out);
        /* Held open for ever, so that its number is not given to another folder. */
        syscall(SYS_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC, 0);
        return;
    }
    snprintf(target, sizeof target, "%s/%ld", state->shadow, (long)found.st_ino);
    copy_file(path, target);
    strcat(target, ".held"); /* so that its number is not given to another file */
    syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, target, 0);
}

static int open_any(int dir, const char *name, int flags, mode_t mode) {
    char path[4096];
    struct stat found;
    if ((flags & (O_CREAT | O_TRUNC)) && below(dir, name, path)) {
        int there = !syscall(SYS_newfstatat, dir, name, &found, 0);
        if ((!there || (flags & O_TRUNC)) && strike("create", path, 0)) return -1;
    }
    return syscall(SYS_openat, dir, name, flags, mode);
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *name, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, name, flags, mode); }
int openat(int dir, const char *name, int flags, ...) { MODE(flags, mode) return open_any(dir, name, flags, mode); }
int openat64(int dir, const char *name, int flags, ...) { MODE(flags, mode) return open_any(dir, name, flags, mode); }
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int write_fault(int fd, size_t *size) {
    char path[4096];
    if (*size == 0 || !below(fd, "", path) || (state->mode == SHORTEN && *size < 2)) return 0;
    struct stat found;
    int flags = syscall(SYS_fcntl, fd, F_GETFL);
    off_t at = syscall(SYS_lseek, fd, 0, SEEK_CUR);
    int needs_room = 1; /* unless it fits into the blocks that the file has */
    if (!fstat(fd, &found) && at >= 0)
        needs_room = (flags & O_APPEND ? found.st_size : at) + (off_t)*size > found.st_blocks * 512;
    int fault = strike_call("write", path, 1, needs_room);
    if (fault == STRUCK_SHORT) *size /= 2;
    return fault == STRUCK_FAIL;
}

ssize_t write(int fd, const void *data, size_t size) {
    return write_fault(fd, &size) ? -1 : syscall(SYS_write, fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return write_fault(fd, &size) ? -1 : syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return write_fault(fd, &size) ? -1 : syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    size_t size = 1;
    return write_fault(fd, &size) ? -1 : syscall(SYS_writev, fd, parts, count);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    return write_fault(out, &size) ? -1 : syscall(SYS_sendfile, out, in, at, size);
}
ssize_t sendfile64(int out, int in, off_t *at, size_t size) {
    return write_fault(out, &size) ? -1 : syscall(SYS_sendfile, out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return write_fault(out, &size) ? -1 : syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

static int named(const char *call, int dir, const char *name) {
    char path[4096];
    return below(dir, name, path) && strike(call, path, 0);
}

int mkdir(const char *name, mode_t mode) {
    return named("mkdir", AT_FDCWD, name) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, name, mode);
}
int mkdirat(int dir, const char *name, mode_t mode) {
    return named("mkdir", dir, name) ? -1 : syscall(SYS_mkdirat, dir, name, mode);
}
int rmdir(const char *name) {
    return named("rmdir", AT_FDCWD, name) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
}
int unlink(const char *name) {
    return named("unlink", AT_FDCWD, name) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, name, 0);
}
int unlinkat(int dir, const char *name, int flags) {
    return named("unlink", dir, name) ? -1 : syscall(SYS_unlinkat, dir, name, flags);
}
int rename(const char *from, const char *to) {
    return named("rename", AT_FDCWD, to) ? -1 : syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int renameat(int fd, const char *from, int td, const char *to) {
    return named("rename", td, to) ? -1 : syscall(SYS_renameat2, fd, from, td, to, 0);
}
int link(const char *from, const char *to) {
    return named("link", AT_FDCWD, to) ? -1 : syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int linkat(int fd, const char *from, int td, const char *to, int flags) {
    return named("link", td, to) ? -1 : syscall(SYS_linkat, fd, from, td, to, flags);
}
int ftruncate(int fd, off_t size) {
    return named("truncate", fd, "") ? -1 : syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off64_t size) {
    return named("truncate", fd, "") ? -1 : syscall(SYS_ftruncate, fd, size);
}
int fsync(int fd) {
    char path[4096];
    if (!below(fd, "", path)) return syscall(SYS_fsync, fd);
    if (strike("fsync", path, 0)) return -1;
    keep_flushed(fd, path);
    return 0; /* the disk itself need not be waited for */
}
int fdatasync(int fd) { return fsync(fd); }
/* A disk that cannot read files whose names end as FAULTS_READ says, from its N-th such call on:
 * "N:ENDING". */
static int read_fault(int fd) {
    const char *told = getenv("FAULTS_READ");
    static long reads;
    if (!told || !*told) return 0;
    char link[64], path[4096], *ending;
    long first = strtol(told, &ending, 10);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    size_t size = strlen(++ending);
    if (n < (ssize_t)size || strncmp(path + n - size, ending, size)) return 0;
    if (__atomic_add_fetch(&reads, 1, __ATOMIC_SEQ_CST) < first) return 0;
    errno = EIO;
    return 1;
}
ssize_t pread(int fd, void *data, size_t size, off_t at) {
    return read_fault(fd) ? -1 : syscall(SYS_pread64, fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off_t at) {
    return read_fault(fd) ? -1 : syscall(SYS_pread64, fd, data, size, at);
}
/* A file system without locks, where FAULTS_FLOCK has its error. */
int flock(int fd, int operation) {
    const char *error = getenv("FAULTS_FLOCK");
    if (error && *error) {
        errno = atoi(error);
        return -1;
    }
    return syscall(SYS_flock, fd, operation);
}
