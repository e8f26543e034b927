"""`python -m polder.bench.harness.gateway PORT NAME=URL ...`: Polder's gateway in front of stock engines.

Two plain `vllm serve` have no common endpoint. The stock arm gets the same one as a fleet of `polder serve`, so that
the arms differ in the KV cache and in nothing else.
"""

from __future__ import annotations

import sys

import uvicorn

from polder.serve.gateway import make_app


def main(port: str, *pairs: str) -> None:
    upstreams = dict(pair.split("=", 1) for pair in pairs)
    app = make_app(upstreams, socket=None, children=list)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
