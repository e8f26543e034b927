"""One host copy for engines of the same weights: who fills it, who gets it, when it goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.broker import client, wire
from polder.broker.host_files import HostFiles
from polder.errors import BrokerUnavailable, UsageError
from polder.weights.host_copy import HostCopy
from tests.broker.test_server import Running, broker, wait_for

__all__ = ["broker"]

MAKER = """
import sys, time
from pathlib import Path
from polder.broker import client, wire
from polder.weights.host_copy import HostCopy
file, filled = client.fetch_copy(Path(sys.argv[1]), "k")
copy = HostCopy.make(2, 4096, file)
copy.bytes(1)[:] = 7
if sys.argv[2] == "fills":
    client.request(Path(sys.argv[1]), wire.CopyFilled(key="k"))
print(filled, flush=True); time.sleep(60)
"""


def maker(path: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", MAKER, str(path), what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_second_engine_maps_what_the_first_has_written(broker: Running) -> None:
    process = maker(broker.path, "fills")
    try:
        file, filled = client.fetch_copy(broker.path, "k")
        assert filled
        copy = HostCopy.open(file, 2, 4096)
        os.close(file)
    finally:
        ended(process)
    assert (copy.bytes(1) == 7).all(), "its maker is gone, its bytes are not"
    copy.close()


def test_while_one_writes_others_are_refused_and_when_it_dies_the_next_may_write(broker: Running) -> None:
    process = maker(broker.path, "dies")
    with pytest.raises(UsageError, match="writing this copy"):
        client.fetch_copy(broker.path, "k")
    other, filled = client.fetch_copy(broker.path, "other weights")
    os.close(other)
    assert not filled
    ended(process)
    wait_for(lambda: "k" not in broker.server.host_files.sizes())
    file, filled = client.fetch_copy(broker.path, "k")
    os.close(file)
    assert not filled


def test_who_did_not_fill_a_copy_cannot_say_that_it_is_full(broker: Running) -> None:
    process = maker(broker.path, "dies")
    with pytest.raises(BrokerUnavailable):
        client.request(broker.path, wire.CopyFilled(key="k"))
    ended(process)


asks = st.tuples(st.sampled_from(["ask", "fill", "end"]), st.sampled_from("kl"), st.integers(1, 3))


@settings(deadline=None)
@given(st.lists(asks, max_size=30))
def test_only_full_files_are_shared_and_none_outlives_its_users(events: list[tuple[str, str, int]]) -> None:
    files, makers, full = HostFiles(), dict[str, int](), set[str]()
    users: dict[str, set[int]] = {"k": set(), "l": set()}
    for event, key, pid in events:
        match event:
            case "ask":
                file = files.ask(key, pid)
                if key not in makers:
                    assert file is not None
                    assert not file.filled
                    makers[key] = pid
                    users[key].add(pid)
                elif key in full:
                    assert file is not None
                    assert file.filled
                    users[key].add(pid)
                else:
                    assert file is None
            case "fill":
                assert files.filled(key, pid) == (makers.get(key) == pid)
                if makers.get(key) == pid:
                    full.add(key)
            case "end":
                files.ended(pid)
                for name in list(makers):
                    users[name].discard(pid)
                    if not users[name]:
                        del makers[name]
                        full.discard(name)
        assert files.sizes().keys() == makers.keys()
    files.close()
