/* Threads at work in user code, inside libc, with its locks held, and in calls that wait. Each counts in `counts`, and looks
 * at every result: no call is interrupted, no time is short, and who waits for another is woken. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, TIMEOUT = 3, LAST = 999999999 };

static atomic_long *counts;
static atomic_int over;
static int used;

#define CHECK(so)                                                                                                      \
    do {                                                                                                               \
        if (!(so)) {                                                                                                   \
            printf("line %d: it is not so that %s (errno %d)\n", __LINE__, #so, errno);                                \
            fflush(stdout);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static struct timespec later(clockid_t clock) {
    struct timespec time;
    CHECK(clock_gettime(clock, &time) == 0);
    time.tv_nsec += TIMEOUT * 1000000;
    time.tv_sec += time.tv_nsec / 1000000000;
    time.tv_nsec %= 1000000000;
    return time;
}

static int is_past(clockid_t clock, struct timespec time) {
    struct timespec now;
    CHECK(clock_gettime(clock, &now) == 0);
    return now.tv_sec > time.tv_sec || (now.tv_sec == time.tv_sec && now.tv_nsec >= time.tv_nsec);
}

static const struct timespec timeout = {0, TIMEOUT * 1000000};

static void use_malloc(void) {
    void *blocks[50];
    for (int n = 0; n < 50; n++)
        CHECK((blocks[n] = memset(malloc(n * 97 + 1), n, n * 97 + 1)) != NULL);
    for (int n = 0; n < 50; n++) {
        CHECK(*(unsigned char *)blocks[n] == n);
        free(blocks[n]);
    }
}

static void use_stdio(void) {
    static FILE *nowhere;
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    CHECK(pthread_mutex_lock(&once) == 0);
    if (nowhere == NULL)
        CHECK((nowhere = fopen("/dev/null", "w")) != NULL);
    CHECK(pthread_mutex_unlock(&once) == 0);
    for (int n = 0; n < 50; n++)
        CHECK(fprintf(nowhere, "%d %s\n", n + 1000, "words") == 11);
}

static void compute(void) {
    double sum = 0;
    for (int n = 1; n < 3000; n++)
        sum += 1.0 / n;
    static _Thread_local double first;
    if (first == 0)
        first = sum;
    CHECK(sum == first);
}

static void use_nanosleep(void) {
    struct timespec end = later(CLOCK_MONOTONIC);
    CHECK(nanosleep(&timeout, NULL) == 0 && is_past(CLOCK_MONOTONIC, end));
}

static void use_nanosleep_with_rest(void) {
    struct timespec rest, end = later(CLOCK_MONOTONIC);
    CHECK(nanosleep(&timeout, &rest) == 0 && is_past(CLOCK_MONOTONIC, end));
}

static void sleep_until(void) {
    struct timespec end = later(CLOCK_REALTIME);
    CHECK(clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &end, NULL) == 0 && is_past(CLOCK_REALTIME, end));
}

static int silent[2];

static void use_poll(void) {
    struct pollfd fd = {silent[0], POLLIN, 0};
    struct timespec end = later(CLOCK_MONOTONIC);
    CHECK(poll(&fd, 1, TIMEOUT) == 0 && is_past(CLOCK_MONOTONIC, end));
}

static void use_select(void) {
    fd_set fds;
    FD_ZERO(&fds);
    FD_SET(silent[0], &fds);
    struct timeval time = {0, TIMEOUT * 1000};
    struct timespec end = later(CLOCK_MONOTONIC);
    CHECK(select(silent[0] + 1, &fds, NULL, NULL, &time) == 0 && is_past(CLOCK_MONOTONIC, end));
}

static void use_epoll(void) {
    static _Thread_local int epoll;
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll == 0)
        CHECK((epoll = epoll_create1(EPOLL_CLOEXEC)) > 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, silent[0], &event) == 0);
    struct timespec end = later(CLOCK_MONOTONIC);
    CHECK(epoll_wait(epoll, &event, 1, TIMEOUT) == 0 && is_past(CLOCK_MONOTONIC, end));
}

static void wait_for_condition(void) {
    static _Thread_local pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static _Thread_local pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    struct timespec end = later(CLOCK_REALTIME);
    CHECK(pthread_mutex_lock(&mutex) == 0);
    int result;
    do
        result = pthread_cond_timedwait(&condition, &mutex, &end);
    while (result == 0);
    CHECK(result == ETIMEDOUT && is_past(CLOCK_REALTIME, end));
    CHECK(pthread_mutex_unlock(&mutex) == 0);
}

static void wait_for_semaphore(void) {
    static sem_t never;
    struct timespec end = later(CLOCK_REALTIME);
    CHECK(sem_timedwait(&never, &end) == -1 && errno == ETIMEDOUT && is_past(CLOCK_REALTIME, end));
}

static void wait_for_signal(void) {
    sigset_t set;
    struct timespec end = later(CLOCK_MONOTONIC);
    CHECK(sigemptyset(&set) == 0 && sigaddset(&set, SIGUSR1) == 0);
    CHECK(sigtimedwait(&set, NULL, &timeout) == -1 && errno == EAGAIN && is_past(CLOCK_MONOTONIC, end));
}

static void use_flock(void) {
    static _Thread_local int fd;
    if (fd == 0)
        CHECK((fd = open("lock", O_RDWR | O_CREAT | O_CLOEXEC, 0666)) > 0);
    static atomic_int holders;
    CHECK(flock(fd, LOCK_EX) == 0);
    CHECK(holders++ == 0);
    sched_yield();
    holders--;
    CHECK(flock(fd, LOCK_UN) == 0);
}

static long shared[2];

static void use_mutex(void) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    CHECK(pthread_mutex_lock(&mutex) == 0);
    CHECK(shared[0] == shared[1]);
    shared[0]++;
    sched_yield();
    shared[1]++;
    CHECK(pthread_mutex_unlock(&mutex) == 0);
}

/* Two threads that wait for each other, 0 and 1. Each gives its turn to the other, and takes the one that it gets. */
struct pair {
    void (*give)(int to, long turn);
    long (*take)(int from);
    int side;
};

static int pipes[2][2], sockets[2], events[2], epolls[2];
static sem_t semaphores[2];
static pthread_mutex_t turn_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_condition = PTHREAD_COND_INITIALIZER;
static long semaphore_turns[2], turns[2] = {-1, -1};

static void give_by_pipe(int to, long turn) { CHECK(write(pipes[to][1], &turn, sizeof turn) == sizeof turn); }
static long take_by_pipe(int side) {
    long turn;
    CHECK(read(pipes[side][0], &turn, sizeof turn) == sizeof turn);
    return turn;
}
static void give_by_socket(int to, long turn) { CHECK(send(sockets[!to], &turn, sizeof turn, 0) == sizeof turn); }
static long take_by_socket(int side) {
    long turn;
    CHECK(recv(sockets[side], &turn, sizeof turn, 0) == sizeof turn);
    return turn;
}
static void give_by_event(int to, long turn) { CHECK(eventfd_write(events[to], turn + 1) == 0); }
static long take_by_event(int side) {
    struct epoll_event event;
    eventfd_t value;
    CHECK(epoll_wait(epolls[side], &event, 1, -1) == 1);
    CHECK(eventfd_read(events[side], &value) == 0);
    return (long)value - 1;
}
static void give_by_semaphore(int to, long turn) {
    semaphore_turns[to] = turn;
    CHECK(sem_post(&semaphores[to]) == 0);
}
static long take_by_semaphore(int side) {
    CHECK(sem_wait(&semaphores[side]) == 0);
    return semaphore_turns[side];
}
static void give_by_condition(int to, long turn) {
    CHECK(pthread_mutex_lock(&turn_mutex) == 0);
    turns[to] = turn;
    CHECK(pthread_cond_broadcast(&turn_condition) == 0 && pthread_mutex_unlock(&turn_mutex) == 0);
}
static long take_by_condition(int side) {
    CHECK(pthread_mutex_lock(&turn_mutex) == 0);
    while (turns[side] < 0)
        CHECK(pthread_cond_wait(&turn_condition, &turn_mutex) == 0);
    long turn = turns[side];
    turns[side] = -1;
    CHECK(pthread_mutex_unlock(&turn_mutex) == 0);
    return turn;
}

struct thread {
    pthread_t thread;
    int number;
    void (*work)(void);
    struct pair pair;
};

static void *alone(void *own) {
    struct thread *thread = own;
    while (!over) {
        thread->work();
        counts[thread->number]++;
    }
    return NULL;
}

/* The first side tells the other by LAST that it is over. */
static void *together(void *own) {
    struct thread *thread = own;
    struct pair *pair = &thread->pair;
    for (long turn = 0;; turn++) {
        if (pair->side == 0) {
            long last = over;
            pair->give(1, last ? LAST : turn);
            if (last)
                return NULL;
            CHECK(pair->take(0) == turn);
            struct timespec moment = {0, 200000};
            CHECK(nanosleep(&moment, NULL) == 0);
        } else {
            long given = pair->take(1);
            if (given == LAST)
                return NULL;
            CHECK(given == turn);
            pair->give(0, turn);
        }
        counts[thread->number]++;
    }
}

static struct thread threads[MOST];

static void begin(void (*work)(void)) {
    struct thread *thread = &threads[used];
    *thread = (struct thread){.number = used++, .work = work};
    CHECK(pthread_create(&thread->thread, NULL, alone, thread) == 0);
}

static void begin_two(void (*give)(int, long), long (*take)(int)) {
    for (int side = 0; side < 2; side++) {
        struct thread *thread = &threads[used];
        *thread = (struct thread){.number = used++, .pair = {give, take, side}};
        CHECK(pthread_create(&thread->thread, NULL, together, thread) == 0);
    }
}

int main(void) {
    sigset_t set;
    int fd = open("counts", O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    CHECK(fd >= 0 && ftruncate(fd, MOST * sizeof *counts) == 0);
    counts = mmap(NULL, MOST * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(counts != MAP_FAILED && close(fd) == 0);
    /* One arena, so that its lock is always held by somebody. */
    CHECK(mallopt(M_ARENA_MAX, 1) == 1);
    CHECK(sigemptyset(&set) == 0 && sigaddset(&set, SIGUSR1) == 0 && pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(pipe(silent) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    for (int side = 0; side < 2; side++) {
        struct epoll_event event = {.events = EPOLLIN};
        CHECK(pipe(pipes[side]) == 0 && sem_init(&semaphores[side], 0, 0) == 0);
        CHECK((events[side] = eventfd(0, 0)) >= 0 && (epolls[side] = epoll_create1(0)) >= 0);
        CHECK(epoll_ctl(epolls[side], EPOLL_CTL_ADD, events[side], &event) == 0);
    }
    void (*const works[])(void) = {
        use_malloc, use_malloc, use_malloc, use_stdio, use_stdio, compute, use_nanosleep, use_nanosleep_with_rest,
        sleep_until, use_poll, use_select, use_epoll, wait_for_condition, wait_for_semaphore, wait_for_signal,
        use_flock, use_flock, use_mutex, use_mutex,
    };
    for (unsigned n = 0; n < sizeof works / sizeof *works; n++)
        begin(works[n]);
    begin_two(give_by_pipe, take_by_pipe);
    begin_two(give_by_socket, take_by_socket);
    begin_two(give_by_event, take_by_event);
    begin_two(give_by_semaphore, take_by_semaphore);
    begin_two(give_by_condition, take_by_condition);
    printf("%d threads\n", used);
    fflush(stdout);
    while (access("over", F_OK) != 0)
        use_nanosleep();
    over = 1;
    for (int n = 0; n < used; n++)
        CHECK(pthread_join(threads[n].thread, NULL) == 0);
    printf("all is well\n");
    return 0;
}
