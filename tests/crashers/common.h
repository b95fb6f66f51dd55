/* What the programs here share: the last word on an error, joining a cgroup, and looking after one child. */
#ifndef CORE_PIPE_TESTS_COMMON_H
#define CORE_PIPE_TESTS_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static inline __attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...)
{
    int error = errno;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ": %s\n", strerror(error));
    _exit(125);
}

static inline const char *value_of(int argc, char **argv, int *index)
{
    if (*index + 1 >= argc) {
        errno = EINVAL;
        die("%s wants a value", argv[*index]);
    }
    return argv[++*index];
}

static inline void join_cgroup(const char *directory)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/cgroup.procs", directory);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) != 1)
        die("join %s", path);
    close(fd);
}

static inline int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The signals that a parent passes on. Block them before the fork, so that none falls between. */
static inline sigset_t supervised_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    int signals[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        sigaddset(&set, signals[i]);
    return set;
}

static inline void restore_signals(const sigset_t *before)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, before, NULL);
}

/*
 * Waits for the child; passes signals on (as `deliver`, when that is not 0). The end of `lifeline` (a pipe that the
 * test process holds) means that the tests died, even by SIGKILL: then the child is ended with `orphaned`.
 * Returns the wait status, and in *reaped_ns the moment.
 */
static inline int supervise(pid_t child, const sigset_t *signals, int lifeline, int deliver, int orphaned,
                            int64_t *reaped_ns)
{
    int events = signalfd(-1, signals, SFD_CLOEXEC);
    if (events < 0)
        die("signalfd");
    struct pollfd wanted[2] = {{.fd = events, .events = POLLIN}, {.fd = lifeline, .events = 0}};
    for (;;) {
        int status;
        pid_t got = waitpid(child, &status, WNOHANG);
        if (got == child) {
            *reaped_ns = monotonic_ns();
            close(events);
            return status;
        }
        if (got < 0)
            die("waitpid %d", child);
        if (poll(wanted, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (wanted[0].revents & POLLIN) {
            struct signalfd_siginfo info;
            if (read(events, &info, sizeof info) == sizeof info && info.ssi_signo != SIGCHLD)
                kill(child, deliver ? deliver : (int)info.ssi_signo);
        }
        if (wanted[1].revents & (POLLHUP | POLLERR)) {
            kill(child, orphaned);
            wanted[1].fd = -1;
        }
    }
}

#endif
