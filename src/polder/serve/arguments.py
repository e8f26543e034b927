"""The `args` of a model: arguments of `vllm serve`, however vLLM lets them be written, and those that are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

from polder.errors import ConfigError

__all__ = ["check_arguments", "is_given", "option"]

_REFUSED = {  # arguments that a fleet cannot have, whatever their value
    "--headless": "leave it out: the engine would wait for another server",
    **dict.fromkeys(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs"),
        "leave it out: the fleet's endpoint speaks HTTP to its engines; put TLS before it, e.g. by a reverse proxy",
    ),
    "--grpc": "leave it out: the fleet's endpoint speaks HTTP to its engines",
    "--api-key": "write server.api_key in place of it, one for all models",
    "--allowed-origins": "write server.allowed_origins in place of it",
    "--enable-sleep-mode": 'write weights = "elastic" in place of it',
    **dict.fromkeys(
        ("--kv-offloading-size", "--kv-offloading-backend"), 'write tiers = ["host"] and memory.host in place of it'
    ),
}
_ONE_RANK = {  # arguments that must be 1
    **dict.fromkeys(("--pipeline-parallel-size", "-pp"), "elastic KV does not work with several stages yet"),
    **dict.fromkeys(("--data-parallel-size", "-dp"), "write one [[model]] for each replica"),
}
_SEVERAL_GPUS = (
    "a fleet file has one device. Start `polder broker --device cuda:0=SIZE --device cuda:1=SIZE`, and `vllm serve` with "
    "POLDER_BROKER and POLDER_ENGINE"
)
_OURS = ("--served-model-name", "--host", "--port", "--uds", "--max-model-len", "--model", "--kv-transfer-config")


def check_arguments(what: str, args: Sequence[str], device: str) -> None:
    """Raises ConfigError for arguments of vLLM's that a fleet cannot have. vLLM's own parser looks at the others."""
    for word in args:
        name, space, value = word.partition(" ")
        if word.startswith("-") and space and "=" not in name:
            raise ConfigError(f"{what}: args: {word!r} is one word: write {json.dumps([name, value])[1:-1]}")
    for name in _OURS:
        if is_given(args, name):
            instead = "the key max_model_len" if name == "--max-model-len" else "nothing: `polder serve` sets it"
            raise ConfigError(f"{what}: args: {name} does not belong there; write {instead}")
    for name, instead in _REFUSED.items():
        if is_given(args, name):
            raise ConfigError(f"{what}: args: {name}: {instead}")
    ranks = dict.fromkeys(("--tensor-parallel-size", "-tp"), _SEVERAL_GPUS) if device.startswith("cuda") else {}
    for name, reason in (_ONE_RANK | ranks).items():
        if option(args, name) not in (None, "1"):
            raise ConfigError(f"{what}: args: {name} above 1: {reason}")


def option(args: Sequence[str], name: str) -> str | None:
    """The value of a `vllm serve` argument written as two words or with "="; None when it is not given.

    As in vLLM, "_" may stand for "-". For an object given field by field ("--name.field") it is the first field's
    value.
    """
    for at, text in enumerate(args):
        if _name(text) == name:
            _, equals, value = text.partition("=")
            if equals:
                return value
            if at + 1 == len(args):
                raise ConfigError(f"args: {name} needs a value")
            return args[at + 1]
    return None


def is_given(args: Sequence[str], *names: str) -> bool:
    """Whether one of these arguments is there, with a value or without."""
    return any(_name(text) in names for text in args)


def _name(text: str) -> str:
    name = text.partition("=")[0]
    # Names of fields, and names after a single dash, are taken literally.
    return name.partition(".")[0].replace("_", "-") if name.startswith("--") else name
