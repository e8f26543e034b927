"""The socket of a fleet's endpoint."""

from __future__ import annotations

import errno
import socket

from polder.errors import AddressInUse, ConfigError

__all__ = ["listen"]


def listen(host: str, port: int) -> socket.socket:
    """Opens the endpoint's port. Raises AddressInUse, or ConfigError for a host or a port that this user cannot
    have."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"server.host {host!r}: {error.strerror}; write an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)  # with SO_REUSEADDR two may bind one port, but only one may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"server.host {host!r} is no address of this machine: write 127.0.0.1, 0.0.0.0 for all of its addresses, or "
                "one of them"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"server.port {port}: this user may not listen there: write a port above 1023, or lower "
                "net.ipv4.ip_unprivileged_port_start"
            ) from error
        raise AddressInUse(
            f"cannot listen on {where}: {error.strerror}; stop the process that does, or choose another server.port"
        ) from error
    return listener
