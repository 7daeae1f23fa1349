/* A disk that fails on demand: preloaded, it counts what this process does to the files of one run, and at a chosen
 * count kills the process or lets the call fail. See tests/faults/disk.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN = 1, CREATE = 2, READ = 4, WRITE = 8, SYNC = 16, CLOSE = 32, NAME = 64, DELETE = 128, STATE = 256 };

static char root[PATH_MAX];
static long at, count;
static int kinds, error, lasts, notes = -1, off_limits = 1;

/* Begin to count calls of `kinds` on `folder` and what is below it. From 1, call number `number` fails by `code`, or
 * kills the process where that is 0; with `lasting` all later ones fail too. Each is noted in the file `log`. */
void disk_arm(const char *folder, int which, long number, int code, int lasting, const char *log) {
    snprintf(root, sizeof root, "%s", folder);
    kinds = which, at = number, error = code, lasts = lasting, count = 0;
    if (notes >= 0) syscall(SYS_close, notes);
    notes = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644) : -1;
    __atomic_store_n(&off_limits, 0, __ATOMIC_SEQ_CST);
}

/* Count no more; how many were counted. */
long disk_disarm(void) {
    __atomic_store_n(&off_limits, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&count, __ATOMIC_SEQ_CST);
}

static int is_ours(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (!path[length] || path[length] == '/');
}

/* 0 to go on, 1 to be killed now, else the errno by which the call fails. */
static int judge(int kind, const char *name, int folder, const char *path) {
    char whole[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (__atomic_load_n(&off_limits, __ATOMIC_SEQ_CST) || !(kinds & kind)) return 0;
    int saved = errno;
    snprintf(whole, sizeof whole, "%s", path ? path : "");
    if (!path || *path != '/') { /* of an open file, or below an open folder */
        ssize_t size;
        if (path && folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        size = readlink(link, base, sizeof base - 1);
        base[size < 0 ? 0 : size] = 0;
        if (path) snprintf(whole, sizeof whole, "%s/%s", base, path);
        else snprintf(whole, sizeof whole, "%s", base);
    }
    int outcome = 0;
    if (is_ours(whole)) {
        long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
        if (notes >= 0) {
            char line[2 * PATH_MAX + 64];
            int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, whole + strlen(root));
            syscall(SYS_write, notes, line, length);
        }
        if (at && (number == at || (lasts && number > at))) outcome = error ? error : 1;
    }
    errno = saved;
    return outcome;
}

static void killed(void) { syscall(SYS_kill, getpid(), SIGKILL); pause(); }

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define ACT(kind, name, folder, path) \
    do { \
        int outcome_ = judge(kind, name, folder, path); \
        if (outcome_ && !error) killed(); \
        if (outcome_) { errno = outcome_; return -1; } \
    } while (0)

#define OPENS(function, folder_declared, folder_used, folder_given) \
    int function(folder_declared const char *path, int flags, ...) { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        ACT(flags & O_CREAT ? CREATE : OPEN, "open", folder_used, path); \
        return (int)syscall(SYS_openat, folder_used, path, flags, mode); \
    }
#define NONE
OPENS(open, NONE, AT_FDCWD, NONE)
OPENS(open64, NONE, AT_FDCWD, NONE)
#define FOLDER int folder,
OPENS(openat, FOLDER, folder, folder)
OPENS(openat64, FOLDER, folder, folder)

ssize_t read(int file, void *to, size_t size) {
    ACT(READ, "read", file, NULL);
    REAL(ssize_t, "read", int, void *, size_t);
    return real(file, to, size);
}

ssize_t write(int file, const void *from, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int outcome = judge(WRITE, "write", file, NULL);
    if (outcome && !error) { real(file, from, size / 2); killed(); } /* torn in the middle */
    if (outcome) { errno = outcome; return -1; }
    return real(file, from, size);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    ACT(WRITE, "sendfile", to, NULL);
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    return real(to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { return sendfile(to, from, (off_t *)offset, size); }

int fsync(int file) {
    ACT(SYNC, "fsync", file, NULL);
    REAL(int, "fsync", int);
    return real(file);
}

int close(int file) { /* a network file system tells here that it could not write: the file is closed all the same */
    int outcome = judge(CLOSE, "close", file, NULL);
    if (outcome && !error) killed();
    REAL(int, "close", int);
    int result = real(file);
    if (outcome) { errno = outcome; return -1; }
    return result;
}

int rename(const char *from, const char *to) {
    ACT(NAME, "rename", AT_FDCWD, from);
    REAL(int, "rename", const char *, const char *);
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    ACT(CREATE, "mkdir", AT_FDCWD, path);
    REAL(int, "mkdir", const char *, mode_t);
    return real(path, mode);
}

int unlink(const char *path) {
    ACT(DELETE, "unlink", AT_FDCWD, path);
    REAL(int, "unlink", const char *);
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    ACT(DELETE, "unlinkat", folder, path);
    REAL(int, "unlinkat", int, const char *, int);
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    ACT(DELETE, "rmdir", AT_FDCWD, path);
    REAL(int, "rmdir", const char *);
    return real(path);
}

int chmod(const char *path, mode_t mode) {
    ACT(STATE, "chmod", AT_FDCWD, path);
    REAL(int, "chmod", const char *, mode_t);
    return real(path, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    ACT(STATE, "chmod", folder, path);
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    return real(folder, path, mode, flags);
}

int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    ACT(STATE, "utimensat", folder, path);
    REAL(int, "utimensat", int, const char *, const struct timespec *, int);
    return real(folder, path, times, flags);
}
