/* Processes that do nothing but start others and wait for them, each in its own way. Every status is looked at. */
#include "checkpoint.h"

enum { WAYS = 4 };

static atomic_long *started;

static void begin(int way, char *const *arguments, pid_t *made) {
    switch (way) {
    case 0:
        *made = fork();
        if (*made == 0) {
            execv("./subject", arguments);
            _exit(99);
        }
        break;
    case 1:
        CHECK(posix_spawn(made, "./subject", NULL, NULL, arguments, environ) == 0);
        break;
    case 2:
        *made = vfork();
        if (*made == 0) {
            execv("./subject", arguments);
            _exit(99);
        }
        break;
    default:
        *made = fork();
        if (*made == 0)
            _exit(atoi(arguments[1]));
    }
    CHECK(*made > 0);
}

static int storm(int way) {
    for (int number = 0; !is_go(); number++) {
        char text[8], *arguments[] = {"subject", text, NULL};
        int status = 0;
        pid_t made;
        snprintf(text, sizeof text, "%d", number % 90);
        begin(way, arguments, &made);
        CHECK(waitpid(made, &status, 0) == made);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != number % 90)
            fail("way %d: the program of number %d ended with status %#x\n", way, number % 90, status);
        started[way]++;
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count > 1)
        return atoi(arguments[1]);
    pid_t children[WAYS];
    started = shared_memory(4096);
    for (int way = 0; way < WAYS; way++) {
        children[way] = fork();
        CHECK(children[way] >= 0);
        if (children[way] == 0)
            _exit(storm(way));
    }
    for (int way = 0; way < WAYS; way++)
        while (started[way] < 20)
            rest(1000000);
    ready();
    wait_for_go();
    for (int way = 0; way < WAYS; way++) {
        int status;
        CHECK(waitpid(children[way], &status, 0) == children[way] && status == 0);
    }
    return pass();
}
