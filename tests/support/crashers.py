"""The C programs in tests/crashers, compiled when they are asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile

SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "crashers")
# Where the programs are, on the host and (read-only) in every container. Not in /tmp or /run, which containers have of
# their own.
TOOLS = "/var/cache/core_pipe-tests"

# Those that must run in, or start, a root file system with another C library or none.
_STATIC = ("enter", "contain")


def compile_crasher(name: str, outdir: str | None = None) -> str:
    """Compile tests/crashers/`name`.c, unless the same source is compiled already, and return the program's path."""
    digest = hashlib.sha256()
    for file in ("common.h", f"{name}.c"):
        with open(os.path.join(SOURCES, file), "rb") as source:
            digest.update(source.read() + b"\0")
    directory = os.path.join(outdir or TOOLS, digest.hexdigest()[:12])
    program = os.path.join(directory, name)
    if os.path.exists(program):
        return program
    os.makedirs(directory, mode=0o755, exist_ok=True)
    # Complete or not there: another run may look for it at the same time.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    os.close(descriptor)
    try:
        link = ["-static"] if name in _STATIC else ["-pthread"]
        command = ["gcc", "-g", "-O0", "-Wall", "-Wextra", *link, "-o", temporary, os.path.join(SOURCES, f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.chmod(temporary, 0o755)
        os.rename(temporary, program)
    except BaseException:
        os.unlink(temporary)
        raise
    return program


def why_unavailable() -> str | None:
    return None if shutil.which("gcc") else "needs gcc: apt-get install gcc libc6-dev"


def known_bytes(size: int, kind: str = "random") -> bytes:
    """What `crash --fill SIZE KIND` has in known_buffer, computed by a second implementation. Slow past some MiB."""
    state, words = 1, bytearray()
    for index in range((size + 7) // 8):
        if kind == "random":
            state ^= (state << 13) & 0xFFFFFFFFFFFFFFFF
            state ^= state >> 7
            state ^= (state << 17) & 0xFFFFFFFFFFFFFFFF
            word = state
        else:
            word = 0 if kind == "zero" else index // 64
        words += word.to_bytes(8, "little")
    return bytes(words[:size])


def known_sha256(size: int, kind: str = "random") -> str:
    """The digest of known_buffer, of any size (the crasher itself writes the bytes, in seconds per GiB)."""
    digest = hashlib.sha256()
    with subprocess.Popen(
        [compile_crasher("crash"), "--print-fill", str(size), kind], stdout=subprocess.PIPE
    ) as printer:
        assert printer.stdout is not None
        while block := printer.stdout.read(1 << 20):
            digest.update(block)
    if printer.returncode != 0:
        raise RuntimeError(f"crash --print-fill ended with {printer.returncode}")
    return digest.hexdigest()
