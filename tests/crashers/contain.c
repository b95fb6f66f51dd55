/*
 * contain --root DIR [--cgroup DIR]... [--user FIRST:COUNT] [--hostname NAME] [--share-uts] [--tmpfs PATH=OPTIONS]...
 *         [--bind PATH]... [--ready FD] [--lifeline FD] [-- PROGRAM [ARG]...]
 *
 * A container in one page: DIR (a directory that is prepared) becomes the root of new mount, pid, ipc, net, cgroup and uts
 * namespaces, and with --user of a user namespace in which root is FIRST outside. Its pid 1 is PROGRAM, or this program,
 * which then only reaps. --tmpfs mounts and --bind read-only views of the host come on top. SIGTERM ends the container.
 */
#include "common.h"
#include <sys/mount.h>

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
struct attributes {
    uint64_t set, clear, propagation, userns_fd;
};
enum { ATTR_RDONLY = 1 };

static const char *root;

static const char *below_root(const char *path)
{
    static char buffer[2][4096];
    static int turn;
    turn = !turn;
    snprintf(buffer[turn], sizeof buffer[turn], "%s%s", root, path);
    return buffer[turn];
}

static void make_directories(const char *path)
{
    char partial[4096];
    for (size_t i = 1; path[i - 1]; i++)
        if (path[i] == '/' || path[i] == '\0') {
            snprintf(partial, sizeof partial, "%.*s", (int)i, path);
            if (mkdir(partial, 0755) < 0 && errno != EEXIST)
                die("mkdir %s", partial);
        }
}

static void mount_at(const char *source, const char *path, const char *type, unsigned long flags, const char *options)
{
    const char *target = below_root(path);
    make_directories(target);
    if (mount(source, target, type, flags, options) < 0)
        die("mount %s on %s (%s)", source, target, options ? options : "");
}

static void make_read_only(const char *path)
{
    struct attributes attributes = {.set = ATTR_RDONLY};
    const char *target = below_root(path);
    if (syscall(SYS_mount_setattr, AT_FDCWD, target, 0x8000 /* AT_RECURSIVE */, &attributes, sizeof attributes) < 0)
        die("read-only %s", target);
}

static void mount_devices(void)
{
    static const char *const nodes[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"};
    mount_at("dev", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=1m");
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        const char *target = below_root(nodes[i]);
        int fd = open(target, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
        if (fd < 0)
            die("create %s", target);
        close(fd);
        if (mount(nodes[i], target, NULL, MS_BIND, NULL) < 0)
            die("bind %s", target);
    }
    mount_at("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    if (symlink("/proc/self/fd", below_root("/dev/fd")) < 0 || symlink("/proc/self/fd/0", below_root("/dev/stdin")) < 0 ||
        symlink("/proc/self/fd/1", below_root("/dev/stdout")) < 0 || symlink("/proc/self/fd/2", below_root("/dev/stderr")) < 0)
        die("symlinks in /dev");
}

static __attribute__((noreturn)) void reap_forever(void)
{
    prctl(PR_SET_NAME, "init");
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    for (;;) {
        int number;
        sigset_t wanted;
        sigemptyset(&wanted);
        sigaddset(&wanted, SIGCHLD);
        sigaddset(&wanted, SIGTERM);
        sigwait(&wanted, &number);
        if (number == SIGTERM)
            _exit(0);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    }
}

static void write_file(pid_t pid, const char *name, const char *text)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        die("write %s", path);
    close(fd);
}

int main(int argc, char **argv)
{
    unsigned long flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWUTS;
    const char *user = NULL, *hostname = NULL;
    int ready = -1, lifeline = -1, i;
    for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (!strcmp(argv[i], "--root"))
            root = value_of(argc, argv, &i);
        else if (!strcmp(argv[i], "--cgroup"))
            join_cgroup(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--user"))
            user = value_of(argc, argv, &i);
        else if (!strcmp(argv[i], "--hostname"))
            hostname = value_of(argc, argv, &i);
        else if (!strcmp(argv[i], "--share-uts"))
            flags &= ~(unsigned long)CLONE_NEWUTS;
        else if (!strcmp(argv[i], "--ready"))
            ready = atoi(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--lifeline"))
            lifeline = atoi(value_of(argc, argv, &i));
        else if (!strcmp(argv[i], "--tmpfs") || !strcmp(argv[i], "--bind"))
            value_of(argc, argv, &i); /* read again inside, in their order */
        else {
            errno = EINVAL;
            die("%s", argv[i]);
        }
    }
    if (root == NULL || root[0] != '/') {
        errno = EINVAL;
        die("--root");
    }
    if (user)
        flags |= CLONE_NEWUSER;
    char **program = i + 1 < argc ? argv + i + 1 : NULL;

    sigset_t signals = supervised_signals(), before;
    sigprocmask(SIG_BLOCK, &signals, &before);
    int go[2], done[2];
    if (pipe2(go, O_CLOEXEC) < 0 || pipe2(done, O_CLOEXEC) < 0)
        die("pipe");
    pid_t child = (pid_t)syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
    if (child < 0)
        die("clone");
    if (child > 0) {
        if (user) {
            unsigned long first, count;
            char map[128];
            if (sscanf(user, "%lu:%lu", &first, &count) != 2)
                die("--user %s", user);
            snprintf(map, sizeof map, "0 %lu %lu\n", first, count);
            write_file(child, "uid_map", map);
            write_file(child, "gid_map", map);
        }
        close(go[0]);
        close(go[1]);
        close(done[1]);
        char byte;
        if (read(done[0], &byte, 1) == 1 && ready >= 0) {
            dprintf(ready, "{\"init\": %d}\n", child);
            close(ready);
        }
        int64_t reaped_ns;
        int status = supervise(child, &signals, lifeline, SIGKILL, SIGKILL, &reaped_ns);
        return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    }

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(go[1]);
    char byte;
    if (read(go[0], &byte, 1) != 0)
        die("pipe");
    if (user && ((void)syscall(SYS_setgroups, 0, NULL), setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0))
        die("become root in the user namespace");
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* setresuid() has cleared it */
    if (hostname && sethostname(hostname, strlen(hostname)) < 0)
        die("sethostname");
    umask(0);
    /* A mount that came from another user namespace is locked in its place; a bind mount of it is not. */
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount(root, root, NULL, MS_BIND | MS_REC, NULL) < 0)
        die("bind %s", root);
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    /* The machine's core_pattern is not the container's to write. */
    mount_at(below_root("/proc/sys"), "/proc/sys", NULL, MS_BIND | MS_REC, NULL);
    make_read_only("/proc/sys");
    mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL);
    mount_devices();
    for (int n = 1; n < i; n++) {
        if (!strcmp(argv[n], "--tmpfs")) {
            char path[1024];
            const char *options = strchr(argv[++n], '=');
            snprintf(path, sizeof path, "%.*s", options ? (int)(options - argv[n]) : (int)strlen(argv[n]), argv[n]);
            mount_at("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options ? options + 1 : NULL);
        } else if (!strcmp(argv[n], "--bind")) {
            const char *path = argv[++n];
            mount_at(path, path, NULL, MS_BIND | MS_REC, NULL);
            make_read_only(path);
        } else if (argv[n][0] == '-' && strcmp(argv[n], "--share-uts") != 0) {
            n++;
        }
    }
    if (chdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        die("pivot_root %s", root);
    umask(022);
    setsid();
    if (write(done[1], "1", 1) != 1)
        die("pipe");
    syscall(SYS_close_range, 3U, ~0U, 0);
    if (program) {
        restore_signals(&before);
        execvp(program[0], program);
        die("exec %s", program[0]);
    }
    reap_forever();
}
