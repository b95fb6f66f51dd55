/*
 * crash SIGNAL [OPTION]...       dies of SIGNAL (a name, SEGV or SIGSEGV, or a number), by its real cause where it has one
 * crash --print-fill BYTES KIND  writes what --fill puts into known_buffer to standard output
 *
 * --fill BYTES random|zero|pattern  memory at known_buffer, known_size bytes, all of it touched
 * --sparse BYTES      one byte touched in each 2 MiB, at sparse_buffer
 * --threads N         N other threads that wait
 * --from-thread       a thread that is not the leader crashes
 * --leader-exits      the same, after the leader has become a zombie
 * --comm NAME         the crashing thread's name, any bytes
 * --core-limit BYTES  soft RLIMIT_CORE (otherwise as high as the hard limit)
 * --uid N, --gid N    real, effective and saved ids; dumpable again unless --dumpable says otherwise
 * --dumpable 0|1|2    prctl(PR_SET_DUMPABLE); 2, which that refuses: as the kernel left it after the change of ids
 * --chroot DIR        before the ids
 * --dead-root         a root directory in which nothing is or will be, as Chrome's sandbox has it; before the ids
 * --wait              "ready\n" on standard output, then crashes at a byte or the end of standard input
 *
 * Before the fault, the moment (CLOCK_MONOTONIC, ns, int64) goes to the descriptor that CRASH_CLOCK_FD names.
 * A debugger sees main -> do_crash, or thread_main -> do_crash.
 */
#include "common.h"
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define VISIBLE __attribute__((visibility("default"), used))
VISIBLE unsigned char *known_buffer;
VISIBLE size_t known_size;
VISIBLE unsigned char *sparse_buffer;
VISIBLE size_t sparse_size;
VISIBLE int crash_signal;

static int wait_first, leader_exits, clock_fd = -1;
static const char *comm;
static size_t waiting_threads;

static const struct {
    const char *name;
    int number;
} SIGNALS[] = {
    {"QUIT", SIGQUIT}, {"ILL", SIGILL},   {"TRAP", SIGTRAP}, {"ABRT", SIGABRT}, {"BUS", SIGBUS},
    {"FPE", SIGFPE},   {"SEGV", SIGSEGV}, {"XCPU", SIGXCPU}, {"XFSZ", SIGXFSZ}, {"SYS", SIGSYS},
};

static int parse_signal(const char *text)
{
    const char *name = strncmp(text, "SIG", 3) == 0 ? text + 3 : text;
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        if (strcmp(name, SIGNALS[i].name) == 0)
            return SIGNALS[i].number;
    int number = atoi(text);
    if (number < 1 || number >= NSIG) {
        errno = EINVAL;
        die("signal %s", text);
    }
    return number;
}

/* random: xorshift64 (13, 7, 17) from 1, little-endian. pattern: each number stands 64 times, so it compresses. */
static void fill_words(uint64_t *words, size_t count, const char *kind, uint64_t *state, uint64_t *index)
{
    int random = strcmp(kind, "random") == 0, zero = strcmp(kind, "zero") == 0;
    for (size_t i = 0; i < count; i++, (*index)++) {
        if (random) {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            words[i] = *state;
        } else {
            words[i] = zero ? 0 : *index / 64;
        }
    }
}

static int print_fill(size_t bytes, const char *kind)
{
    static uint64_t words[8192];
    uint64_t state = 1, index = 0;
    while (bytes > 0) {
        size_t now = bytes < sizeof words ? bytes : sizeof words;
        fill_words(words, (now + 7) / 8, kind, &state, &index);
        if (fwrite(words, 1, now, stdout) != now)
            die("write");
        bytes -= now;
    }
    return fflush(stdout) ? 1 : 0;
}

/* The proc directory of a process that is no more: what opens there fails with ENOENT, or with ESRCH. */
static void enter_dead_root(void)
{
    int status;
    pid_t child = (pid_t)syscall(SYS_clone, CLONE_FS | SIGCHLD, NULL, NULL, NULL, NULL);
    if (child == 0)
        _exit(chroot("/proc/self/fdinfo") < 0 || chdir("/") < 0);
    if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0)
        die("dead root");
}

static unsigned char *allocate(size_t bytes)
{
    unsigned char *memory =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap %zu", bytes);
    madvise(memory, bytes, MADV_NOHUGEPAGE); /* so that one byte touched is one page */
    return memory;
}

static void fill_known_buffer(size_t bytes, const char *kind)
{
    uint64_t state = 1, index = 0;
    known_size = bytes;
    known_buffer = allocate((bytes + 7) / 8 * 8);
    fill_words((uint64_t *)known_buffer, (bytes + 7) / 8, kind, &state, &index);
}

static void touch_sparse_buffer(size_t bytes)
{
    sparse_size = bytes;
    sparse_buffer = allocate(bytes);
    for (size_t at = 0; at < bytes; at += 2 << 20)
        sparse_buffer[at] = 0xA5;
}

static void wait_for_zombie_leader(void)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", getpid());
    for (int tries = 0; tries < 100000; tries++) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            die("%s", path);
        ssize_t got = read(fd, line, sizeof line - 1);
        close(fd);
        line[got > 0 ? got : 0] = '\0';
        char *state = strrchr(line, ')');
        if (state && state[2] == 'Z')
            return;
        usleep(100);
    }
    errno = ETIMEDOUT;
    die("the leader is not a zombie");
}

static void bad_access_beyond_the_file(void)
{
    int fd = (int)syscall(SYS_memfd_create, "short", 1);
    volatile char *memory = mmap(NULL, 2 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || ftruncate(fd, 100) < 0 || memory == MAP_FAILED)
        die("mmap beyond a file's end");
    memory[4096] = 1;
}

static void forbidden_system_call(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        die("seccomp");
    syscall(SYS_getppid);
}

__attribute__((noinline)) static void do_crash(int number)
{
    volatile int zero = 0;
    if (comm)
        prctl(PR_SET_NAME, comm);
    if (wait_first) {
        char byte;
        if (write(STDOUT_FILENO, "ready\n", 6) != 6)
            die("ready");
        while (read(STDIN_FILENO, &byte, 1) < 0 && errno == EINTR)
            ;
    }
    if (clock_fd >= 0) {
        int64_t now = monotonic_ns();
        if (write(clock_fd, &now, sizeof now) != sizeof now)
            die("clock");
    }
    switch (number) {
    case SIGSEGV:
        *(volatile int *)(intptr_t)zero = 42;
        break;
    case SIGBUS:
        bad_access_beyond_the_file();
        break;
    case SIGSYS:
        forbidden_system_call();
        break;
    case SIGABRT:
        abort();
#if defined(__x86_64__) || defined(__i386__)
    case SIGFPE:
        zero = 42 / zero;
        break;
    case SIGILL:
        __asm__ volatile("ud2");
        break;
    case SIGTRAP:
        __asm__ volatile("int3");
        break;
#endif
    }
    raise(number);
    fprintf(stderr, "still alive after signal %d\n", number);
    _exit(124);
}

static void *thread_main(void *unused)
{
    (void)unused;
    if (leader_exits)
        wait_for_zombie_leader();
    do_crash(crash_signal);
    return NULL;
}

static void *waiting_main(void *unused)
{
    (void)unused;
    __atomic_add_fetch(&waiting_threads, 1, __ATOMIC_SEQ_CST);
    for (;;)
        pause();
    return NULL;
}

static void start_thread(void *(*body)(void *))
{
    pthread_t thread;
    errno = pthread_create(&thread, NULL, body, NULL);
    if (errno)
        die("thread");
}

static long number_of(int argc, char **argv, int *index)
{
    const char *text = value_of(argc, argv, index);
    char *end;
    errno = 0;
    long number = strtol(text, &end, 0);
    if (*text == '\0' || *end != '\0' || errno) {
        errno = EINVAL;
        die("number %s", text);
    }
    return number;
}

int main(int argc, char **argv)
{
    long fill = -1, sparse = -1, core_limit = -1, threads = 0, uid = -1, gid = -1, dumpable = -1;
    const char *kind = "zero", *new_root = NULL;
    int from_thread = 0, dead_root = 0;

    if (argc == 4 && strcmp(argv[1], "--print-fill") == 0)
        return print_fill(strtoul(argv[2], NULL, 0), argv[3]);
    if (argc < 2) {
        errno = EINVAL;
        die("crash SIGNAL [OPTION]...");
    }
    crash_signal = parse_signal(argv[1]);
    for (int i = 2; i < argc; i++) {
        const char *option = argv[i];
        if (!strcmp(option, "--fill")) {
            fill = number_of(argc, argv, &i);
            kind = value_of(argc, argv, &i);
        } else if (!strcmp(option, "--sparse"))
            sparse = number_of(argc, argv, &i);
        else if (!strcmp(option, "--threads"))
            threads = number_of(argc, argv, &i);
        else if (!strcmp(option, "--from-thread"))
            from_thread = 1;
        else if (!strcmp(option, "--leader-exits"))
            from_thread = leader_exits = 1;
        else if (!strcmp(option, "--comm"))
            comm = value_of(argc, argv, &i);
        else if (!strcmp(option, "--core-limit"))
            core_limit = number_of(argc, argv, &i);
        else if (!strcmp(option, "--uid"))
            uid = number_of(argc, argv, &i);
        else if (!strcmp(option, "--gid"))
            gid = number_of(argc, argv, &i);
        else if (!strcmp(option, "--dumpable"))
            dumpable = number_of(argc, argv, &i);
        else if (!strcmp(option, "--chroot"))
            new_root = value_of(argc, argv, &i);
        else if (!strcmp(option, "--dead-root"))
            dead_root = 1;
        else if (!strcmp(option, "--wait"))
            wait_first = 1;
        else {
            errno = EINVAL;
            die("%s", option);
        }
    }
    const char *clock_text = getenv("CRASH_CLOCK_FD");
    if (clock_text)
        clock_fd = atoi(clock_text);

    /* The signal must have its default effect, whatever was inherited (Python ignores SIGXFSZ). */
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(crash_signal, SIG_DFL);

    struct rlimit limit;
    getrlimit(RLIMIT_CORE, &limit);
    limit.rlim_cur = core_limit >= 0 && (rlim_t)core_limit < limit.rlim_max ? (rlim_t)core_limit : limit.rlim_max;
    if (setrlimit(RLIMIT_CORE, &limit) < 0)
        die("RLIMIT_CORE");
    if (new_root && (chroot(new_root) < 0 || chdir("/") < 0))
        die("chroot %s", new_root);
    if (dead_root)
        enter_dead_root();
    if (gid >= 0 && (setgroups(0, NULL) < 0 || setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) < 0))
        die("gid %ld", gid);
    if (uid >= 0 && setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0)
        die("uid %ld", uid);
    if (dumpable < 0 && (uid >= 0 || gid >= 0))
        dumpable = 1;
    if ((dumpable == 0 || dumpable == 1) && prctl(PR_SET_DUMPABLE, dumpable, 0, 0, 0) < 0)
        die("dumpable %ld", dumpable);

    if (fill >= 0)
        fill_known_buffer((size_t)fill, kind);
    if (sparse > 0)
        touch_sparse_buffer((size_t)sparse);
    for (long i = 0; i < threads; i++)
        start_thread(waiting_main);
    while (__atomic_load_n(&waiting_threads, __ATOMIC_SEQ_CST) < (size_t)threads)
        usleep(100);
    if (!from_thread)
        do_crash(crash_signal);
    start_thread(thread_main);
    if (leader_exits)
        pthread_exit(NULL);
    for (;;)
        pause();
}
