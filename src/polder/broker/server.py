"""The broker's sockets: one thread and one selector around the state machine of core.py.

Only processes of the broker's own user may speak (SO_PEERCRED), through a socket of mode 0600. A peer that sends
nonsense loses its connection; nobody else is affected. Every process that says Hello or Fetch is watched by a pidfd
taken from its connection, so a recycled process id is never mistaken for it. The end of a process wakes the selector at
once.

A stale socket file (it is there, and nobody listens) means that the former broker was killed. Its engines may still
hold memory, so this broker grants nothing until `recovery_s` has passed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.device_pages import DevicePages
from polder.broker.fetching import check_fetch, check_table
from polder.broker.host_files import HostFiles
from polder.broker.transport import Deframer, address_of, check_socket_path, encode, find_stale, to_broker
from polder.broker.wire import (
    MAX_FDS,
    PROTOCOL,
    CopyFile,
    CopyFilled,
    Done,
    Fetch,
    FetchCopy,
    FetchTable,
    Handles,
    Hello,
    Message,
    Refused,
    Stock,
    Table,
    ToBroker,
)
from polder.errors import AddressInUse, PolderError, ProtocolError
from polder.memory.devices import device_uuid
from polder.memory.limits import raise_open_files
from polder.tiers.peer.lending import LendingTable

__all__ = ["BrokerServer", "serve"]

logger = logging.getLogger("polder.broker")

TICK_S = 0.05
ORPHAN_GRACE_S = 0.5
MAX_BACKLOG = 16 << 20  # bytes queued for a peer that does not read
SO_PEERPIDFD = 77  # <linux/socket.h>, since Linux 6.5; not in Python's socket module


def serve(config: BrokerConfig, *, stop: threading.Event | None = None) -> None:
    """Runs a broker until `stop`, SIGTERM or SIGINT, then removes its socket. Raises AddressInUse if one runs there
    already."""
    stop = stop or threading.Event()
    server = BrokerServer(config)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, lambda *_: stop.set())
    try:
        server.run(stop)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        server.close()


@dataclass(eq=False, kw_only=True)
class _Peer:
    number: int
    socket: socket.socket
    pid: int
    deframer: Deframer[ToBroker]
    out: deque[tuple[bytes, list[int]]] = field(default_factory=deque)
    queued: int = 0


@dataclass(eq=False, kw_only=True)
class _Process:
    pid: int
    pidfd: int
    killed: bool = False


def _unseen(peer: _Peer, message: ToBroker) -> str:
    """Why the broker and this process cannot know each other by process id, and what to change. "": they can.

    A lender tells by a process id whether a borrower lives. In another PID namespace an id is nobody's, or another
    process's. The kernel gives 0 for a process in a namespace that is not below the broker's.
    """
    # A Hello of another protocol may lack the id; it is refused for that.
    said = message.pid if isinstance(message, Hello) and message.protocol == PROTOCOL else peer.pid
    if peer.pid and said == peer.pid:
        return ""
    return (
        f"another PID namespace: the broker sees this process as {peer.pid or 'nobody'}, and it is {said or 'another'} to itself. "
        "Run the broker and its engines in one (shareProcessNamespace: true in a pod, --pid in Docker)"
    )


class BrokerServer:
    """Owns the devices' pages, the listening socket and the connections."""

    def __init__(self, config: BrokerConfig) -> None:
        """Takes the socket and the memory. Raises AddressInUse, ConfigError, OutOfPages."""
        check_socket_path(config.socket)
        raise_open_files()
        self._config = config
        self._listener, crashed_before = _listen(config.socket)
        try:
            self._open(config, crashed_before)
        except BaseException:
            self._listener.close()
            with contextlib.suppress(OSError):
                config.socket.unlink()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._peers: dict[int, _Peer] = {}
        self._processes: dict[int, _Process] = {}
        self._tables: dict[str, tuple[int, int]] = {}  # lender -> (process of its core, fd of its table)
        self.host_files = HostFiles()
        self._next = 1

    def _open(self, config: BrokerConfig, crashed_before: bool) -> None:
        now = time.monotonic()
        self.core = BrokerCore(
            config=config,
            generation=int.from_bytes(os.urandom(4)) >> 1,
            started_at=now,
            recovering_until=now + config.recovery_s if crashed_before else float("-inf"),
        )
        self.core.uuids = {device: device_uuid(device) for device in config.devices}
        self._pages = DevicePages(config, self.core.ledger, self.core.reserve_bytes, crashed_before=crashed_before)

    def run(self, stop: threading.Event) -> None:
        next_tick = time.monotonic()
        while not stop.is_set():
            for key, events in self._selector.select(max(0.0, next_tick - time.monotonic())):
                if key.data is None:
                    self._accept()
                elif isinstance(key.data, _Process):
                    self._ended(key.data)
                else:
                    self._serve_peer(key.data, events)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_S
                self._tick(now)
            self._flush()

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        for process in self._processes.values():
            os.close(process.pidfd)
        self._processes.clear()
        for lender in list(self._tables):
            self._retire(lender)
        self.host_files.close()
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._config.socket.unlink()
        self._pages.close()

    # ------------------------------------------------------------------ events

    def _tick(self, now: float) -> None:
        for pid in self.core.orphans(now, ORPHAN_GRACE_S):
            process = self._processes.get(pid)
            if process is not None and not process.killed:
                process.killed = True
                logger.warning("worker %d outlived its engine core: killing it", pid)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        self._pages.make_missing(now)
        self.core.plan(now)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            logger.warning("refused process %d of user %d: only user %d may connect", pid, uid, os.getuid())
            self.core.refused_messages += 1
            connection.close()
            return
        peer = _Peer(number=self._next, socket=connection, pid=pid, deframer=to_broker())
        self._next += 1
        self._peers[peer.number] = peer
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _serve_peer(self, peer: _Peer, events: int) -> None:
        if events & selectors.EVENT_READ:
            try:
                data = peer.socket.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(peer)
                return
            try:
                for message in peer.deframer.feed(data):
                    self._handle(peer, message)
            except ProtocolError as error:
                logger.warning("process %d: %s; closing its connection", peer.pid, error)
                self.core.refused_messages += 1
                self._drop(peer)

    def _handle(self, peer: _Peer, message: ToBroker) -> None:
        if isinstance(message, Hello | Fetch | FetchCopy | Stock):
            if why := _unseen(peer, message):
                self._queue(peer, Refused(reason=why))
                return
            if peer.pid not in self._processes:
                self._watch(peer)
        match message:
            case Fetch():
                refused = check_fetch(self.core.roster, peer.pid, message)
                self._queue(peer, refused) if refused else self._send_handles(peer, message)
            case FetchTable():
                refused = check_table(self.core.roster, message)
                self._queue(peer, refused) if refused else self._send_table(peer, message)
            case FetchCopy():
                file = self.host_files.ask(message.key, peer.pid)
                if file is None:
                    self._queue(peer, Refused(reason="another engine is writing this copy just now"))
                else:
                    self._queue(peer, CopyFile(filled=file.filled), [os.dup(file.fd)])
            case CopyFilled():
                if not self.host_files.filled(message.key, peer.pid):
                    raise ProtocolError("a host copy was reported full by a process that did not fill it")
                self._queue(peer, Done())
            case _:
                self.core.handle(peer.number, peer.pid, message, time.monotonic())

    def _send_table(self, peer: _Peer, message: FetchTable) -> None:
        """Sends the lender's table. It is made when the lender itself asks for it first."""
        lender = self.core.engines[message.lender]
        pid, fd = self._tables.get(message.lender, (0, -1))
        if pid != lender.pid:
            if message.engine != message.lender:
                self._queue(peer, Refused(reason=f"{message.lender!r} has no table yet"))
                return
            self._retire(message.lender)
            fd = os.memfd_create(f"polder-lent-{message.lender}", os.MFD_CLOEXEC)
            os.ftruncate(fd, lender.hello.table_bytes)
            self._tables[message.lender] = lender.pid, fd
        self._queue(peer, Table(), [os.dup(fd)])

    def _retire(self, lender: str) -> None:
        """Takes back what an ended lender had lent, before its pages can go to anybody else (law 4)."""
        _, fd = self._tables.pop(lender, (0, -1))
        if fd >= 0:
            try:
                table = LendingTable(fd)
            except ProtocolError:
                logger.debug("%s ended before it had filled its table", lender)
            else:
                table.retire()
                table.close()
            os.close(fd)

    def _send_handles(self, peer: _Peer, message: Fetch) -> None:
        try:
            fds, fd_index, offsets = self._pages.export(message.device, message.pages)
        except PolderError as error:
            logger.warning("%d pages of %s cannot be handed out: %s", len(message.pages), message.device, error)
            self._queue(peer, Refused(reason=f"{message.device}: {error}"))
            return
        if len(fds) > MAX_FDS:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(
                f"{len(message.pages)} pages asked for at once, at most {MAX_FDS} file descriptors travel"
            )
        self._queue(peer, Handles(generation=self.core.generation, fd_index=fd_index, offsets=offsets), fds)
        self._write(peer)  # at once: one descriptor per page stays open here until it is sent

    def _watch(self, peer: _Peer) -> None:
        """Watches the peer's process by a pidfd: from its connection, which excludes a recycled id, or by id on older
        kernels."""
        try:
            pidfd = peer.socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            try:
                pidfd = os.pidfd_open(peer.pid)
            except ProcessLookupError:
                raise ProtocolError("the process ended before it was served") from None
        process = _Process(pid=peer.pid, pidfd=pidfd)
        self._processes[peer.pid] = process
        self._selector.register(pidfd, selectors.EVENT_READ, process)

    def _ended(self, process: _Process) -> None:
        self._selector.unregister(process.pidfd)
        os.close(process.pidfd)
        del self._processes[process.pid]
        logger.info("process %d ended", process.pid)
        for lender in [name for name, (pid, _) in self._tables.items() if pid == process.pid]:
            self._retire(lender)
        self.host_files.ended(process.pid)
        self.core.process_ended(process.pid, time.monotonic())

    # ------------------------------------------------------------------ output

    def _flush(self) -> None:
        outbox, self.core.outbox = self.core.outbox, []
        for number, message in outbox:
            peer = self._peers.get(number)
            if peer is not None:
                self._queue(peer, message)
        for peer in list(self._peers.values()):
            if peer.out:
                self._write(peer)

    def _queue(self, peer: _Peer, message: Message, fds: Sequence[int] = ()) -> None:
        frame = encode(message)
        peer.out.append((frame, list(fds)))
        peer.queued += len(frame)
        if peer.queued > MAX_BACKLOG:
            logger.warning("process %d does not read: closing its connection", peer.pid)
            self._drop(peer)

    def _write(self, peer: _Peer) -> None:
        try:
            while peer.out:
                frame, fds = peer.out[0]
                sent = socket.send_fds(peer.socket, [frame], fds) if fds else peer.socket.send(frame)
                for fd in fds:
                    os.close(fd)
                peer.queued -= sent
                if sent < len(frame):
                    peer.out[0] = (frame[sent:], [])
                else:
                    peer.out.popleft()
        except BlockingIOError:
            self._selector.modify(peer.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
            return
        except OSError as error:
            # ETOOMANYREFS: too many descriptors are in flight; the kernel takes more when some are received.
            if error.errno != errno.ETOOMANYREFS:
                self._drop(peer)
            return
        self._selector.modify(peer.socket, selectors.EVENT_READ, peer)

    def _drop(self, peer: _Peer) -> None:
        if self._peers.pop(peer.number, None) is None:
            return
        self._selector.unregister(peer.socket)
        peer.socket.close()
        for _, fds in peer.out:
            for fd in fds:
                os.close(fd)
        self.core.disconnected(peer.number)


def _listen(path: Path) -> tuple[socket.socket, bool]:
    """Binds the socket. The second value says whether a former broker left its file behind, so that it was killed."""
    stale = find_stale(path)
    abstract = str(path).startswith("@")
    if not abstract:
        path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(address_of(path))
        if not abstract:
            os.chmod(path, 0o600)  # before listen(): nobody can connect to a socket that is still open to others
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise AddressInUse(f"cannot listen on {path}: {error.strerror}") from error
    return listener, stale
