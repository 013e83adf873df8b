/* Threads load libraries, call what is in them and drop them again, all the time; after the restore one is loaded that never
 * was before, and one of those that were stays loaded. */
#include "checkpoint.h"

static atomic_int over;
static atomic_long turns;

static void *load(const char *name) {
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        fail("%s: %s\n", name, dlerror());
    return library;
}

static long call(void *library, long value) {
    long (*function)(long) = (long (*)(long))dlsym(library, "plugin_call");
    CHECK(function != NULL);
    return function(value);
}

static void *work(void *name) {
    long number = ((char *)name)[strlen("./plugin")] - '0';
    while (!over) {
        void *library = load(name);
        /* Its variable of the thread begins anew each time. */
        CHECK(call(library, 11) == 11 * number + number * 1000 + 1);
        CHECK(call(library, 12) == 12 * number + number * 1000 + 2);
        CHECK(dlclose(library) == 0);
        turns++;
    }
    return NULL;
}

static void move_on(void) {
    long before = turns;
    while (turns < before + 20)
        rest(1000000);
}

int main(void) {
    pthread_t threads[2];
    void *stays = load("./plugin3.so");
    CHECK(call(stays, 1) == 3 + 3001);
    CHECK(pthread_create(&threads[0], NULL, work, "./plugin1.so") == 0);
    CHECK(pthread_create(&threads[1], NULL, work, "./plugin2.so") == 0);
    move_on();
    ready();
    wait_for_go();
    move_on();
    CHECK(call(stays, 1) == 3 + 3002);
    void *late = load("./plugin4.so");
    CHECK(call(late, 1) == 4 + 4001);
    /* One of the system's, with its own start. */
    void *mathematics = load("libm.so.6");
    double (*cosine)(double) = (double (*)(double))dlsym(mathematics, "cos");
    CHECK(cosine != NULL && cosine(0.0) == 1.0);
    over = 1;
    for (int n = 0; n < 2; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);
    CHECK(dlclose(late) == 0 && dlclose(stays) == 0);
    return pass();
}
