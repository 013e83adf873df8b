/* What dlopen.c loads: NUMBER says which. */
static _Thread_local long calls = NUMBER * 1000;
static int begun;

__attribute__((constructor)) static void begin(void) { begun = NUMBER; }

long plugin_call(long value) { return begun == NUMBER ? value * NUMBER + ++calls : -1; }
