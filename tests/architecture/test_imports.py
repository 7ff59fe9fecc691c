"""Imports point one way: cli -> train|infer|evals -> checkpoint|peft|data -> parallel -> models -> ops -> kernels.

Read from the sources, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llm_core"

LEVELS = [
    {"launch"},
    {"cli", "api", "selftest", "bridge"},
    {"plan"},
    {"train", "infer", "evals"},
    {"checkpoint", "peft", "data"},
    {"parallel"},
    {"models"},
    {"ops"},
    {"kernels"},
]
LEAVES = {"config", "report", "text", "errors", "runtime", "signals", "disk"}
# Sideways on one level: training evaluates and shows samples, evaluation generates answers. An adapter's files
# are checkpoints.
# What can be computed here is the kernels' to say, and decides what a run file's compute_dtype becomes.
SIDEWAYS = {
    ("train", "evals"), ("train", "infer"), ("evals", "infer"), ("config", "kernels"), ("peft", "checkpoint"),
}  # fmt: skip
# Imports its own parts relatively, because it has two names: llm_core.kernels, and kernels for `python -m kernels`.
RELATIVE = PACKAGE / "kernels"
ORACLES = {"torch", "transformers", "peft", "mindformers"}
BRIDGED = {("bridge", "mindformers")}  # what that part is for


def level(part: str) -> int:
    return next(index for index, parts in enumerate(LEVELS) if part in parts)


def allowed(importer: str, imported: str) -> bool:
    """Whether a module of part `importer` may import one of part `imported` (parts: folders or files of llm_core)."""
    if importer == imported or imported in LEAVES or (importer, imported) in SIDEWAYS:
        return True
    if importer in LEAVES:
        return False
    return level(imported) > level(importer)


def sources() -> list[Path]:
    # kernels is a link to the top of the repository, which rglob does not follow
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")})


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST, path: Path) -> list[tuple[str, int]]:
    """(dotted name, line) of every import, `from a import b` giving both a and a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:
                assert RELATIVE in path.parents and node.level == 1, "relative imports hide where they point"
                module = ".".join(filter(None, ("llm_core", RELATIVE.name, node.module)))
            names.append((module, node.lineno))
            names += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return names


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without blocks under `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return None
            return self.generic_visit(node)

    return Strip().visit(tree)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    importer = part_of(path)
    known = set().union(*LEVELS) | LEAVES
    if importer == "__init__":
        return
    assert importer in known, f"{importer}: give it a level here and in docs/architecture.md"
    wrong = []
    for name, line in imported_names(ast.parse(path.read_text(encoding="utf-8")), path):
        parts = name.split(".")
        if parts[0] in ORACLES and (importer, parts[0]) not in BRIDGED:
            wrong.append(f"line {line}: {name} is an oracle of tests and benchmarks")
        if parts[0] == "llm_core" and len(parts) > 1 and parts[1] in known and not allowed(importer, parts[1]):
            wrong.append(f"line {line}: {importer} may not import {name}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.mark.parametrize("part", sorted(LEAVES | {"cli", "__init__"}))
def test_leaves_do_not_import_mindspore_when_imported(part):
    for path in sources():
        if part_of(path) == part:
            check_module_level(path)


def check_module_level(path):
    names = imported_names(module_level(ast.parse(path.read_text(encoding="utf-8"))), path)
    heavy = [f"line {line}: {name}" for name, line in names if name.split(".")[0] == "mindspore"]
    assert not heavy, f"{path}: {heavy}"


def test_the_rule_can_fail():
    assert not allowed("models", "parallel")
    assert not allowed("models", "peft")
    assert not allowed("infer", "train")
    assert not allowed("config", "models")
    assert not allowed("checkpoint", "data")
    assert allowed("train", "checkpoint")
    assert allowed("peft", "parallel")


@pytest.mark.parametrize("arguments", [["--help"], ["list-cfg"], ["schema"], ["show-cfg", "--config", "nothing"]])
def test_quick_answers_load_nothing_heavy(arguments):
    """Without these modules --help, listing and config errors take less than 0.3 s; with one of them they do not."""
    code = (
        "import sys; from llm_core.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'mindspore', 'numpy', 'sentencepiece', 'tokenizers', 'matplotlib', 'fastchat', 'tqdm'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-300:] + done.stderr[-2000:]


def test_no_way_in_imports_mindspore_before_it_is_set_up():
    """What the verbs import first must leave MindSpore to `runtime.start`, which sets threads and device before."""
    code = (
        "import sys\n"
        "from llm_core import api\n"
        "from llm_core.data import preprocess, show\n"
        "from llm_core.evals import run\n"
        "from llm_core.infer import chat, run\n"
        "from llm_core.train import check, run\n"
        "print('loaded:', 'mindspore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "loaded: False\n", done.stdout + done.stderr
