/* What subjects in C share with the suite: see `Checkpoint` of its own. They are in the directory of their trial. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

extern char **environ;

/* Writes the verdict, and ends the process at once. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...) {
    char text[400];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(text, sizeof text, format, values);
    int fd = open("verdict", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (write(fd, text, length) != length || write(2, text, length) != length)
        _exit(2);
    _exit(1);
}

/* Says what is not so. */
#define CHECK(so)                                                                                                      \
    do {                                                                                                               \
        if (!(so))                                                                                                     \
            fail("%s:%d, process %d: it is not so that %s (errno %d)\n", __FILE__, __LINE__, getpid(), #so, errno);     \
    } while (0)

/* Says that the tree may be dumped from now on. */
static inline void ready(void) { CHECK(mknod("ready", S_IFREG | 0666, 0) == 0 || errno == EEXIST); }

/* Whether it is to judge itself. */
static inline int is_go(void) { return access("go", F_OK) == 0; }

static inline void rest(long nanoseconds) {
    struct timespec time = {0, nanoseconds};
    CHECK(nanosleep(&time, NULL) == 0);
}

static inline void wait_for_go(void) {
    while (!is_go())
        rest(1000000);
}

static inline void *shared_memory(size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

static inline int pass(void) {
    int fd = open("verdict", O_WRONLY | O_CREAT | O_EXCL, 0666);
    return fd >= 0 && write(fd, "pass", 4) == 4 ? 0 : 1;
}
