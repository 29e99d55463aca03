"""Every place of the library that treats CUDA as special is listed, with what has reached it."""

import ast
import json
import re

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "pretrain_lib"
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "null_gpu.json"
ROW = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \| (.+) \|$", re.M)
ONLY_ON_A_GPU = "only on a GPU"


def names_cuda(node):
    """Return whether a node of code names CUDA, or compares the type of a device."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and "cuda" in node.value and " " not in node.value
    if isinstance(node, ast.Compare):
        return isinstance(node.left, ast.Attribute) and ast.unparse(node.left).endswith(
            "device.type"
        )
    words = (getattr(node, field, None) for field in ("name", "attr", "id", "arg"))
    return any(isinstance(word, str) and "cuda" in word for word in words)


def places(path):
    """Yield the functions of a module, and its constants, whose code names CUDA."""
    for outer in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = outer.body if isinstance(outer, ast.ClassDef) else [outer]
        for node in inner:
            if isinstance(node, ast.Expr) or not any(map(names_cuda, ast.walk(node))):
                continue
            target = getattr(node, "target", None) or getattr(node, "targets", [node])[0]
            name = getattr(target, "name", None) or target.id
            yield f"{outer.name}.{name}" if isinstance(outer, ast.ClassDef) else name


def in_the_source():
    for path in sorted(SOURCE.rglob("*.py")):
        for name in places(path):
            yield path.relative_to(SOURCE).as_posix(), name


def test_the_list_names_every_place_and_no_other():
    listed = [(path, name) for path, name, _ in ROW.findall(PAGE.read_text())]
    assert sorted(listed) == sorted(in_the_source())


def test_what_has_reached_a_place_exists():
    runs = json.loads(RESULTS.read_text())["rows"]
    for path, name, reached in ROW.findall(PAGE.read_text()):
        assert reached == ONLY_ON_A_GPU or "`" in reached, (path, name)
        for word in re.findall(r"`([^`]+)`", reached):
            file, _, test = word.partition("::")
            is_test = file.endswith(".py") and f"def {test}(" in (ROOT / "tests" / file).read_text()
            assert is_test or word in runs, f"{path}, {name}: no test and no run is {word}"
