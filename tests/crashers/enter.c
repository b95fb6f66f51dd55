/*
 * enter [--target PID] [--cgroup DIR]... [--report FD] [--crash-clock] [--lifeline FD] [--orphaned SIGNAL]
 *       -- PROGRAM [ARG]...
 *
 * Runs a program in the namespaces of another process, the way `docker exec` does: its parent stays outside. nsenter(1)
 * does that too, but hides the wait status and ends by the same signal, which is a second crash.
 *
 * --cgroup    joins DIR (a cgroup directory) first
 * --report    a descriptor that gets two lines of JSON: the pids at the start, the wait status at the end
 * --crash-clock  the program gets a descriptor, named by CRASH_CLOCK_FD, to write the moment of its crash to
 * --lifeline  a descriptor whose end means that the caller died: the program gets the --orphaned signal (SIGKILL)
 *
 * The exit status is the program's, or 128 + its signal. The program dies with this process.
 */
#include "common.h"

/* One by one, not with a pidfd: a kernel before 5.8 has no setns(pidfd), and an own namespace cannot be entered again. */
static const struct {
    const char *name;
    int flag;
} NAMESPACES[] = {
    {"user", CLONE_NEWUSER}, {"cgroup", CLONE_NEWCGROUP}, {"ipc", CLONE_NEWIPC}, {"uts", CLONE_NEWUTS},
    {"net", CLONE_NEWNET},   {"pid", CLONE_NEWPID},       {"mnt", CLONE_NEWNS},
};
enum { COUNT = sizeof NAMESPACES / sizeof *NAMESPACES };

/* Those that this process may enter as it is come first; then the user namespace, which gives it the right to the rest. */
static int enter_namespaces(pid_t target)
{
    int fds[COUNT], user = 0;
    for (int i = 0; i < COUNT; i++) {
        char theirs[64], ours[64];
        struct stat a, b;
        snprintf(theirs, sizeof theirs, "/proc/%d/ns/%s", target, NAMESPACES[i].name);
        snprintf(ours, sizeof ours, "/proc/self/ns/%s", NAMESPACES[i].name);
        fds[i] = -1;
        if (stat(ours, &b) < 0)
            continue;
        if (stat(theirs, &a) < 0)
            die("%s", theirs);
        if (a.st_ino == b.st_ino && a.st_dev == b.st_dev)
            continue;
        fds[i] = open(theirs, O_RDONLY | O_CLOEXEC);
        if (fds[i] < 0)
            die("open %s", theirs);
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < COUNT; i++) {
            if (fds[i] < 0 || (pass == 0 && NAMESPACES[i].flag == CLONE_NEWUSER))
                continue;
            if (setns(fds[i], NAMESPACES[i].flag) < 0) {
                if (pass == 0)
                    continue;
                die("setns %s", NAMESPACES[i].name);
            }
            user |= NAMESPACES[i].flag == CLONE_NEWUSER;
            close(fds[i]);
            fds[i] = -1;
        }
    }
    return user;
}

int main(int argc, char **argv)
{
    pid_t target = 0;
    int report = -1, lifeline = -1, with_clock = 0, orphaned = SIGKILL, i;
    for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (!strcmp(argv[i], "--target"))
            target = atoi(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--cgroup"))
            join_cgroup(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--crash-clock"))
            with_clock = 1;
        else if (!strcmp(argv[i], "--report"))
            report = atoi(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--lifeline"))
            lifeline = atoi(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--orphaned"))
            orphaned = atoi(value_of(argc, argv, &i));
        else {
            errno = EINVAL;
            die("%s", argv[i]);
        }
    }
    if (i + 1 >= argc) {
        errno = EINVAL;
        die("enter [OPTION]... -- PROGRAM [ARG]...");
    }
    char **program = argv + i + 1;
    if (report >= 0)
        fcntl(report, F_SETFD, FD_CLOEXEC);
    if (lifeline >= 0)
        fcntl(lifeline, F_SETFD, FD_CLOEXEC);

    sigset_t signals = supervised_signals(), before;
    sigprocmask(SIG_BLOCK, &signals, &before);
    int pids[2], crash_clock[2];
    if (pipe2(pids, O_CLOEXEC) < 0 || pipe2(crash_clock, O_CLOEXEC) < 0)
        die("pipe");

    /* A helper enters the namespaces and gives this process the program as a child: so nothing of the container is held
       by a process outside it. */
    pid_t helper = fork();
    if (helper < 0)
        die("fork");
    if (helper == 0) {
        int user = target ? enter_namespaces(target) : 0;
        pid_t child = (pid_t)syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, NULL);
        if (child < 0)
            die("clone");
        if (child > 0) {
            if (write(pids[1], &child, sizeof child) != sizeof child)
                die("pipe");
            _exit(0);
        }
        if (user && ((void)syscall(SYS_setgroups, 0, NULL), setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0))
            die("become root in the user namespace");
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (target && chdir("/") < 0)
            die("chdir /");
        pid_t self = getpid();
        if (write(pids[1], &self, sizeof self) != sizeof self)
            die("pipe");
        if (with_clock) {
            /* A high number: a program that counts its descriptors is not confused by a low one. */
            int clock_fd = fcntl(crash_clock[1], F_DUPFD, 900);
            char number[16];
            snprintf(number, sizeof number, "%d", clock_fd);
            setenv("CRASH_CLOCK_FD", number, 1);
        }
        restore_signals(&before);
        execvp(program[0], program);
        fprintf(stderr, "exec %s: %s\n", program[0], strerror(errno));
        _exit(127);
    }
    close(pids[1]);
    close(crash_clock[1]);
    int status;
    if (waitpid(helper, &status, 0) < 0)
        die("waitpid");
    if (status != 0)
        return 125;
    /* Two pids in either order: the one that this side knows is the one that is our child. */
    pid_t seen[2] = {0, 0};
    for (int n = 0; n < 2; n++)
        if (read(pids[0], &seen[n], sizeof(pid_t)) != sizeof(pid_t))
            break;
    close(pids[0]);
    siginfo_t info;
    int first_is_ours = seen[0] && waitid(P_PID, seen[0], &info, WEXITED | WNOHANG | WNOWAIT) == 0;
    pid_t child = first_is_ours ? seen[0] : seen[1];
    pid_t inside = first_is_ours ? seen[1] : seen[0];
    if (report >= 0)
        dprintf(report, "{\"host_pid\": %d, \"pid\": %d}\n", child, inside);

    int64_t reaped_ns, crash_ns = -1;
    status = supervise(child, &signals, lifeline, 0, orphaned, &reaped_ns);
    if (report >= 0) {
        fcntl(crash_clock[0], F_SETFL, O_NONBLOCK);
        if (read(crash_clock[0], &crash_ns, sizeof crash_ns) != sizeof crash_ns)
            crash_ns = -1;
        dprintf(report, "{\"status\": %d, \"reaped_ns\": %lld, \"crash_ns\": %lld}\n", status, (long long)reaped_ns,
                (long long)crash_ns);
    }
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
