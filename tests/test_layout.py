"""The drawing of the packages, the size of the spine, and what importing the library costs."""

import ast
import re
import sys
from pathlib import Path

import grimp
import pytest

from tests.conftest import ROOT, run_command

SOURCE = ROOT / "src" / "pretrain_lib"
SPINE_LINES = 2500  # that are not blank: what is read in an evening
SPINE = [
    *("data/text/sources", "data/text/tokenizer", "data/tokens/shards", "data/permutation"),
    *("data/windows/order", "data/windows/packing", "data/windows/batches", "models/attention"),
    *("models/gpt2", "models/hf", "models/loss", "optim/groups", "optim/schedule"),
    *("config/settings", "distributed/engine", "training/step", "checkpoint/state"),
    *("run_folder/metrics", "training/run", "training/loop"),
]


def modules():
    return sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")


def above(edges):
    """Return all pairs of which the first reaches the second along edges."""
    pairs = set(edges)
    while more := {(a, d) for a, b in pairs for c, d in edges if b == c} - pairs:
        pairs |= more
    return pairs


def test_the_drawing_of_the_packages_shows_their_imports():
    graph = grimp.build_graph("pretrain_lib", cache_dir=None)
    rooms = {child.rsplit(".", 1)[1] for child in graph.find_children("pretrain_lib")}
    owners = {module: module.split(".")[1] for module in graph.modules if "." in module}
    imports = {
        (owners[importer], owners[imported])
        for importer in owners
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported in owners and owners[importer] != owners[imported]
    }
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    drawn = set(re.findall(r"^  (\w+) --> (\w+)$", drawing, flags=re.MULTILINE))
    assert set(re.findall(r"^    (\w+)$", drawing, flags=re.MULTILINE)) == rooms
    assert drawn <= imports
    assert above(drawn) == above(imports)
    assert not any((b, a) in above(drawn) for a, b in drawn)
    spare = {edge for edge in drawn if edge in above(drawn - {edge})}
    assert not spare, "these arrows follow from others"


@pytest.mark.parametrize("package", sorted(p.parent for p in SOURCE.rglob("__init__.py")), ids=str)
def test_a_package_says_what_is_in_it_and_where_to_begin(package):
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    inside = {path.stem for path in package.glob("*.py")} - {"__init__"}
    inside |= {path.parent.name for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"`(\w+)`", text))
    assert named - {"pretrain", "Recipe"} - inside == set()  # such as one that was renamed
    assert inside - named == set()
    assert "Begin with " in text


def test_the_spine_stays_small():
    files = [SOURCE / f"{name}.py" for name in SPINE] + [ROOT / "recipes" / "gpt2_124m.py"]
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) < SPINE_LINES


def test_importing_the_library_leaves_heavy_packages_alone():
    heavy = ["datasets", "lm_eval", "matplotlib", "transformers.modeling_utils"]
    code = f"import sys, pretrain_lib; print([m for m in {heavy} if m in sys.modules])"
    result = run_command(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stderr


def test_no_pickle_in_the_library():
    for path in modules():
        text = path.read_text()
        for name in ("pickle.load", "torch.load(", "torch.save(", "allow_pickle=True"):
            assert name not in text, f"{path} uses {name}"


def test_text_files_are_utf8_in_every_locale():
    for path in modules():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                owner, name = ast.unparse(call.func.value), call.func.attr
                if name in ("open", "read_text", "write_text") and owner != "os":
                    text = ast.unparse(call)
                    is_binary = re.search(r"\.open\('[rwa]\+?b'", text)
                    assert is_binary or "encoding='utf-8" in text, f"{path}: {text}"


def test_no_file_holds_a_merge_that_was_not_finished():
    for name in run_command("git", "ls-files").stdout.split():
        if Path(name).suffix in (".md", ".py", ".pyi", ".toml", ".yaml", ".yml", ".sh"):
            text = Path(ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE), name


def test_files_stay_readable():
    for path in [*modules(), *Path(ROOT / "recipes").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path


@pytest.mark.slow
def test_every_public_name_is_what_it_says_whatever_was_imported_before():
    code = (
        "import pretrain_lib as pl, pkgutil, importlib;"
        "found = pkgutil.walk_packages(pl.__path__, 'pretrain_lib.');"
        "[importlib.import_module(module.name) for module in found];"
        "print([n for n in pl.__all__ if type(getattr(pl, n)).__name__ == 'module'])"
    )
    result = run_command(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stderr
