"""Runs between Polder and one child, so that the child's whole process tree ends whatever happens to Polder.

    python -I -S guard.py PARENT_PID GRACE_S COMMAND...

vLLM's API server starts an engine core, which starts workers. PR_SET_PDEATHSIG would reach only the first of them, and
only when the thread that started it ends. So this process watches. It is a subreaper: orphans of its child become its
own children, even from another session. Guarantees:

  * It ends only when no descendant of its child is left.
  * SIGTERM and SIGINT are passed on to the child. SIGQUIT kills the whole tree at once.
  * When the parent dies, also by kill -9, the child gets SIGTERM, and after GRACE_S the tree is killed.
  * When this process is killed, the child dies with it (PR_SET_PDEATHSIG), and ManagedProcess kills the rest of the
    group.
  * Shared memory and semaphores of Python's that the tree leaves behind are removed. An engine that is stopped while
    it loads leaves some.
  * It ends with the child's code, or 128 + N for signal N, as a shell does; 127 when the command cannot be started.

It uses the standard library only, without site-packages: it costs 15 ms and a few MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEAVE_S = 2.0  # orphans get SIGTERM and this time before SIGKILL
SHARED = "/dev/shm/"
NAMES = ("psm_", "sem.mp-")
"""multiprocessing's shared memory, which vLLM's processes speak through, and semaphores."""
TRACKER_S = 1.0
"""Extra time for multiprocessing's resource tracker, which removes shared memory once all its users are gone."""


def main(arguments: list[str]) -> int:
    parent, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        parent_fd = os.pidfd_open(parent)
    except ProcessLookupError:
        return 1
    if os.getppid() != parent:  # the parent died before the line above
        return 1
    wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_out)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        # One thread here, so code between fork and exec is safe.
        child = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    segments: set[str] = set()
    kill_now = _watch(child, parent_fd, wake_in, grace_s, segments)
    _sweep(child, 0.0 if kill_now else LEAVE_S, segments)
    _remove(segments)
    code = child.wait()
    return 128 - code if code < 0 else code


def _watch(child: subprocess.Popen[bytes], parent_fd: int, wake: int, grace_s: float, segments: set[str]) -> bool:
    """Returns when the child has ended, or (True) when the tree must be killed now. Adds what shared memory it has by
    then to `segments`."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(parent_fd, select.POLLIN)
    deadline = float("inf")
    while child.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        ready = dict(poll.poll(None if left == float("inf") else left * 1000))
        segments |= _mapped(_tree())
        if wake in ready:
            numbers = os.read(wake, 4096)
            if signal.SIGQUIT in numbers:
                return True
            for number in (signal.SIGTERM, signal.SIGINT):
                if number in numbers:
                    child.send_signal(number)
        if parent_fd in ready:
            poll.unregister(parent_fd)
            deadline = time.monotonic() + grace_s
            child.terminate()
    return False


def _sweep(child: subprocess.Popen[bytes], leave_s: float, segments: set[str]) -> None:
    """Ends all remaining processes. In rounds, because the children of a killed process become children of this one."""
    kill_at = time.monotonic() + leave_s
    told: set[int] = set()
    while True:
        child.poll()
        pids = _children()
        if not pids:
            return
        segments |= _mapped(_tree())
        now = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if pid != child.pid and os.waitpid(pid, os.WNOHANG)[0]:
                    continue
                if now < kill_at:
                    if pid not in told:
                        told.add(pid)
                        os.kill(pid, signal.SIGTERM)
                elif not _is_tracker(pid) or now > kill_at + TRACKER_S:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    return found


def _children() -> list[int]:
    """Children of this process, orphans that it inherited included."""
    return [pid for pid, parent in _parents().items() if parent == os.getpid()]


def _tree() -> list[int]:
    """All descendants of this process."""
    parents, found = _parents(), [os.getpid()]
    for above in found:
        found += [pid for pid, parent in parents.items() if parent == above]
    return found[1:]


def _mapped(pids: Iterable[int]) -> set[str]:
    """Names of the shared memory and semaphores that these processes have mapped.

    By inode: who has made a semaphore has mapped it under another name, which is gone.
    """
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as file:
            inodes |= {int(line.split(maxsplit=5)[4]) for line in file if SHARED in line}
    with contextlib.suppress(OSError), os.scandir(SHARED) as entries:
        return {entry.path for entry in entries if entry.name.startswith(NAMES) and entry.inode() in inodes}
    return set()


def _remove(segments: set[str]) -> None:
    """Removes those that are still there and that no process has mapped."""
    left = {path for path in segments if os.path.exists(path)}
    for path in left - _mapped(_parents()) if left else ():
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
