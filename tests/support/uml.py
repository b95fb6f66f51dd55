"""A kernel of its own for what this machine's has not: Debian's User-mode Linux (6.1), which is a program.

It boots in a second, on this machine's files (read-only), with one directory that it may write to and one disk. It has
ext4 with quotas. No process in it is a process of this machine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.mounts import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = "linux.uml"
MODULES = "/usr/lib/uml/modules"
DISK = "/dev/ubda"
SHARED = "/media"
MEMORY = "256M"

# User-mode Linux gives ptrace(2) 2696 bytes of extended registers, and the machine's kernel wants as many as the
# processor has: more, where it has AMX. What User-mode Linux does not know of stays as it is.
_REGISTERS = """\
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define NT_X86_XSTATE 0x202

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
        static char all[65536] __attribute__((aligned(64)));
        struct iovec *given = data, whole = {all, sizeof all};
        if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &whole) < 0)
            return -1;
        memcpy(all, given->iov_base, given->iov_len < whole.iov_len ? given->iov_len : whole.iov_len);
        return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, address, &whole);
    }
    if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
        long value;
        if (syscall(SYS_ptrace, request, pid, address, &value) < 0)
            return -1;
        errno = 0;
        return value;
    }
    return syscall(SYS_ptrace, request, pid, address, data);
}
"""


def why_unavailable() -> str | None:
    if shutil.which(PROGRAM) is None:
        return "needs User-mode Linux. Run: apt-get install user-mode-linux"
    return None


def run(directory: Path, disk: Path, *argv: str, timeout: float = 60) -> str:
    """Boot, run a program as root with `directory` at SHARED, and power off; return what was said.

    Raises TimeoutError. Everything of it ends with this call.
    """
    source, library, init = directory / "registers.c", directory / "registers.so", directory / "init"
    source.write_text(_REGISTERS, encoding="ascii")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=60)
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "tests.support.uml", str(directory), *argv))
    init.write_text(f"#!/bin/sh\ncd '{CHECKOUT}'\nexec {words}\n", encoding="ascii")
    init.chmod(0o755)
    process = subprocess.Popen(
        [
            PROGRAM,
            f"mem={MEMORY}",
            f"ubd0={disk}",
            f"uml_dir={directory}",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            "quiet",
            "panic=-1",
            "con=null",
            "con0=fd:0,fd:1",
            f"init={init}",
        ],
        env={"PATH": os.environ["PATH"], "LD_PRELOAD": str(library), "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{argv} did not end within {timeout:g} s in a kernel of its own") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return said.decode("utf-8", "replace")


def _load(name: str) -> None:
    (path,) = glob.glob(f"{MODULES}/{os.uname().release}/kernel/**/{name}.ko", recursive=True)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if libc.syscall(313, fd, b"", 0) != 0:  # finit_module(2)
        raise OSError(ctypes.get_errno(), path)
    os.close(fd)


def _init(directory: str, *argv: str) -> None:
    """Be that kernel's pid 1."""
    try:
        for kind, target, *options in (
            ("proc", "/proc"),
            ("sysfs", "/sys"),
            ("tmpfs", "/run"),
            ("cgroup2", "/sys/fs/cgroup"),
            ("hostfs", SHARED, "-o", directory),
        ):
            subprocess.run(["mount", "-t", kind, kind, target, *options], check=True)
        for module in ("quota_tree", "quota_v2"):
            _load(module)
        subprocess.run(argv, check=False)
    finally:
        os.sync()
        ctypes.CDLL(None).reboot(0x4321FEDC)  # RB_POWER_OFF


if __name__ == "__main__":
    _init(*sys.argv[1:])
