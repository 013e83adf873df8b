/* Every signal that a program may catch has a handler, and another process sends them all the time. None is lost, none comes
 * twice, those of real time come in order and with what was sent along. */
#include "checkpoint.h"

/* Of one signal that are on their way at most. */
enum { IN_FLIGHT = 8 };

static struct {
    atomic_long sent[65], caught[65];
    atomic_int over;
} *counts;
static int sender;

static int may_be_caught(int signal) {
    return signal != SIGKILL && signal != SIGSTOP && (signal < 32 || signal >= SIGRTMIN);
}

static void on_signal(int signal, siginfo_t *info, void *context) {
    int saved = errno;
    (void)context;
    if (info->si_pid != sender)
        fail("signal %d comes from process %d, and not from %d\n", signal, info->si_pid, sender);
    long number = counts->caught[signal]++;
    if (signal >= SIGRTMIN && (info->si_code != SI_QUEUE || info->si_value.sival_int != number))
        fail("signal %d: number %d came, %ld was expected\n", signal, info->si_value.sival_int, number);
    errno = saved;
}

static int send(int to) {
    while (!counts->over)
        for (int signal = 1; signal <= SIGRTMAX; signal++) {
            if (!may_be_caught(signal))
                continue;
            /* There is one of each at most of those below; stops and continuations take each other away. */
            int most = signal >= SIGRTMIN ? IN_FLIGHT : 1;
            if (signal == SIGCONT || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU) {
                for (int other = SIGCONT; other <= SIGTTOU; other++)
                    while (other != SIGSTOP && counts->caught[other] < counts->sent[other])
                        sched_yield();
            }
            while (counts->sent[signal] - counts->caught[signal] < most) {
                union sigval value = {.sival_int = (int)counts->sent[signal]++};
                if (signal >= SIGRTMIN)
                    CHECK(sigqueue(to, signal, value) == 0);
                else
                    CHECK(kill(to, signal) == 0);
            }
        }
    return 0;
}

int main(void) {
    counts = shared_memory(sizeof *counts);
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    int parent = getpid();
    sigset_t all, none;
    /* Handlers do not run within each other, and none before the sender is known. */
    CHECK(sigfillset(&action.sa_mask) == 0 && sigfillset(&all) == 0 && sigprocmask(SIG_BLOCK, &all, &none) == 0);
    int caught = 0;
    for (int signal = 1; signal <= SIGRTMAX; signal++)
        if (may_be_caught(signal)) {
            CHECK(sigaction(signal, &action, NULL) == 0);
            caught++;
        }
    CHECK(caught == 60);
    sender = fork();
    CHECK(sender >= 0);
    if (sender == 0)
        _exit(send(parent));
    CHECK(sigprocmask(SIG_SETMASK, &none, NULL) == 0);
    while (counts->caught[SIGRTMAX] < 100)
        sched_yield();
    ready();
    volatile long work = 0;
    while (!is_go())
        for (int n = 0; n < 1000; n++)
            work += n;
    long before = counts->caught[SIGRTMAX];
    while (counts->caught[SIGRTMAX] < before + 100)
        sched_yield();
    /* Its end is one more SIGCHLD. */
    struct sigaction ignored = {.sa_handler = SIG_DFL};
    counts->over = 1;
    int status = 0, ended;
    siginfo_t info;
    do
        ended = waitid(P_PID, sender, &info, WEXITED | WNOWAIT);
    while (ended < 0 && errno == EINTR);
    for (int signal = 1; signal <= SIGRTMAX; signal++) {
        long late = signal == SIGCHLD;
        for (int tries = 0; tries < 10000 && counts->caught[signal] < counts->sent[signal]; tries++)
            sched_yield();
        if (counts->caught[signal] < counts->sent[signal] || counts->caught[signal] > counts->sent[signal] + late)
            fail("signal %d: %ld were sent, %ld came\n", signal, counts->sent[signal], counts->caught[signal]);
    }
    CHECK(sigaction(SIGCHLD, &ignored, NULL) == 0);
    CHECK(waitpid(sender, &status, 0) == sender && status == 0);
    return pass();
}
