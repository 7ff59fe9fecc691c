"""The packaged run files: where they are, their names, copies of them. Standard library only."""

from __future__ import annotations

import difflib
import re
import shutil
from functools import cache
from pathlib import Path

from llm_core.errors import EnvironmentFault, UserError

_LAYERS = ("base", "model", "parallel")  # folders of layers: no runs by themselves


@cache
def configs_root() -> Path:
    """The folder of the packaged run files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "configs", package.parent / "configs"):
        if root.is_dir():
            return root
    raise EnvironmentFault(f"no configs folder in {package} or beside it; the installation is incomplete")


def names(pattern: str = "") -> list[str]:
    """Names of the packaged runs (`llama2/pretrain_llama2_7b`) that match a pattern: a part of the name, or a regex."""
    root = configs_root()
    runs = (path.relative_to(root) for path in root.rglob("*.yaml"))
    found = sorted(str(path.with_suffix("")) for path in runs if path.parts[0] not in _LAYERS)
    if pattern:
        try:
            wanted = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise UserError(f"-p {pattern}: no regular expression ({error})") from None
        found = [name for name in found if wanted.search(name)]
    return found


def resolve(name: str) -> Path:
    """The file that `--config` means: a path from the working folder, else a packaged run by its name.

    `pretrain_llama2_7b`, `llama2/pretrain_llama2_7b` and `configs/llama2/pretrain_llama2_7b.yaml` name the same run.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"--config {name}: is a folder; give a run file")
    wanted = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    known = names()
    matches = [each for each in known if each == wanted or each.rpartition("/")[2] == wanted]
    if len(matches) == 1:
        return configs_root() / f"{matches[0]}.yaml"
    if matches:
        raise UserError(f"--config {name}: stands for several: {', '.join(matches)}; write the folder too")
    short = {each.rpartition("/")[2]: each for each in known}
    near = difflib.get_close_matches(wanted, known, 1) or [
        short[each] for each in difflib.get_close_matches(wanted.rpartition("/")[2], short, 1)
    ]
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--config {name}: no such file, and no packaged run of that name{hint} (`list-cfg` shows them)")


def title(name: str) -> str:
    """The first comment line of a packaged run, without the colon that leads to its command."""
    with open(configs_root() / f"{name}.yaml", encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("# ").rstrip().removesuffix(":") if line.startswith("#") else ""


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a packaged run with the layers it stands on into `folder`; their relative places stay. Never overwrites."""
    source = resolve(name)
    root = configs_root()
    if not source.resolve().is_relative_to(root):
        raise UserError(f"copy-cfg {name}: is no packaged run (`list-cfg` shows them)")
    copied = []
    for file in [source, *_layers_of(source)]:
        target = folder / file.resolve().relative_to(root)
        if target.exists() and target.read_bytes() != file.read_bytes():
            raise UserError(f"{target}: exists and differs; give another folder, or remove it")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        except OSError as error:
            raise EnvironmentFault(f"{target}: {error.strerror}") from None
        copied.append(target)
    return copied


def _layers_of(path: Path) -> list[Path]:
    """The files that a run file is based on, and those they are based on."""
    from llm_core.config.tree import Problems, plain
    from llm_core.config.yaml_source import read_yaml

    found: list[Path] = []
    base = read_yaml(path, 0, Problems()).get("base_config")
    listed = plain(base) if base is not None else []
    for name in [listed] if isinstance(listed, str) else listed:
        layer = (path.parent / name).resolve()
        found += [layer, *_layers_of(layer)]
    return list(dict.fromkeys(found))
