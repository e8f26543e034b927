"""The map of the packages in docs/structures.md and the imports in the code agree."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "polder"

LAYERS: tuple[dict[str, str], ...] = (
    {"__main__": "`python -m polder`", "demo": "two language models under one budget, in a few minutes"},
    {"cli": "the command `polder`"},
    {"bench": "benchmarks, with other policies to compare with (`bench/sparse`)"},
    {"serve": "several engines behind one endpoint"},
    {"engines": "what runs inside vLLM; the only package that imports it"},
    {
        "broker": "decides and records who holds which memory",
        "emulation": "emulated links, disks and faults",
        "sim": "eviction policies on recorded traces",
    },
    {
        "tiers": "lent memory, host memory and disks behind an engine's KV cache",
        "swarm": "KV that is read sparsely: packing, placement and reads of entries smaller than a page",
        "sparse": "a long prefix of which each layer's own query reads a part",
        "weights": "weights whose layers can leave the device",
        "window": "contexts longer than the device's memory",
    },
    {"diskstore": "pages on several disks", "stream": "layers fetched just before they are used"},
    {"memory": "pages, addresses and copies", "planner": "cost models without I/O"},
    {"metrics": "every metric, declared once", "settings": "how settings are declared and read"},
    {"units": "sizes and times as text", "arrays": "names of array types"},
    {"errors": "all exceptions"},
)
"""Packages and modules of polder, from the top. Each imports only from lower layers."""

EMULATION_FOR_ENGINES = {"polder.emulation.factory", "polder.emulation.options"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(("polder", *(part for part in parts if part != "__init__"))), path


@cache
def names() -> frozenset[str]:
    return frozenset(name for name, _ in modules())


def imports(path: Path, *, at_start: bool = False) -> set[str]:
    """The modules of polder that a file imports; with `at_start` only those imported with the file, not within functions."""
    found: set[str] = set()
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & names()
            found |= inner or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (at_start and (lazy or typing_only)):
            nodes.extend(
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)
            )
    return {name for name in found if name.split(".")[0] == "polder"}


def package(module: str) -> str:
    return ([*module.split("."), ""])[1]


def test_packages_import_only_from_lower_layers() -> None:
    layer_of = {name: layer for layer, row in enumerate(LAYERS) for name in row}
    assert {package(name) for name in names()} - {""} == set(layer_of), "the table of layers lacks a package"
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path)
        if package(name) and package(other) not in ("", package(name))
        if layer_of[package(other)] <= layer_of[package(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    graphlib.TopologicalSorter({name: imports(path, at_start=True) - {name} for name, path in modules()}).prepare()


def test_the_product_uses_neither_tests_nor_benchmarks_and_emulation_through_its_factory() -> None:
    for name, path in modules():
        if package(name) not in ("cli", "bench", "demo"):
            assert not {other for other in imports(path) if package(other) in ("bench", "testing")}, name
        if package(name) not in ("bench", "emulation"):
            used = {other for other in imports(path) if package(other) == "emulation"}
            assert used <= EMULATION_FOR_ENGINES, f"{name}: {used}"
        assert "import tests" not in path.read_text(), name


def test_only_engines_and_benchmarks_import_vllm() -> None:
    for name, path in modules():
        if package(name) not in ("engines", "bench"):
            source = path.read_text()
            assert "from vllm" not in source, name
            assert "import vllm" not in source, name


def test_no_file_name_repeats_its_folder() -> None:
    for name, path in modules():
        folder, words = path.parent.name, path.stem.split("_")
        assert folder not in words, name
        assert folder.removesuffix("s") not in words, name


def layers_table() -> str:
    rows = ["| layer | package | what |", "|---|---|---|"]
    for number, row in enumerate(LAYERS):
        rows += [f"| {len(LAYERS) - number} | `{name}` | {what} |" for name, what in row.items()]
    return "\n".join(rows)


def test_the_map_shows_the_layers() -> None:
    shown = (ROOT / "docs" / "structures.md").read_text()
    assert layers_table() in shown, f"put this into docs/structures.md:\n\n{layers_table()}"


def test_suites_of_benches_never_import_each_other() -> None:
    shared = {"polder.bench.suites.base", "polder.bench.suites.plan"}
    for name, path in modules():
        if name.startswith("polder.bench.suites."):
            others = {other for other in imports(path) if other.startswith("polder.bench.suites.")}
            assert others <= shared, name


# ---------------------------------------------------------------- engines/vllm

ENGINE = SOURCE / "engines" / "vllm"
PATCHES_ELSEWHERE = {
    "weights/cpu_linear.py": "a layer's `cpu_linear` is the field that vLLM's own dispatch fills with a function",
}
"""Files that set a function on an object of vLLM's without hooks, and why they may."""


def engine_trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ENGINE.rglob("*.py")):
        yield path.relative_to(ENGINE).as_posix(), ast.parse(path.read_text())


def test_no_function_assigns_to_a_module() -> None:
    for name, path in modules():
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)], name


def test_what_a_process_of_an_engine_holds_is_in_one_object() -> None:
    """No module of engines/vllm but process.py begins with an empty container or with None, to be filled later."""
    for name, tree in engine_trees():
        for node in tree.body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            empty = value is not None and ast.unparse(value) in ("[]", "{}", "set()", "dict()", "list()", "None")
            assert not empty or name == "process.py", f"{name}: {ast.unparse(node)}"


def targets(node: ast.AST) -> Iterator[ast.Attribute]:
    found = node.targets if isinstance(node, ast.Assign) else []
    for target in found:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Attribute) and not (isinstance(part.value, ast.Name) and part.value.id == "self"):
                yield part


def test_only_hooks_replace_functions_of_vllm() -> None:
    from polder.engines.vllm.hooks import TAPS

    tapped = {tap.name.split(".")[-1] for tap in TAPS}
    for name, tree in engine_trees():
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            for target in targets(node):
                assert isinstance(node, ast.Assign)
                value = node.value
                called = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)
                wrong = target.attr in tapped or (called and name not in PATCHES_ELSEWHERE)
                assert not wrong, f"{name}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_every_tap_is_a_seam_and_has_its_function() -> None:
    from polder.engines.vllm.compat import SEAMS
    from polder.engines.vllm.hooks import TAPS

    functions = {name: {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} for name, tree in engine_trees()}
    seams = {(module, name) for module, name, _ in SEAMS}
    without = {tap.name for tap in TAPS if (tap.module, tap.name) not in seams}
    assert without == NO_SEAMS
    for tap in TAPS:
        file = f"{tap.asked_by.replace('.', '/')}.py"
        source = (ENGINE / file).read_text()
        if tap.function:
            assert tap.function in functions[file] or f"import {tap.function}\n" in source, tap.name
        else:
            assert "hooks.replace(" in source or "hooks.put(" in source, tap.name


NO_SEAMS = {
    "BlockPool.free_block_queue",  # an attribute: compat has the methods of its class that Polder calls
    "OffloadingConnectorScheduler.__class__",  # an attribute: compat has the methods that TierScheduler overrides
    "Module.forward",  # torch's
    # Not every backend has these; they take any arguments, and pass them on.
    "AttentionImpl.do_kv_cache_update",
    "AttentionImpl.do_rope_and_kv_cache_update",
    "AttentionImpl.do_qk_norm_rope_kvcache_update",
    "AttentionImpl.do_qk_norm_mrope_kvcache_update",
}
"""Taps that compat.check_seams does not look at."""


ROOMS = ("rank", "core", "tiers weights window", "start")
"""From the lowest. Modules at the top of engines/vllm, such as plans, may be imported by all of them."""
COMPOSING = "core.elastic"
"""Makes parts of other rooms, and is imported by the start alone."""


def test_rooms_of_an_engine_import_only_from_lower_ones() -> None:
    prefix = "polder.engines.vllm."
    height = {room: at for at, rooms in enumerate(ROOMS) for room in rooms.split()}
    for name, path in modules():
        module = name.removeprefix(prefix)
        room = module.split(".")[0]
        if not name.startswith(prefix) or room not in height or module == COMPOSING:
            continue
        for other in imports(path, at_start=True):
            target = other.removeprefix(prefix).split(".")[0] if other.startswith(prefix) else ""
            assert target == room or height.get(target, -1) < height[room], f"{module} imports {other}"
            assert other != prefix + COMPOSING or room == "start", f"{module} imports {other}"
