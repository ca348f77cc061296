/* Counts the operations that change files below a folder, and kills the process at one of them.
 *
 * Preloaded into a process, it takes the place of the C library's functions. `mlfs_stop_at(n, folder)` begins to count;
 * at operation n (from 1) the process gets SIGKILL: before the operation, or, if it writes more than one byte, after half
 * of it. n = 0 only counts. fsync is not counted: it changes nothing that a later process sees. The count is in memory
 * that a forked child shares with its parent.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter;  /* shared with forked children */
static long stop_at;
static char folder[PATH_MAX];
static size_t folder_length;

__attribute__((constructor)) static void begin(void) {
  counter = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void mlfs_stop_at(long n, const char *path) {
  *counter = 0;
  stop_at = n;
  snprintf(folder, sizeof folder, "%s", path);
  folder_length = strlen(folder);
}

long mlfs_count(void) { return *counter; }

static int below(const char *path) {
  return folder_length && !strncmp(path, folder, folder_length) &&
         (path[folder_length] == '/' || path[folder_length] == 0);
}

static int path_below(int dirfd, const char *path) {
  char link[64], full[2 * PATH_MAX];
  ssize_t n;
  if (!folder_length || !path) return 0;
  if (path[0] == '/') return below(path);
  if (dirfd == AT_FDCWD) {
    if (!getcwd(full, PATH_MAX)) return 0;
    n = (ssize_t)strlen(full);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    if ((n = readlink(link, full, PATH_MAX - 1)) < 0) return 0;
  }
  snprintf(full + n, sizeof full - (size_t)n, "/%s", path);
  return below(full);
}

static int fd_below(int fd) {
  char link[64], full[PATH_MAX];
  ssize_t n;
  if (!folder_length) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if ((n = readlink(link, full, sizeof full - 1)) < 0) return 0;
  full[n] = 0;
  return below(full);
}

/* Whether the process ends at this operation. */
static int ends(void) { return __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST) == stop_at; }

static void stop(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PATH_OPERATION(name, parameters, arguments, condition) \
  int name parameters {                                        \
    if ((condition) && ends()) stop();                         \
    return REAL(name) arguments;                               \
  }

PATH_OPERATION(mkdir, (const char *path, mode_t mode), (path, mode), path_below(AT_FDCWD, path))
PATH_OPERATION(mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), path_below(fd, path))
PATH_OPERATION(rmdir, (const char *path), (path), path_below(AT_FDCWD, path))
PATH_OPERATION(unlink, (const char *path), (path), path_below(AT_FDCWD, path))
PATH_OPERATION(unlinkat, (int fd, const char *path, int flags), (fd, path, flags), path_below(fd, path))
PATH_OPERATION(rename, (const char *from, const char *to), (from, to), path_below(AT_FDCWD, to))
PATH_OPERATION(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), path_below(b, to))
PATH_OPERATION(chmod, (const char *path, mode_t mode), (path, mode), path_below(AT_FDCWD, path))
PATH_OPERATION(fchmod, (int fd, mode_t mode), (fd, mode), fd_below(fd))
PATH_OPERATION(ftruncate, (int fd, off_t length), (fd, length), fd_below(fd))
PATH_OPERATION(ftruncate64, (int fd, off64_t length), (fd, length), fd_below(fd))

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define OPENS(name)                                            \
  int name(const char *path, int flags, ...) {                 \
    va_list list;                                              \
    va_start(list, flags);                                     \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                              \
    if (CHANGES(flags) && path_below(AT_FDCWD, path) && ends()) stop(); \
    return REAL(name)(path, flags, mode);                      \
  }
#define OPENS_AT(name)                                         \
  int name(int fd, const char *path, int flags, ...) {         \
    va_list list;                                              \
    va_start(list, flags);                                     \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                              \
    if (CHANGES(flags) && path_below(fd, path) && ends()) stop(); \
    return REAL(name)(fd, path, flags, mode);                  \
  }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define FOPENS(name)                                           \
  FILE *name(const char *path, const char *how) {              \
    if (strpbrk(how, "wa+") && path_below(AT_FDCWD, path) && ends()) stop(); \
    return REAL(name)(path, how);                              \
  }
FOPENS(fopen)
FOPENS(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
  if (fd_below(fd) && ends()) {
    if (size > 1 && REAL(write)(fd, data, size / 2) < 0) stop();
    stop();
  }
  return REAL(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (fd_below(fd) && ends()) {
    if (count && parts[0].iov_len > 1 && REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2) < 0) stop();
    stop();
  }
  return REAL(writev)(fd, parts, count);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  if (fd_below(to) && ends()) stop();
  return REAL(sendfile)(to, from, offset, size);
}
