"""`polder serve FLEET.toml` and `polder broker`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from polder.broker.config import BROKER_SETTINGS, BrokerConfig
from polder.cli.options import AsJson, with_options
from polder.errors import BudgetError, ConfigError, EnvironmentFault
from polder.serve.schema import EXAMPLE
from polder.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from polder.serve.check import Finding
    from polder.serve.child import Event
    from polder.serve.fleet import Fleet, Model

__all__ = ["run_broker", "serve_fleet"]


def serve_fleet(
    fleet: Annotated[Path, typer.Argument(help="The fleet file (TOML).")],
    check: Annotated[
        bool, typer.Option("--check", help="Say whether this machine has all that the fleet needs; start nothing.")
    ] = False,
    memory_check: Annotated[
        Literal["refuse", "warn"],
        typer.Option(
            help="What to do when memory is too little by an estimate, or at this moment. What is known to be more "
            "than there is in all is refused in any case."
        ),
    ] = "refuse",
    socket: Annotated[Path | None, typer.Option(help="The broker's socket (default: a private one).")] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keep the engines' and the broker's logs here (default: they are kept only if one died or was not ready)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve several models behind one OpenAI endpoint, their KV caches under one budget."""
    from polder.serve.check import ask_vllm, faults
    from polder.serve.check import check as look_at
    from polder.serve.fleet import load_fleet
    from polder.serve.listening import listen
    from polder.serve.machine import look

    loaded = load_fleet(fleet)
    if not check and importlib.util.find_spec("vllm") is None:
        raise EnvironmentFault("vLLM is not installed: pip install 'polder-kv[serve,gpu]' (without a GPU: [serve,cpu])")
    if not check:
        listen(loaded.server.host, loaded.server.port).close()  # a port in use is said before vLLM is asked
    findings = list(look_at(loaded, look(loaded.device), ask_vllm if as_json else _asking))
    if check:
        print(_as_json(loaded, findings) if as_json else _in_words(findings))
        if any(finding.state != "met" for finding in findings):
            raise typer.Exit(2)
        return
    from polder.serve.run import run

    if unmet := faults(findings, memory_check):
        raise BudgetError(f"{fleet}: {'; '.join(unmet)}. `polder serve {fleet} --check` shows all needs")
    for finding in findings:
        if finding.estimated or (finding.state == "open" and not as_json):
            _print(sys.stderr, f"polder: {finding.need}: {finding.detail}")
    report = _json_event if as_json else _text_event
    run(loaded, lambda: load_fleet(fleet), report, memory_check=memory_check, socket_path=socket, log_dir=log_dir)


def _asking(models: Sequence[Model]) -> list[str]:
    """`ask_vllm`, with a word before it, because vLLM's import may take a minute."""
    from polder.serve.check import ask_vllm

    names = ", ".join(model.name for model in models)
    _print(sys.stderr, f"polder: args of {names}: asking vLLM's parser, whose import takes a while")
    return ask_vllm(models)


# "\b" keeps the line breaks of a paragraph.
_KEYS = "\n\n".join(f"\b\n{table}" for table in EXAMPLE.split("\n\n"))
serve_fleet.__doc__ = f"{serve_fleet.__doc__}\n\nA fleet file with every key:\n\n{_KEYS}"


@with_options(BROKER_SETTINGS.values())
def run_broker(
    given: Mapping[str, Any],
    socket: Annotated[Path, typer.Option(help="Where engines connect; at most 107 bytes of path.")],
    device: Annotated[list[str], typer.Option(help="NAME=SIZE of KV budget, e.g. cpu:0=64GiB; may be repeated.")],
) -> None:
    """Run a broker alone, for engines started by hand with POLDER_BROKER. It logs to stderr."""
    import logging

    from polder.broker.policy import PolicyConfig
    from polder.broker.server import serve
    from polder.serve.machine import host_memory
    from polder.serve.runtime import user_dir

    if socket == user_dir():
        raise ConfigError(f"--socket {socket}: `polder serve` keeps its fleets there; write {socket}.sock")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sizes: dict[str, int] = {}
    for text in device:
        name, separator, size = text.partition("=")
        if not separator or name in sizes:
            raise ConfigError(f"--device {text!r}: write NAME=SIZE, e.g. cpu:0=64GiB, once for each device")
        sizes[name] = parse_bytes(size, what=f"--device {name}")
    # What engines of a former broker still hold is not free, so the total counts.
    host, total = sum(size for name, size in sizes.items() if not name.startswith("cuda")), host_memory().total_bytes
    if host > total:
        raise BudgetError(
            f"--device: {format_bytes(host)} of host memory, and there are {format_bytes(total)}: write less"
        )
    policy = dict(given)
    page_bytes = policy.pop("page_bytes", BrokerConfig.page_bytes)
    serve(BrokerConfig(socket=socket, devices=sizes, page_bytes=page_bytes, policy=PolicyConfig(**policy)))


_MARKS = {"met": "ok", "unmet": "NO", "open": "??"}


def _as_json(fleet: Fleet, findings: Sequence[Finding]) -> str:
    found = {
        "device": fleet.device,
        "kv_budget_bytes": fleet.budget_bytes,
        "least_bytes": {model.name: model.needed_bytes for model in fleet.models},
        "enough": all(finding.state == "met" for finding in findings),
        "findings": [
            asdict(finding) | {"lines": {line.what: line.size_bytes for line in finding.lines}} for finding in findings
        ],
    }
    return json.dumps(found)


def _in_words(findings: Sequence[Finding]) -> str:
    text = []
    for finding in findings:
        text.append(f"{_MARKS[finding.state]:4}{finding.need}: {finding.detail}")
        for line in finding.lines:
            size = "unknown" if line.size_bytes is None else format_bytes(line.size_bytes)
            text.append(f"{'':6}{size:>10}  {line.what}")
    counts = {state: sum(finding.state == state for finding in findings) for state in _MARKS}
    if counts["unmet"] or counts["open"]:
        text.append(f"not enough, or not known to be: {counts['unmet']} unmet (NO), {counts['open']} open (??)")
    else:
        text.append("enough")
    return "\n".join(text)


def _text_event(event: Event) -> None:
    _print(sys.stderr, f"polder: {event.child}: {event.detail}")


def _json_event(event: Event) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, "event": event.kind, "child": event.child, "pid": event.pid, "detail": event.detail}
    _print(sys.stdout, json.dumps(line))


def _print(stream: TextIO | None, line: str) -> None:
    """Who reads may go away, for example `| head`, or a terminal. The fleet serves on."""
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is buffered would fail again at the end
        os.close(nowhere)
