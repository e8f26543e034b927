"""Orders reach a fleet at any time, also after something has removed the socket on which it takes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from polder.errors import BrokerUnavailable, EnvironmentFault, PolderError, UsageError
from polder.serve.control import Order, carried_out, give
from tests.serve.fakes import wait_for

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def carry_out(order: Order) -> str:
    if order.verb == "add":
        raise UsageError("no such model")
    if order.verb == "restart":
        raise EnvironmentFault("it did not start")
    return f"{order.model}: removed"


def test_an_order_is_answered_with_what_was_done_or_why_not(short_dir: Path) -> None:
    with carried_out(short_dir / "s", carry_out):
        assert (short_dir / "s.ctl").stat().st_mode & 0o777 == 0o600
        assert give(short_dir / "s", Order(verb="remove", model="a")) == "a: removed"
        with pytest.raises(UsageError, match="no such model"):
            give(short_dir / "s", Order(verb="add", model="a"))
        with pytest.raises(EnvironmentFault, match="it did not start"):
            give(short_dir / "s", Order(verb="restart", model="a"))
    with pytest.raises(BrokerUnavailable, match=r"no `polder serve` takes orders on .*s\.ctl: No such file"):
        give(short_dir / "s", Order(verb="remove", model="a"))
    assert list(short_dir.iterdir()) == []


def test_a_socket_that_was_removed_with_its_directory_is_there_again_when_the_directory_is(short_dir: Path) -> None:
    place = short_dir / "fleet"
    place.mkdir()

    def taken() -> bool:
        try:
            return give(place / "s", Order(verb="remove", model="a")) == "a: removed"
        except PolderError:
            return False

    with carried_out(place / "s", carry_out):
        assert taken()
        shutil.rmtree(place)
        assert not taken()
        place.mkdir()
        wait_for(taken, "orders to be taken again")
        assert (place / "s.ctl").stat().st_mode & 0o777 == 0o600
