"""What a client makes of answers that do not fit its question."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from polder.broker.client import fetch_copy, fetch_table, status
from polder.broker.transport import encode
from polder.broker.wire import CopyFile, Done, FetchTable, FromBroker, Table
from polder.errors import ProtocolError


@contextmanager
def answering(path: Path, answer: FromBroker, descriptors: int) -> Iterator[None]:
    """A broker that gives everybody this answer, with so many descriptors."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, open(os.devnull) as file:
                peer.recv(65536)
                socket.send_fds(peer, [encode(answer)], [file.fileno()] * descriptors)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("descriptors", [0, 2])
def test_an_answer_with_another_number_of_descriptors_is_refused_and_closed(
    short_dir: Path, no_fd_leak: None, descriptors: int
) -> None:
    with answering(short_dir / "b", Table(), descriptors), pytest.raises(ProtocolError, match="descriptors"):
        fetch_table(short_dir / "b", FetchTable(engine="a", lender="a"))
    (short_dir / "b").unlink()
    with answering(short_dir / "b", CopyFile(filled=True), descriptors), pytest.raises(ProtocolError):
        fetch_copy(short_dir / "b", "key")


def test_an_answer_to_another_question_is_refused(short_dir: Path, no_fd_leak: None) -> None:
    with (
        answering(short_dir / "b", Done(), 0),
        pytest.raises(ProtocolError, match="Done is no answer to StatusRequest"),
    ):
        status(short_dir / "b")
