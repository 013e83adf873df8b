/* Calls by their numbers, through syscall(2): the same ids come of them, and they reach the same processes. */
#include "checkpoint.h"
#include <linux/sched.h>

enum { KINDS = 3 };

static int parent;

static long make(int kind) {
    int tid = -1;
    switch (kind) {
    case 0:
        return syscall(SYS_fork);
    case 1: {
        long made = syscall(SYS_clone, CLONE_PARENT_SETTID | SIGCHLD, 0, &tid, 0, 0);
        CHECK(made <= 0 || made == tid);
        return made;
    }
    default: {
        int pidfd = -1;
        struct clone_args args = {
            .flags = CLONE_PIDFD | CLONE_PARENT_SETTID,
            .pidfd = (unsigned long)&pidfd,
            .parent_tid = (unsigned long)&tid,
            .exit_signal = SIGCHLD,
        };
        long made = syscall(SYS_clone3, &args, sizeof args);
        if (made > 0) {
            siginfo_t info = {};
            CHECK(made == tid);
            CHECK(syscall(SYS_waitid, P_PIDFD, pidfd, &info, WEXITED | WNOHANG, NULL) == 0);
            CHECK(close(pidfd) == 0);
        }
        return made;
    }
    }
}

/* A child of each kind that is at work until it is told to end by a signal. */
static long begin(int kind) {
    long made = make(kind);
    CHECK(made >= 0);
    if (made == 0) {
        CHECK(syscall(SYS_getppid) == parent);
        long own = syscall(SYS_getpid);
        while (syscall(SYS_getppid) == parent && syscall(SYS_gettid) == own)
            rest(1000000);
        _exit(9);
    }
    return made;
}

static void end(long child) {
    siginfo_t info = {};
    int status = 0;
    struct rlimit limit = {};
    unsigned long cpus[16];
    CHECK(syscall(SYS_kill, child, 0) == 0);
    CHECK(syscall(SYS_tgkill, child, child, 0) == 0);
    CHECK(syscall(SYS_tkill, child, 0) == 0);
    CHECK(syscall(SYS_getpgid, child) == getpgrp());
    CHECK(syscall(SYS_getsid, child) == getsid(0));
    CHECK(syscall(SYS_setpgid, child, child) == 0 && syscall(SYS_getpgid, child) == child);
    CHECK(syscall(SYS_prlimit64, child, RLIMIT_NOFILE, NULL, &limit) == 0 && limit.rlim_max > 0);
    CHECK(syscall(SYS_sched_getaffinity, child, sizeof cpus, cpus) > 0);
    CHECK(syscall(SYS_getpriority, PRIO_PROCESS, child) > 0);
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    CHECK(pidfd >= 0);
    CHECK(syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) == 0 && close(pidfd) == 0);
    CHECK(syscall(SYS_kill, child, SIGTERM) == 0);
    CHECK(syscall(SYS_waitid, P_PID, child, &info, WEXITED | WNOWAIT, NULL) == 0);
    CHECK(info.si_pid == child && info.si_code == CLD_KILLED && info.si_status == SIGTERM);
    CHECK(syscall(SYS_wait4, child, &status, 0, NULL) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
}

int main(void) {
    parent = getpid();
    long ids[5] = {getpid(), gettid(), getppid(), getpgrp(), getsid(0)}, children[KINDS];
    for (int kind = 0; kind < KINDS; kind++)
        children[kind] = begin(kind);
    ready();
    while (!is_go())
        syscall(SYS_nanosleep, &(struct timespec){0, 1000000}, NULL);
    /* Of the session and the parent nothing is known that C could hold against it but what the library says. */
    CHECK(syscall(SYS_getpid) == ids[0] && getpid() == ids[0]);
    CHECK(syscall(SYS_gettid) == ids[1] && gettid() == ids[1]);
    CHECK(syscall(SYS_getppid) == getppid() && getppid() == ids[2]);
    CHECK(syscall(SYS_getpgid, 0) == ids[3] && getpgrp() == ids[3]);
    CHECK(syscall(SYS_getsid, 0) == ids[4] && getsid(0) == ids[4]);
    for (int kind = 0; kind < KINDS; kind++)
        end(children[kind]);
    for (int kind = 0; kind < KINDS; kind++)
        end(begin(kind));
    return pass();
}
