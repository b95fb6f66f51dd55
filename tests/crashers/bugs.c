/*
 * bugs BUG [--thread] [--wait]: a program with several bugs, two of a kind in the same function. To be built with and without
 * frame pointers.
 *
 * write-1 write-2   writes through a null pointer      abort-1 abort-2   calls abort()
 * copy-1 copy-2     memcpy() through a null pointer    call-1 call-2     calls a null function
 * divide            divides by zero                    wild              jumps to where nothing is
 * recurse           recursion without an end           mutual            the same, of three functions
 * raise-SIGNAL      raises the signal of that number   sort              abort() in a callback of the C library's
 *
 * --thread: in a second thread. --wait: "ready\n" on standard output, then at the end of standard input.
 */
#include "common.h"
#include <pthread.h>
#include <sys/resource.h>

#define NOINLINE __attribute__((noinline))

static const char *bug;
static volatile int zero, sink;
static void *volatile nowhere;
static void (*volatile no_function)(void);

static int is(const char *name)
{
    return strcmp(bug, name) == 0;
}

/* Leaves return addresses behind on the stack, of other lengths in each process. */
NOINLINE static int litter(int depth)
{
    char text[128];
    snprintf(text, sizeof text, "%d %s", depth, bug);
    return depth > 0 ? litter(depth - 1) + text[0] : (int)strlen(text);
}

NOINLINE static int two_of_a_kind(int number)
{
    volatile char buffer[200];
    buffer[number] = 0;
    sink = number;
    if (is("write-1"))
        *(volatile int *)nowhere = 1;
    sink++;
    if (is("write-2"))
        *(volatile int *)nowhere = 2;
    if (is("copy-1"))
        memcpy(nowhere, bug, (size_t)(number + 100));
    sink++;
    if (is("copy-2"))
        memcpy(nowhere, bug, (size_t)(number + 100));
    if (is("call-1"))
        no_function();
    sink++;
    if (is("call-2"))
        no_function();
    if (is("abort-1") && sink)
        abort();
    sink++;
    /* Not the same call again: the compiler would make one of both. */
    if (is("abort-2") && sink > 1) {
        sink--;
        abort();
    }
    return buffer[number];
}

NOINLINE static int recurse(int depth)
{
    volatile char room[100];
    room[depth % 100] = (char)depth;
    return recurse(depth + 1) + room[depth % 100];
}

static int mutual_2(int depth);
static int mutual_3(int depth);

NOINLINE static int mutual_1(int depth)
{
    volatile char room[48];
    room[depth % 48] = (char)depth;
    return mutual_2(depth + 1) + room[depth % 48];
}

NOINLINE static int mutual_2(int depth)
{
    volatile char room[160];
    room[depth % 160] = (char)depth;
    return mutual_3(depth + 1) + room[depth % 160];
}

NOINLINE static int mutual_3(int depth)
{
    volatile char room[24];
    room[depth % 24] = (char)depth;
    return mutual_1(depth + 1) + room[depth % 24];
}

static int compare(const void *one, const void *other)
{
    (void)one;
    (void)other;
    if (sink >= 0)
        abort();
    return 0;
}

NOINLINE static int crash(int number)
{
    volatile int result = litter(number % 7);
    if (is("divide"))
        result = number / zero;
    if (is("wild"))
        ((void (*)(void))((uintptr_t)nowhere + 0x1234567000))();
    if (is("recurse"))
        result += recurse(number);
    if (is("mutual"))
        result += mutual_1(number);
    if (is("sort")) {
        int numbers[] = {3, 1, 2};
        qsort(numbers, 3, sizeof *numbers, compare);
    }
    if (strncmp(bug, "raise-", 6) == 0)
        raise(atoi(bug + 6));
    return result + two_of_a_kind(number % 50);
}

static void *thread_main(void *number)
{
    sink = crash((int)(intptr_t)number);
    return NULL;
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    pthread_t thread;
    if (argc < 2) {
        errno = EINVAL;
        die("bugs BUG [--thread] [--wait]");
    }
    bug = argv[1];
    getrlimit(RLIMIT_CORE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_CORE, &limit);
    int number = (int)(getpid() & 31), in_thread = 0;
    for (int i = 2; i < argc; i++) {
        char byte;
        if (!strcmp(argv[i], "--thread"))
            in_thread = 1;
        else if (write(STDOUT_FILENO, "ready\n", 6) == 6)
            while (read(STDIN_FILENO, &byte, 1) > 0)
                ;
    }
    if (in_thread) {
        errno = pthread_create(&thread, NULL, thread_main, (void *)(intptr_t)number);
        if (errno)
            die("thread");
        pthread_join(thread, NULL);
    }
    sink = crash(number);
    return 0;
}
