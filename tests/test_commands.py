"""Commands and fleet files in README.md and docs are what Polder takes, word for word.

`polder` lines go through its own parser, fleet files through that of `polder serve --check`, scripts and paths must be
there, `vllm serve` lines go through vLLM's parser, and a URL is a route of the endpoint. Nothing is started.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from polder.cli.main import app
from polder.demo.report import FLEET
from polder.serve.fleet import load_fleet
from polder.serve.runtime import user_dir

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|(?:\A|\n\n)((?:    \S.*\n)(?:    .*\n)*)", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:polder (?!NAME)|scripts/)[^`]+)`")
_WORDS = {"NAME", "DEVICE:MODEL"}
"""Places to fill in."""


class Command(NamedTuple):
    document: str
    words: list[str]
    text: str


def _lines() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        if document.name == "log.md":  # what was typed at its time
            continue
        text = document.read_text()
        for language, fenced, indented in _BLOCK.findall(text):
            if not language:
                yield from ((document.name, line.strip()) for line in (fenced or indented).splitlines())
        yield from ((document.name, found.replace("\n", " ")) for found in _INLINE.findall(text))


def commands(verb: str) -> list[Command]:
    """Lines that begin with it, or with settings of the environment before it."""
    found = []
    for document, line in _lines():
        plain = line.split(" #")[0]
        start = re.match(rf"(?:[A-Z_]+=\S+ )*(?={verb}{'' if verb.endswith('/') else ' '})", f"{plain} ")
        if start:
            words = shlex.split(plain[start.end() :])
            found.append(Command(document, [word for word in words if word != "&"], line))
    return found


def _ids(command: Command) -> str:
    return f"{command.document}: {command.text[:60]}"


@pytest.mark.parametrize("command", commands("polder"), ids=_ids)
def test_polder_takes_its_options_and_arguments(command: Command) -> None:
    words = command.words[1:]
    if not words or _WORDS & set(words):
        return
    parser: Any = typer.main.get_command(app)
    context = parser.make_context("polder", words)
    while hasattr(parser, "list_commands"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, parser, words = parser.resolve_command(context, rest)
        if "--help" in words or (not words and _needs_more(parser)):
            return  # the verb alone, as a name
        context = parser.make_context(name, words, parent=context)


def test_a_brokers_socket_is_not_where_serve_keeps_its_fleets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    for command in commands("polder"):
        assert str(user_dir()) not in command.words, command.text


def _needs_more(parser: Any) -> bool:
    return hasattr(parser, "list_commands") or any(parameter.required for parameter in parser.params)


@pytest.mark.parametrize("command", commands("scripts/"), ids=_ids)
def test_scripts_are_there_with_their_flags_and_paths(command: Command) -> None:
    script, *words = command.words
    path = ROOT / script
    assert path.is_file(), script
    assert os.access(path, os.X_OK) or path.suffix == ".py", script
    near = "".join(file.read_text() for file in path.parent.iterdir() if file.is_file()) + "--flags of pytest: -x -m"
    for word in words:
        if word.startswith("-"):
            assert word in near or path.name == "test", f"{script} has no {word}"
        elif word.startswith(("tests/", "scripts/", "docs/")):
            assert (ROOT / word).exists(), word


def test_vllm_takes_its_flags() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    found = commands("vllm")
    assert found
    for _, words, text in found:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, text
    named = set(re.findall(r"`(--[\w-]+)`", (ROOT / "README.md").read_text())) - {"--check"}
    assert named <= known, named - known


def test_urls_are_routes_of_the_endpoint() -> None:
    from polder.serve.gateway import make_app

    routes = {getattr(route, "path", "") for route in make_app({}, socket=None, children=list).routes}
    for _, words, text in commands("curl"):
        path = "/" + words[1].partition("/")[2]
        assert path in routes or path.startswith("/v1/"), text


def fleet_files() -> Iterator[tuple[str, str]]:
    yield "the demo's page", FLEET
    for document in DOCUMENTS:
        for language, fenced, _ in _BLOCK.findall(document.read_text()):
            if language == "toml":
                yield document.name, fenced


@pytest.mark.parametrize(("document", "text"), list(fleet_files()), ids=lambda value: str(value)[:20])
def test_fleet_files_are_taken(document: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and disks of the text are replaced by folders that are there; what a snippet leaves out is put in."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    more = {"max_position_embeddings": 131072, "torch_dtype": "bfloat16", "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config | more))
    given = tomllib.loads(text)
    memory = given.setdefault("memory", {})
    if not memory.keys() & {"kv_budget", "budget"}:
        memory["kv_budget"] = "48GiB"
    disks = {tmp_path / f"disk{n}": disk.rpartition(":")[2] for n, disk in enumerate(memory.get("disks", []))}
    for folder in disks:
        folder.mkdir()
    memory["disks"] = [f"{folder}:{size}" for folder, size in disks.items()]
    for table in given.setdefault("model", [{"name": "chat"}]):
        table["path"] = str(model)
        table.setdefault("name", "chat")
        table.setdefault("max_model_len", 512)
    path = tmp_path / "fleet.toml"
    path.write_text(_toml(given))
    fleet = load_fleet(path)
    assert [found.name for found in fleet.models] == [table["name"] for table in given["model"]], document


def _toml(file: dict[str, Any]) -> str:
    tables = [("[server]", file.get("server", {})), ("[memory]", file["memory"])]
    tables += [("[[model]]", table) for table in file["model"]]
    lines = [
        [head, *(f"{key} = {json.dumps(value)}" for key, value in of.items() if value != [])] for head, of in tables
    ]
    return "\n".join(line for table in lines for line in table)
