/* Threads that take and give back memory all the time, and look whether it holds what they wrote. With OWN the program has
 * functions of its own for that; with FROM, they have to be those of the library of that name. */
#include "checkpoint.h"

enum { THREADS = 4, SLOTS = 300, LARGEST = 20000 };

#ifdef OWN
/* Powers of two, each with a list of what is free. */
enum { CLASSES = 40, HEAD = 16, CHUNK = 1 << 20 };

static atomic_flag lock = ATOMIC_FLAG_INIT;
static void *lists[CLASSES];
static char *chunk, *chunk_end;
static atomic_long taken;

void *malloc(size_t size) {
    int class = 5;
    while ((1ul << class) < size + HEAD)
        class++;
    while (atomic_flag_test_and_set(&lock))
        ;
    char *found = lists[class];
    if (found != NULL) {
        lists[class] = *(void **)(found + HEAD);
    } else {
        if ((size_t)(chunk_end - chunk) < 1ul << class) {
            size_t length = (1ul << class) > CHUNK ? 1ul << class : CHUNK;
            chunk = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (chunk == MAP_FAILED)
                abort();
            chunk_end = chunk + length;
        }
        found = chunk;
        chunk += 1ul << class;
    }
    atomic_flag_clear(&lock);
    *(long *)found = class;
    taken++;
    return found + HEAD;
}

void free(void *memory) {
    if (memory == NULL)
        return;
    char *found = (char *)memory - HEAD;
    long class = *(long *)found;
    while (atomic_flag_test_and_set(&lock))
        ;
    *(void **)memory = lists[class];
    lists[class] = found;
    atomic_flag_clear(&lock);
}

void *calloc(size_t count, size_t size) {
    void *memory = malloc(count * size);
    return memset(memory, 0, count * size);
}

void *realloc(void *memory, size_t size) {
    if (memory == NULL)
        return malloc(size);
    size_t had = (1ul << *(long *)((char *)memory - HEAD)) - HEAD;
    if (size <= had)
        return memory;
    void *larger = malloc(size);
    memcpy(larger, memory, had);
    free(memory);
    return larger;
}
#endif

static atomic_long turns;
static atomic_int over;

static void fill(unsigned char *memory, size_t size, unsigned value) {
    for (size_t n = 0; n < size; n++)
        memory[n] = (unsigned char)(value + n * 3);
}

static void look(unsigned char *memory, size_t size, unsigned value) {
    for (size_t n = 0; n < size; n++)
        CHECK(memory[n] == (unsigned char)(value + n * 3));
}

static void *work(void *number) {
    struct {
        unsigned char *memory;
        size_t size;
        unsigned value;
    } slots[SLOTS] = {};
    unsigned long random = (unsigned long)number * 7919 + 1;
    while (!over) {
        random = random * 6364136223846793005ul + 1442695040888963407ul;
        unsigned slot = (unsigned)(random >> 33) % SLOTS, value = (unsigned)(random >> 13);
        size_t size = (random >> 40) % ((random >> 20 & 7) == 0 ? LARGEST : 200) + 1;
        if (slots[slot].memory == NULL) {
            slots[slot].memory = malloc(size);
            CHECK(slots[slot].memory != NULL);
            fill(slots[slot].memory, size, value);
            slots[slot].size = size;
            slots[slot].value = value;
        } else if (value % 4 == 0 && size > slots[slot].size) {
            slots[slot].memory = realloc(slots[slot].memory, size);
            CHECK(slots[slot].memory != NULL);
            look(slots[slot].memory, slots[slot].size, slots[slot].value);
            fill(slots[slot].memory, size, slots[slot].value);
            slots[slot].size = size;
        } else {
            look(slots[slot].memory, slots[slot].size, slots[slot].value);
            free(slots[slot].memory);
            slots[slot].memory = NULL;
        }
        turns++;
    }
    for (int slot = 0; slot < SLOTS; slot++)
        if (slots[slot].memory != NULL) {
            look(slots[slot].memory, slots[slot].size, slots[slot].value);
            free(slots[slot].memory);
        }
    return NULL;
}

static void move_on(void) {
    long before = turns;
    while (turns < before + 5000)
        rest(1000000);
}

int main(void) {
    pthread_t threads[THREADS];
#ifdef FROM
    Dl_info found;
    CHECK(dladdr(dlsym(RTLD_DEFAULT, "malloc"), &found) != 0 && strstr(found.dli_fname, FROM) != NULL);
#endif
    for (long n = 0; n < THREADS; n++)
        CHECK(pthread_create(&threads[n], NULL, work, (void *)n) == 0);
    move_on();
    ready();
    wait_for_go();
    move_on();
    over = 1;
    for (int n = 0; n < THREADS; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);
#ifdef OWN
    CHECK(taken > 1000);
#endif
    return pass();
}
