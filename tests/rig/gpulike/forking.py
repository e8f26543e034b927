"""Engine processes that are forked from a process which has already imported vLLM: that import takes 10 s of CPU time each.

There is one such process for each kind of Triton (interpreted or absent), made by Python's
`multiprocessing.forkserver`. It has one thread and no sockets, has computed nothing and has loaded none of vLLM's
plugins but the platform. A child gets the environment of the process that starts it, as a spawned one does. The core of
an engine forks its workers before it starts threads.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import importlib.util
import io
import os
import signal
from multiprocessing import context, forkserver, popen_forkserver, spawn, util
from multiprocessing.context import reduction, set_spawning_popen  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any
from unittest import mock

import gpulike

__all__ = ["forked_engines"]


def forked_engines(environment: dict[str, str]) -> contextlib.AbstractContextManager[Any]:
    """A context in which vLLM forks the processes of its engines. The process to fork from is started here, before the context.

    `environment` is what gpulike.environment gave for the engine.
    """
    import vllm.v1.engine.utils as engine_utils

    server = _server("TRITON_INTERPRET" in environment)
    return mock.patch.object(engine_utils, "get_mp_context", return_value=_Context(server))


@functools.cache
def _server(interpreted: bool) -> forkserver.ForkServer:
    """The process to fork from. It is what it is started with: libraries, threads of OpenMP, and whether Triton is there."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["gpulike.preload"])
    settings = gpulike.environment("v2" if interpreted else "") | {
        "LD_PRELOAD": _preloaded(),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with mock.patch.dict(os.environ, settings):
        os.environ.pop("VLLM_PLUGINS", None)
        server.ensure_running()
    atexit.register(_end, server._forkserver_pid)
    return server


def _end(pid: int) -> None:
    """The process to fork from would end by itself, but nobody would have waited for it, nor counted the CPU time of engines."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def _preloaded() -> str:
    """Libraries that vLLM's CPU platform has its processes load first: tcmalloc, and PyTorch's own OpenMP."""
    vllm, torch = (Path(str(importlib.util.find_spec(name).origin)).parent for name in ("vllm", "torch"))  # type: ignore[union-attr]
    patterns = (
        vllm / "libs" / "libtcmalloc*.so*",
        torch.parent / "torch.libs" / "libgomp*.so*",
        torch / "lib" / "libgomp*.so*",
    )
    return ":".join(sorted({names[0] for pattern in patterns if (names := glob.glob(str(pattern)))}))


class _Popen(popen_forkserver.Popen):
    """Python's own, with the server of our choice."""

    def __init__(self, process: Any, server: forkserver.ForkServer) -> None:
        self._server = server
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        data = {name: value for name, value in spawn.get_preparation_data(process._name).items() if "main" not in name}
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(data, buffer)
            reduction.dump(process, buffer)
        finally:
            set_spawning_popen(None)
        self.sentinel, written = self._server.connect_to_new_process(self._fds)
        alive = os.dup(written)  # the child knows by it that its parent lives
        self.finalizer = util.Finalize(self, util.close_fds, (alive, self.sentinel))
        with open(written, "wb", closefd=True) as pipe:
            pipe.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _Process(context.ForkServerProcess):
    """Takes the environment of the process that starts it with it."""

    def __init__(self, *args: Any, server: forkserver.ForkServer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._popen_of = lambda process: _Popen(process, server)

    def _Popen(self, process: Any) -> _Popen:  # type: ignore[override]
        return self._popen_of(process)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_popen_of"}
        return state | {"environment": dict(os.environ) | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.environ.clear()
        os.environ.update(state.pop("environment"))
        self.__dict__.update(state)


class _Context(context.ForkServerContext):
    def __init__(self, server: forkserver.ForkServer) -> None:
        self.Process = functools.partial(_Process, server=server)  # type: ignore[assignment, misc]
