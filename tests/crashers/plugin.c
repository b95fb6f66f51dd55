/* A shared library for patient.c. PLUGIN_NAME: of its function, so that a backtrace shows which one it is. */
#define JOIN_(one, other) one##other
#define JOIN(one, other) JOIN_(one, other)

static volatile int calls;
char table[8192] = {1};

__attribute__((noinline)) static int JOIN(work_of_, PLUGIN_NAME)(int number, int (*next)(int))
{
    volatile char room[500];
    room[number] = (char)(table[number]++);
    return next(number + 1) + room[number];
}

__attribute__((visibility("default"))) int run(int number, int (*next)(int))
{
    calls++;
    return JOIN(work_of_, PLUGIN_NAME)(number, next) + calls;
}
