/* Contexts of ucontext.h that take turns in several threads, and one that was left before the dump and is entered again
 * after the restore. */
#include "checkpoint.h"

enum { THREADS = 3, CONTEXTS = 4, STACK = 64 * 1024 };

struct turns {
    ucontext_t main, contexts[CONTEXTS];
    long done[CONTEXTS];
    int number;
};

static atomic_int over;
static atomic_long all_turns;

static void work(unsigned high, unsigned low, int own) {
    struct turns *turns = (struct turns *)((unsigned long)high << 32 | low);
    int pattern[256];
    for (int n = 0; n < 256; n++)
        pattern[n] = n * 7 + own * 1000 + turns->number * 100000;
    double sum = 0;
    for (long turn = 1;; turn++) {
        sum += 1.0 / own;
        CHECK(swapcontext(&turns->contexts[own - 1], &turns->main) == 0);
        for (int n = 0; n < 256; n++)
            CHECK(pattern[n] == n * 7 + own * 1000 + turns->number * 100000);
        double expected = 0;
        for (long n = 0; n < turn % 100; n++)
            expected += 1.0 / own;
        if (turn % 100 == 0)
            sum = 0;
        else
            CHECK(sum == expected);
        turns->done[own - 1]++;
        all_turns++;
    }
}

static void *take_turns(void *number) {
    struct turns turns = {.number = (int)(long)number};
    unsigned long address = (unsigned long)&turns;
    for (int n = 0; n < CONTEXTS; n++) {
        CHECK(getcontext(&turns.contexts[n]) == 0);
        turns.contexts[n].uc_stack.ss_sp = malloc(STACK);
        turns.contexts[n].uc_stack.ss_size = STACK;
        makecontext(&turns.contexts[n], (void (*)(void))work, 3, (unsigned)(address >> 32), (unsigned)address, n + 1);
        CHECK(swapcontext(&turns.main, &turns.contexts[n]) == 0);
    }
    long rounds = 0;
    for (; !over; rounds++)
        /* All but the last, which waits for the end. */
        for (int n = 0; n < CONTEXTS - 1; n++)
            CHECK(swapcontext(&turns.main, &turns.contexts[n]) == 0);
    CHECK(swapcontext(&turns.main, &turns.contexts[CONTEXTS - 1]) == 0);
    for (int n = 0; n < CONTEXTS - 1; n++)
        CHECK(turns.done[n] == rounds);
    CHECK(turns.done[CONTEXTS - 1] == 1);
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    for (long n = 0; n < THREADS; n++)
        CHECK(pthread_create(&threads[n], NULL, take_turns, (void *)n) == 0);
    while (all_turns < 1000)
        rest(1000000);
    ready();
    wait_for_go();
    long before = all_turns;
    while (all_turns < before + 1000)
        rest(1000000);
    over = 1;
    for (int n = 0; n < THREADS; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);
    return pass();
}
