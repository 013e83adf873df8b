/* Programs are started in every way that there is: before the dump, and run through it, and after the restore. Each finds the
 * environment that it was given. */
#include "checkpoint.h"

enum { WAYS = 13 };

static char *const changed[] = {"A=B", "LC_ALL=C", NULL}, *const empty[] = {NULL};

/* A program that was started: the way says which environment it has to have. */
static int started(int way) {
    char path[32];
    int count = 0;
    for (char **variable = environ; *variable != NULL; variable++)
        count++;
    const char *preloaded = getenv("LD_PRELOAD"), *kept = getenv("KEPT"), *a = getenv("A");
    if (preloaded != NULL)
        fail("way %d: LD_PRELOAD=%s\n", way, preloaded);
    switch (way) {
    case 0: case 3: case 8: case 9:
        if (count != 0)
            fail("way %d: %d variables, the first is %s\n", way, count, environ[0]);
        break;
    case 2: case 10:
        if (count != 2 || a == NULL || strcmp(a, "B") != 0)
            fail("way %d: %d variables\n", way, count);
        break;
    default:
        if (kept == NULL || strcmp(kept, "1") != 0)
            fail("way %d: KEPT is not there\n", way);
    }
    snprintf(path, sizeof path, "begun-%d", way);
    CHECK(mkdir(path, 0777) == 0 || errno == EEXIST);
    wait_for_go();
    printf("%d\n", 40 + way);
    fflush(stdout);
    return 40 + way;
}

static void write_script(const char *name, int way) {
    char text[100];
    int length = snprintf(text, sizeof text, "#!/bin/sh\nexec ./subject %d\n", way);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0777);
    CHECK(fd >= 0 && write(fd, text, length) == length && close(fd) == 0);
}

static void *with_system(void *command) { return (void *)(long)system(command); }

static pthread_t waits_for_system;
static FILE *piped;

/* Gives the process, or 0 for those that the library waits for itself. */
static pid_t start(int way) {
    char number[8], *arguments[] = {"subject", number, NULL}, *script[] = {"a", "b", NULL};
    pid_t made = -1;
    snprintf(number, sizeof number, "%d", way);
    switch (way) {
    case 0:
        CHECK(posix_spawn(&made, "./subject", NULL, NULL, arguments, empty) == 0);
        return made;
    case 1: {
        char *shell[] = {"sh", "-c", "exec ./subject 1", NULL};
        CHECK(posix_spawnp(&made, "sh", NULL, NULL, shell, environ) == 0);
        return made;
    }
    case 2:
        made = vfork();
        if (made == 0) {
            execve("./subject", arguments, changed);
            _exit(99);
        }
        CHECK(made > 0);
        return made;
    case 6:
        CHECK(pthread_create(&waits_for_system, NULL, with_system, "./subject 6") == 0);
        return 0;
    case 7:
        piped = popen("./subject 7", "r");
        CHECK(piped != NULL);
        return 0;
    case 11: {
        posix_spawnattr_t attributes;
        posix_spawn_file_actions_t actions;
        CHECK(posix_spawnattr_init(&attributes) == 0 && posix_spawn_file_actions_init(&actions) == 0);
        CHECK(posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF) == 0);
        CHECK(posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0) == 0);
        CHECK(posix_spawn(&made, "./subject", &actions, &attributes, arguments, environ) == 0);
        CHECK(posix_spawnattr_destroy(&attributes) == 0 && posix_spawn_file_actions_destroy(&actions) == 0);
        return made;
    }
    }
    made = fork();
    CHECK(made >= 0);
    if (made > 0)
        return made;
    switch (way) {
    case 3:
        fexecve(open("./subject", O_RDONLY | O_CLOEXEC), arguments, empty);
        break;
    case 4:
        execv("./script-4", script);
        break;
    case 5:
        execlp("./script-5", "a", "b", NULL);
        break;
    case 8:
        clearenv();
        execv("./subject", arguments);
        break;
    case 9:
        syscall(SYS_execve, "./subject", arguments, empty);
        break;
    case 10:
        execveat(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC), "subject", arguments, changed, 0);
        break;
    case 12:
        execl("./subject", "subject", number, NULL);
        break;
    }
    _exit(98);
}

static void end(int way, pid_t child) {
    int status = 0;
    if (way == 6) {
        void *result;
        CHECK(pthread_join(waits_for_system, &result) == 0);
        status = (int)(long)result;
    } else if (way == 7) {
        char line[16] = "";
        CHECK(fgets(line, sizeof line, piped) != NULL && strcmp(line, "47\n") == 0);
        status = pclose(piped);
    } else {
        CHECK(waitpid(child, &status, 0) == child);
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 40 + way)
        fail("the program started in way %d ended with status %#x\n", way, status);
}

int main(int count, char **arguments) {
    pid_t children[WAYS];
    if (count > 1)
        return started(atoi(arguments[1]));
    CHECK(setenv("KEPT", "1", 1) == 0);
    write_script("./script-4", 4);
    write_script("./script-5", 5);
    for (int way = 0; way < WAYS; way++)
        children[way] = start(way);
    for (int way = 0; way < WAYS; way++) {
        char path[32];
        snprintf(path, sizeof path, "begun-%d", way);
        while (access(path, F_OK) != 0)
            rest(1000000);
    }
    ready();
    wait_for_go();
    for (int way = 0; way < WAYS; way++)
        end(way, children[way]);
    for (int way = 0; way < WAYS; way++)
        children[way] = start(way);
    for (int way = 0; way < WAYS; way++)
        end(way, children[way]);
    return pass();
}
