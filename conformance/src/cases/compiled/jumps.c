/* Jumps all the time: out of nested calls, out of the handler of a signal, in a thread, and after the restore to a place
 * that was noted before the dump. */
#include "checkpoint.h"

static sigjmp_buf out_of_handler;
static jmp_buf out_of_calls;
static volatile sig_atomic_t armed;
static atomic_int over;

static void on_tick(int signal) {
    if (armed)
        siglongjmp(out_of_handler, signal);
}

static int descend(int depth) {
    volatile char pad[200];
    pad[depth] = (char)depth;
    if (depth == 0) {
        if (!over)
            longjmp(out_of_calls, 7);
        return 0;
    }
    return descend(depth - 1) + pad[depth];
}

static void *jumping(void *unused) {
    jmp_buf here;
    volatile long jumps = 0;
    while (!over) {
        int value = setjmp(here);
        if (value == 0)
            longjmp(here, (int)(jumps % 1000) + 1);
        CHECK(value == jumps % 1000 + 1);
        jumps++;
    }
    CHECK(jumps > 0);
    return unused;
}

int main(void) {
    pthread_t thread;
    sigset_t tick, mask;
    CHECK(sigemptyset(&tick) == 0 && sigaddset(&tick, SIGALRM) == 0);
    /* The thread leaves the ticks to the main thread. */
    CHECK(pthread_sigmask(SIG_BLOCK, &tick, NULL) == 0);
    CHECK(pthread_create(&thread, NULL, jumping, NULL) == 0);
    CHECK(pthread_sigmask(SIG_UNBLOCK, &tick, NULL) == 0);
    struct sigaction action = {.sa_handler = on_tick};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    jmp_buf before;
    if (setjmp(before) == 0) {
        struct itimerval often = {{0, 700}, {0, 700}}, never = {{0, 0}, {0, 0}};
        CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
        for (volatile long jumps = 1; !is_go(); jumps++) {
            volatile long turns = 0;
            int by = sigsetjmp(out_of_handler, 1);
            if (by == 0) {
                armed = 1;
                for (;;)
                    turns++;
            }
            armed = 0;
            CHECK(by == SIGALRM);
            /* The handler had it blocked, and never returned. */
            CHECK(pthread_sigmask(SIG_BLOCK, NULL, &mask) == 0 && !sigismember(&mask, SIGALRM));
            int value = setjmp(out_of_calls);
            if (value == 0)
                descend(100);
            CHECK(value == 7);
            if (jumps == 50)
                ready();
        }
        CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
        longjmp(before, 1);
    }
    over = 1;
    CHECK(pthread_join(thread, NULL) == 0);
    return pass();
}
