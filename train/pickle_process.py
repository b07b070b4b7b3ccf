"""The process that reads a pickled head: a program of its own, run by `train.pickled_heads`, that gives up its rights first.

The file comes on stdin, limits as arguments; the answer on stdout is a safetensors file of the estimator's numeric arrays, with
its class and plain attributes as metadata (exit code 0), or one line that says why the file is refused (exit code 3).

`pickle_reader.py` beside it calls nothing that a pickle names. In case it is wrong there, this process has an empty environment,
limits on memory, time and output, and, on Linux, a system call filter that leaves it reading, writing what is open already, and
memory. It runs isolated (`python -I`) and imports nothing of this project but that one file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import resource
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

REFUSED = 3
MAX_ANSWER_BYTES = 512 * 2**20


def reader() -> ModuleType:
    """`pickle_reader.py`, by its path: an isolated process looks for modules neither here nor in the current folder."""
    spec = importlib.util.spec_from_file_location("pickle_reader", Path(__file__).with_name("pickle_reader.py"))
    if spec is None or spec.loader is None:
        raise ImportError("pickle_reader.py is not beside this program")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Numbers of the system calls that may go on, by machine: read, write, close, fstat, lseek, mmap, mprotect, munmap, brk,
# rt_sigaction, rt_sigprocmask, rt_sigreturn, mremap, madvise, getpid, futex, clock_gettime, sched_yield, getrandom, exit,
# exit_group.
_ALLOWED_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28, 39, 202, 228, 24, 318, 60, 231)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 216, 233, 172, 98, 113, 124, 278, 93, 94)),
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH_EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000


def seal() -> bool:
    """Leaves this process only the system calls of `_ALLOWED_CALLS`; False where the kernel or machine has no such filter."""
    if sys.platform != "linux" or platform.machine() not in _ALLOWED_CALLS:
        return False
    architecture, calls = _ALLOWED_CALLS[platform.machine()]
    steps = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_JUMP_IF_EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    steps += [(_RETURN, 0, 0, _FAIL_WITH_EPERM), (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return not libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """The kernel's limits on this process: address space, processor time, size of what it writes, no new files or processes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_ANSWER_BYTES, MAX_ANSWER_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def main(memory_bytes: int, cpu_s: int) -> NoReturn:
    """Reads stdin, answers on stdout."""
    pickles = reader()
    max_bytes: int = pickles.MAX_FILE_BYTES
    data = sys.stdin.buffer.read(max_bytes + 1)
    limit(memory_bytes, cpu_s)
    seal()
    code, answer = 0, b""
    try:
        if len(data) > max_bytes:
            raise pickles.RefusedError(f"larger than {max_bytes} bytes")
        answer = pickles.read(data)
    except pickles.RefusedError as exc:
        code, answer = REFUSED, str(exc).encode("utf-8", "replace")
    except MemoryError:
        code, answer = REFUSED, f"it needs more than {memory_bytes // 2**20} MiB of memory".encode()
    view = memoryview(answer)
    while view:
        view = view[os.write(1, view) :]
    os._exit(code)  # no destructors: whatever the pickle built is not worth taking apart


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
