"""Every error that Polder raises on purpose.

    PolderError
    ├── UsageError          the request is impossible as it stands: the message says what to change
    │   ├── ConfigError         a setting, file or option has a bad value
    │   ├── BudgetError         the requested memory does not fit: the message says how much is needed
    │   └── UnsupportedVersion  this vLLM is not in the compat table
    ├── EnvironmentFault    the machine or another process is not as needed: retry, restart or fix it
    │   ├── BrokerUnavailable   no broker answers on the socket
    │   ├── AddressInUse        another process has the port or socket
    │   └── OutOfPages          the device has no free page at this moment
    └── InternalError       a law of docs/structures.md was broken: a bug in Polder, please report it
        ├── IntegrityError      the numbers of an owner of capacity do not add up
        └── ProtocolError       a peer sent what the protocol does not allow

A cache fault is none of these: it is a counted miss and never reaches a request.
"""

from __future__ import annotations

__all__ = [
    "AddressInUse",
    "BrokerUnavailable",
    "BudgetError",
    "ConfigError",
    "EnvironmentFault",
    "IntegrityError",
    "InternalError",
    "OutOfPages",
    "PolderError",
    "ProtocolError",
    "UnsupportedVersion",
    "UsageError",
]


class PolderError(Exception):
    """Root of everything Polder raises on purpose."""


class UsageError(PolderError):
    """The request cannot be met as it stands; the message says what to change."""


class ConfigError(UsageError):
    """A setting, file or option has a bad value."""


class BudgetError(UsageError):
    """The memory asked for does not fit the device; the message says how much is needed."""


class UnsupportedVersion(UsageError):
    """The installed vLLM is not one that this Polder was tested with."""


class EnvironmentFault(PolderError):
    """The machine, or another process on it, is not as needed."""


class BrokerUnavailable(EnvironmentFault):
    """No broker answers on the socket."""


class AddressInUse(EnvironmentFault):
    """A port or a socket is taken by another process."""


class OutOfPages(EnvironmentFault):
    """The device has fewer free pages than asked for. Nothing was taken."""


class InternalError(PolderError):
    """A law was broken inside Polder. Please report it with the message."""


class IntegrityError(InternalError):
    """The numbers of an owner of capacity do not add up. The message has them."""


class ProtocolError(InternalError):
    """A peer sent a message that the protocol does not allow."""
