/* Threads are cancelled all the time: some of them wherever they are, some in calls that wait, some after they have put it
 * off. Each gives what it has to give back. */
#include "checkpoint.h"

enum { WAYS = 7 };

static sem_t begun, never;
static int pipes[2];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_key_t key;
static atomic_long given_back, destroyed;
static atomic_int put_off;

static void give_back(void *count) { ++*(atomic_long *)count; }
static void unlock(void *mutex) { CHECK(pthread_mutex_unlock(mutex) == 0); }
static void destroy(void *value) {
    CHECK(value == &key);
    destroyed++;
}

static void begin(void) { CHECK(sem_post(&begun) == 0); }

static void *cancelled(void *way) {
    char byte;
    volatile long turns = 0;
    CHECK(pthread_setspecific(key, &key) == 0);
    pthread_cleanup_push(give_back, &given_back);
    switch ((long)way) {
    case 0:
        CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
        begin();
        for (;;)
            turns++;
    case 1:
        begin();
        CHECK(read(pipes[0], &byte, 1) == 1);
        break;
    case 2:
        begin();
        for (;;)
            rest(900000000);
    case 3:
        begin();
        for (;;)
            CHECK(sem_wait(&never) == 0);
    case 4:
        CHECK(pthread_mutex_lock(&mutex) == 0);
        pthread_cleanup_push(unlock, &mutex);
        begin();
        for (;;)
            CHECK(pthread_cond_wait(&condition, &mutex) == 0);
        pthread_cleanup_pop(0);
    case 5:
        CHECK(pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL) == 0);
        begin();
        while (!put_off)
            sched_yield();
        rest(1000000);
        CHECK(pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL) == 0);
        pthread_testcancel();
        break;
    case 6: {
        struct pollfd fd = {pipes[0], POLLIN, 0};
        begin();
        poll(&fd, 1, -1);
        break;
    }
    }
    pthread_cleanup_pop(0);
    fail("a thread was not cancelled, in way %ld\n", (long)way);
}

int main(void) {
    CHECK(sem_init(&begun, 0, 0) == 0 && sem_init(&never, 0, 0) == 0 && pipe(pipes) == 0);
    CHECK(pthread_key_create(&key, destroy) == 0);
    long all = 0;
    for (int rounds = 0; !is_go(); rounds++) {
        pthread_t threads[WAYS];
        put_off = 0;
        for (long way = 0; way < WAYS; way++)
            CHECK(pthread_create(&threads[way], NULL, cancelled, (void *)way) == 0);
        for (int n = 0; n < WAYS; n++)
            CHECK(sem_wait(&begun) == 0);
        if (rounds == 10)
            ready();
        for (int n = 0; n < WAYS; n++)
            CHECK(pthread_cancel(threads[n]) == 0);
        put_off = 1;
        for (int n = 0; n < WAYS; n++) {
            void *result = NULL;
            CHECK(pthread_join(threads[n], &result) == 0 && result == PTHREAD_CANCELED);
        }
        all += WAYS;
        CHECK(given_back == all && destroyed == all);
    }
    return pass();
}
