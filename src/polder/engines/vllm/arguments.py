"""Asks vLLM itself whether it takes the arguments of a `vllm serve`: python -m polder.engines.vllm.arguments

Reads JSON from standard input, [{"path", "args", "env"}, ...], and writes a list of what is wrong with each, "" if
nothing. In a process of its own: vLLM takes seconds to import, and its parser ends the process that it runs in. Loads
no weights, and asks no network: of a model that is no folder only the arguments are parsed."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["refusal", "serve_parser"]


def serve_parser() -> Any:
    """The parser of `vllm serve`. It takes a second to be made."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


def refusal(parser: Any, path: str, args: Sequence[str], env: Mapping[str, str]) -> str:
    """What vLLM says against these arguments, in one line; "" when it takes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    from polder.engines.vllm.settings import settings_of
    from polder.engines.vllm.start.limits import check_supported

    said, before = io.StringIO(), dict(os.environ)
    os.environ.update(env)
    try:
        with contextlib.redirect_stderr(said):
            parsed = parser.parse_args([path, *args])
        parsed.model = path
        validate_parsed_serve_args(parsed)
        if Path(path).is_dir():
            config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
            settings = settings_of(config)
            if settings is not None:
                check_supported(config, settings)
    except SystemExit:
        line = _last_line(said.getvalue())
        return (line.partition("error: ")[2] or line) + _meant(args, parser._option_string_actions)
    except Exception as error:  # whatever a version of vLLM raises for a value that it does not take
        return _reason(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return ""


def _meant(args: Sequence[str], known: Iterable[str]) -> str:
    """The arguments that were probably meant by those that are not known."""
    names = list(known)
    given = [word.partition("=")[0].partition(".")[0].replace("_", "-") for word in args if word.startswith("--")]
    close = [name for word in given if word not in names for name in difflib.get_close_matches(word, names, n=1)]
    return f"; did you mean {' '.join(close)}?" if close else ""


def _reason(error: Exception) -> str:
    """Pydantic's first reason, or the error's first line."""
    errors: Any = getattr(error, "errors", None)
    if callable(errors):
        return str(errors()[0]["msg"]).removeprefix("Value error, ")
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "refused without a word"


def main() -> None:
    asked = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM logs to standard output
    parser = serve_parser()
    print(json.dumps([refusal(parser, **model) for model in asked]), file=answers)


if __name__ == "__main__":
    main()
