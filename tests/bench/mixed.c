/* mixed --wait BYTES: memory of which each fourth page is random and the others are touched zeros; "ready\n" on standard
   output, then SIGSEGV at the end of standard input. The moment before it goes to the descriptor CRASH_CLOCK_FD, as with
   tests/crashers/crash.c. */
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

int main(int argc, char **argv)
{
    size_t bytes = strtoull(argv[argc - 1], NULL, 0);
    unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    uint64_t state = 1;
    for (size_t at = 0; at + PAGE <= bytes; at += PAGE) {
        if (at / PAGE % 4) {
            memset(memory + at, 0, PAGE);
            continue;
        }
        for (size_t word = 0; word < PAGE / 8; word++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((uint64_t *)(memory + at))[word] = state;
        }
    }
    struct rlimit limit;
    getrlimit(RLIMIT_CORE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_CORE, &limit);
    char byte;
    if (write(1, "ready\n", 6) != 6)
        return 1;
    while (read(0, &byte, 1) > 0)
        ;
    const char *number = getenv("CRASH_CLOCK_FD");
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t ns = now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
    if (number && write(atoi(number), &ns, sizeof ns) != sizeof ns)
        return 1;
    raise(SIGSEGV);
    return 1;
}
