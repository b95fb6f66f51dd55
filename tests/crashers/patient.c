/*
 * patient [OPTION]...  a process with much for a debugger to find; when all is in place: "ready\n" on standard output, and at
 *                      the end of standard input it dies of SIGSEGV
 *
 * --threads N         N threads, each with a chain of frames of its own, waiting in one of several ways: for a condition, in
 *                     read(), asleep, in a signal handler on a stack of its own, in a callback of qsort()'s
 * --stack BYTES       a recursion that has used so much of its stack; the thread that dies has it below its last frames; when
 *                     that is more than there is, it dies of that
 * --plugin PATH       dlopen() it (plugin.c) and die in there; more than one: the first calls the second, and so on
 * --library PATH      dlopen() it, and no more (may be given often)
 * --ballast BYTES     memory full of what does not compress, at ballast, ballast_size bytes
 * --sparse BYTES      memory of which one page in 2 MiB is touched, at sparse
 * --from-thread       a thread that is not the leader dies
 * --handler           it dies in a handler of that signal, on a stack of its own, as programs that report crashes do
 * --core-limit BYTES  soft RLIMIT_CORE (otherwise as high as the hard limit)
 */
#include "common.h"
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define NOINLINE __attribute__((noinline))
#define MAX_PLUGINS 64

typedef int (*plugin_run)(int number, int (*next)(int));

struct story {
    const char *title;
    long chapter;
    struct story *earlier;
};

struct story *told;
unsigned char *ballast, *sparse;
size_t ballast_size, sparse_size;
int initialised = 1, zeroed;
static plugin_run plugins[MAX_PLUGINS];
static int plugin_count, with_handler;
static size_t stack_wanted;
static sem_t placed;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;
static int silent_pipe[2];
static volatile int sink, *volatile nowhere;

static void wait_for_the_end_of_input(void)
{
    char byte;
    while (read(STDIN_FILENO, &byte, 1) < 0 && errno == EINTR)
        ;
}

NOINLINE static int fault(struct story *story)
{
    struct story *volatile kept = story;
    *nowhere = (int)kept->chapter;
    return sink;
}

NOINLINE static int call_plugin(int number)
{
    /* What follows the call keeps the compiler from making a jump of it, here and below: no frame would stay. */
    int got = number < plugin_count ? plugins[number](number, call_plugin) : fault(told);
    return sink += got;
}

NOINLINE static int descend(char *top, size_t depth)
{
    char block[8000];
    memset(block, (int)depth, sizeof block);
    sink = block[depth % sizeof block];
    int got = (size_t)(top - block) < stack_wanted ? descend(top, depth + 1) : call_plugin(0);
    return got + block[(depth + 1) % sizeof block];
}

NOINLINE static void wait_for_condition(void)
{
    pthread_mutex_lock(&mutex);
    sem_post(&placed);
    for (;;)
        pthread_cond_wait(&never, &mutex);
}

NOINLINE static void wait_in_read(void)
{
    char byte;
    sem_post(&placed);
    while (read(silent_pipe[0], &byte, 1) != 0)
        ;
}

NOINLINE static void wait_asleep(void)
{
    struct timespec ages = {1000000, 0};
    sem_post(&placed);
    for (;;)
        nanosleep(&ages, NULL);
}

static void on_signal(int number)
{
    sink = number;
    sem_post(&placed);
    for (;;)
        pause();
}

static void use_other_stack(void)
{
    stack_t other = {.ss_size = 64 << 10, .ss_sp = malloc(64 << 10)};
    if (!other.ss_sp || sigaltstack(&other, NULL) < 0)
        die("sigaltstack");
}

NOINLINE static void wait_in_handler(void)
{
    use_other_stack();
    pthread_kill(pthread_self(), SIGUSR1);
}

static void report(int number)
{
    signal(number, SIG_DFL);
    pthread_kill(pthread_self(), number);
    /* It is blocked until here. */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static int compare(const void *one, const void *other)
{
    sink = *(const int *)one - *(const int *)other;
    sem_post(&placed);
    for (;;)
        pause();
    return sink;
}

NOINLINE static void wait_in_callback(void)
{
    int numbers[] = {3, 1, 2};
    qsort(numbers, 3, sizeof *numbers, compare);
    sink = numbers[0];
}

static void (*const WAYS[])(void) = {wait_for_condition, wait_in_read, wait_asleep, wait_in_handler, wait_in_callback};

NOINLINE static int odd(long number, int level);

NOINLINE static int even(long number, int level)
{
    if (level > 0)
        return sink += (number & 1 ? odd : even)(number / 2, level - 1);
    WAYS[number]();
    return sink;
}

NOINLINE static int odd(long number, int level)
{
    volatile char room[300];
    room[level] = (char)number;
    if (level > 0)
        return sink += (number & 1 ? odd : even)(number / 2, level - 1) + room[level];
    WAYS[number]();
    return sink + room[level];
}

static void *thread_main(void *argument)
{
    long number = (long)argument, ways = sizeof WAYS / sizeof *WAYS;
    /* The bits of the quotient are the chain; what remains at its end is the way of waiting. */
    int levels = 4;
    sink += even((number % ways << levels) + (number / ways & 15), levels);
    return NULL;
}

NOINLINE static int live_and_die(void)
{
    char top;
    if (with_handler)
        use_other_stack();
    wait_for_the_end_of_input();
    return descend(&top, 0) + sink;
}

static void *dying_thread(void *unused)
{
    (void)unused;
    sink += live_and_die();
    return NULL;
}

static void start_thread(void *(*body)(void *), long number, size_t stack)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack);
    errno = pthread_create(&thread, &attributes, body, (void *)number);
    if (errno)
        die("thread");
}

static unsigned char *allocate(size_t bytes)
{
    unsigned char *memory =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap %zu", bytes);
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    return memory;
}

static void fill_ballast(void)
{
    uint64_t state = 1, *words = (uint64_t *)(ballast = allocate(ballast_size));
    for (size_t i = 0; i < ballast_size / 8; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[i] = state;
    }
}

static void tell(const char *title)
{
    for (long chapter = 1; chapter <= 3; chapter++) {
        struct story *story = malloc(sizeof *story);
        *story = (struct story){strdup(title), chapter, told};
        told = story;
    }
}

static void *load(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(125);
    }
    return library;
}

static int sleeping_others(void)
{
    int asleep = 0;
    struct dirent *entry;
    DIR *tasks = opendir("/proc/self/task");
    if (!tasks)
        die("/proc/self/task");
    while ((entry = readdir(tasks))) {
        char path[300], line[512];
        snprintf(path, sizeof path, "/proc/self/task/%s/stat", entry->d_name);
        int fd = atoi(entry->d_name) == getpid() ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t got = read(fd, line, sizeof line - 1);
        close(fd);
        line[got > 0 ? got : 0] = '\0';
        char *state = strrchr(line, ')');
        asleep += state && state[2] == 'S';
    }
    closedir(tasks);
    return asleep;
}

/* sem_post() comes before the wait itself: until each thread sleeps in the kernel, its frames may still change. */
static void wait_for_sleepers(long threads)
{
    for (int tries = 0; tries < 10000; tries++) {
        if (sleeping_others() == threads)
            return;
        usleep(1000);
    }
    errno = ETIMEDOUT;
    die("the threads do not sleep");
}

int main(int argc, char **argv)
{
    long threads = 0;
    int from_thread = 0;
    struct rlimit limit;
    getrlimit(RLIMIT_CORE, &limit);
    limit.rlim_cur = limit.rlim_max;
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (!strcmp(option, "--threads"))
            threads = atol(value_of(argc, argv, &i));
        else if (!strcmp(option, "--stack"))
            stack_wanted = strtoul(value_of(argc, argv, &i), NULL, 0);
        else if (!strcmp(option, "--plugin")) {
            if (plugin_count == MAX_PLUGINS)
                die("too many plugins");
            plugins[plugin_count++] = (plugin_run)dlsym(load(value_of(argc, argv, &i)), "run");
        } else if (!strcmp(option, "--library"))
            load(value_of(argc, argv, &i));
        else if (!strcmp(option, "--ballast"))
            ballast_size = strtoul(value_of(argc, argv, &i), NULL, 0);
        else if (!strcmp(option, "--sparse"))
            sparse_size = strtoul(value_of(argc, argv, &i), NULL, 0);
        else if (!strcmp(option, "--from-thread"))
            from_thread = 1;
        else if (!strcmp(option, "--handler"))
            with_handler = 1;
        else if (!strcmp(option, "--core-limit"))
            limit.rlim_cur = strtoul(value_of(argc, argv, &i), NULL, 0);
        else {
            errno = EINVAL;
            die("%s", option);
        }
    }
    if (setrlimit(RLIMIT_CORE, &limit) < 0)
        die("RLIMIT_CORE");
    if (pipe(silent_pipe) < 0 || sem_init(&placed, 0, 0) < 0)
        die("set-up");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    if (with_handler) {
        action.sa_handler = report;
        sigaction(SIGSEGV, &action, NULL);
    }
    initialised = 2;
    zeroed = 3;
    tell("once upon a time");
    if (ballast_size)
        fill_ballast();
    if (sparse_size) {
        sparse = allocate(sparse_size);
        for (size_t at = 0; at < sparse_size; at += 2 << 20)
            sparse[at] = 0xA5;
    }
    for (long i = 0; i < threads; i++)
        start_thread(thread_main, i, 1 << 20);
    for (long i = 0; i < threads; i++)
        while (sem_wait(&placed) < 0)
            ;
    wait_for_sleepers(threads);
    if (write(STDOUT_FILENO, "ready\n", 6) != 6)
        die("ready");
    if (!from_thread)
        return live_and_die();
    start_thread(dying_thread, 0, stack_wanted + (1 << 20));
    for (;;)
        pause();
}
