/* Sums in parallel, in every way that OpenMP has threads share work, again and again: each is known. Run by two processes,
 * whose threads wait for each other by spinning, and by sleeping. */
#include "checkpoint.h"
#include <omp.h>

enum { N = 20000 };

static long parallel_sum(void) {
    long sum = 0;
#pragma omp parallel for schedule(dynamic, 100) reduction(+ : sum)
    for (long n = 0; n < N; n++)
        sum += n;
    return sum;
}

static long tasks(long from, long to) {
    if (to - from < 500) {
        long sum = 0;
        for (long n = from; n < to; n++)
            sum += n;
        return sum;
    }
    long left, right, middle = (from + to) / 2;
#pragma omp task shared(left)
    left = tasks(from, middle);
#pragma omp task shared(right)
    right = tasks(middle, to);
#pragma omp taskwait
    return left + right;
}

/* Each thread adds in its turn, with barriers between, and under a lock. */
static long in_turns(void) {
    long sum = 0, locked = 0, present = 0;
#pragma omp parallel
    {
#pragma omp single
        present = omp_get_num_threads();
        for (int turn = 0; turn < 3; turn++) {
#pragma omp critical
            locked++;
#pragma omp barrier
#pragma omp single
            sum += locked;
        }
    }
    CHECK(locked == 3 * present && present >= 2);
    return sum - present * 6;
}

static int compute(int number) {
    char path[32];
    snprintf(path, sizeof path, "begun-%d", number);
    for (long rounds = 1; !is_go(); rounds++) {
        long expected = (long)N * (N - 1) / 2, found = 0;
        CHECK(parallel_sum() == expected);
#pragma omp parallel
#pragma omp single
        found = tasks(0, N);
        CHECK(found == expected);
        CHECK(in_turns() == 0);
        if (rounds == 3)
            CHECK(mkdir(path, 0777) == 0);
    }
    return 0;
}

int main(int count, char **arguments) {
    pid_t children[2];
    if (count > 1)
        return compute(atoi(arguments[1]));
    for (int number = 0; number < 2; number++) {
        children[number] = fork();
        if (children[number] == 0) {
            CHECK(setenv("OMP_NUM_THREADS", number == 0 ? "2" : "3", 1) == 0);
            CHECK(setenv("OMP_WAIT_POLICY", number == 0 ? "active" : "passive", 1) == 0);
            execl("./subject", "subject", number == 0 ? "0" : "1", NULL);
            _exit(99);
        }
    }
    while (access("begun-0", F_OK) != 0 || access("begun-1", F_OK) != 0)
        rest(1000000);
    ready();
    wait_for_go();
    for (int number = 0; number < 2; number++) {
        int status;
        CHECK(waitpid(children[number], &status, 0) == children[number] && status == 0);
    }
    return pass();
}
