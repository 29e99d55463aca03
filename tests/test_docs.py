"""The commands, scripts and links of the README and the documentation are right.

Every `bash` block is read. Each command of ours in it must parse with the real parsers. A comment
before a block says more: `<!-- runs -->` has the test run it, `<!-- needs: WHY -->` says why it
cannot run in a test.
"""

import importlib
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain_lib.commands.cli import build_parser
from pretrain_lib.config.arguments import parse_recipe
from tests.conftest import ROOT, run_command
from tests.forks import forked_python

sys.path.insert(0, str(ROOT / "recipes"))
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402
import presets  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ROOT / "recipes" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent != generate.TARGET),
]
NEEDS = {"time", "hub", "gpu", "cluster", "files"}
FENCE = re.compile(r"((?:^ *<!--[^\n]*-->\n)?)^( *)```(\w+)[^\n]*\n(.*?)^\2```$", re.M | re.S)
LAUNCHERS = ("accelerate launch", "accelerate_configs/with_restarts.sh", "sbatch")
RECIPES = ("gpt2_124m", "llama_1_3b", "qwen3_124m", "causal_lm")
# No test asks the hub, so a model's family stands for its configuration there.
ON_THE_HUB = {"Qwen/Qwen3-0.6B": "{model_type: qwen3}"}
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
SITE = f"{generate.REPOSITORY}/"
TINY = [  # a run of the tutorials, cut to seconds
    *("--run.max_steps", "2", "--validation.tokens", "1024", "--samples.prompts", "[]"),
    *("--system.compile", "false"),
]
NARROW = ["--model.num_layers", "1", "--model.width", "64"]  # of our own models


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    comment: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """Return the words of each command, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = (shlex.split(part, comments=True) for line in lines for part in _split(line))
        return [each for each in words if each]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def _split(line: str) -> list[str]:
    return re.split(r"\s&&\s", line)


def blocks() -> list[Block]:
    return [
        Block(path.relative_to(ROOT).as_posix(), *_unindented(match))
        for path in PAGES
        for match in FENCE.finditer(path.read_text())
    ]


def _unindented(match: re.Match) -> tuple[str, str, str]:
    comment, indent, language, text = match.groups()
    return comment.strip(), language, re.sub(f"^{indent}", "", text, flags=re.M)


BLOCKS = blocks()
COMMANDS = [
    (block, words) for block in BLOCKS if block.language == "bash" for words in block.commands()
]


def names(words: list[str]) -> bool:
    """Return whether a command is one of ours."""
    return words[0] == "pretrain" or is_launch(words)


def is_launch(words: list[str]) -> bool:
    text = " ".join(words)
    return any(launcher in text for launcher in LAUNCHERS) or words[:2] == ["python", "recipes"]


def parse(words: list[str]) -> None:
    """Parse a command with the real parsers; raises ValueError or SystemExit if that fails."""
    if is_launch(words):
        (script,) = (n for n, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
        parse_settings(Path(words[script]).stem, words[script + 1 :])
    elif words[1:2] in (["train"], ["tune"]):
        build_parser().parse_args(words[1:3])
        parse_settings(words[2], launcher_flags_removed(words[3:]))
    elif words[1:] not in ([], ["--version"]):
        build_parser().parse_args([word for word in words[1:] if word not in (">", "|")])


def launcher_flags_removed(words: list[str]) -> list[str]:
    """Return the flags of `pretrain train` or `tune` that are the recipe's."""
    rest = list(words)
    for flag in ("--gpus", "--config_file", "--budget", "--width", "--out"):
        if flag in rest:
            del rest[rest.index(flag) : rest.index(flag) + 2]
    return rest


def parse_settings(recipe: str, flags: list[str]) -> None:
    """Parse the flags of a recipe, with overlays beside it."""
    name = Path(recipe).stem
    assert name in RECIPES, f"there is no recipe {recipe}"
    flags = [
        str(ROOT / "recipes" / Path(word).name) if flags[n - 1 : n] == ["--config"] else word
        for n, word in enumerate(flags)
    ]
    flags = [ON_THE_HUB.get(word, word) for word in flags]
    defaults = importlib.import_module(name).RECIPE
    printing = [flag for flag in flags if flag != "--print_config"]
    known = presets.GPT2_PRESETS if name == "gpt2_124m" else None
    parse_recipe(defaults, presets=known, arguments=printing)


@pytest.mark.parametrize(
    ("block", "words"),
    [pair for pair in COMMANDS if names(pair[1])],
    ids=[" ".join(words)[:60] for _, words in COMMANDS if names(words)],
)
def test_every_command_parses(block, words, monkeypatch):
    words = words[next(n for n, word in enumerate(words) if "=" not in word or word[0] == "-") :]
    if ">" in words:
        words = words[: words.index(">")]
    monkeypatch.chdir(ROOT)
    try:
        parse(words)
    except (ValueError, SystemExit) as error:
        pytest.fail(f"{block.page}: {' '.join(words)}: {error}")


def test_comments_before_blocks_say_something_known():
    for block in BLOCKS:
        if block.comment:
            reasons = re.fullmatch(r"<!-- (?:runs|needs: ([\w, ]+)) -->", block.comment)
            assert reasons, str(block)
            assert {*re.findall(r"\w+", reasons[1] or "")} <= NEEDS, str(block)
    running = [block for block in BLOCKS if block.comment == "<!-- runs -->"]
    assert all(names(words) for block in running for words in block.commands())
    assert len(running) > 5


def test_every_make_target_and_script_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block, words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets, str(block)
        for word in words:
            if re.fullmatch(r"(recipes|accelerate_configs|benchmarks)/[\w./]+", word):
                assert (ROOT / word).exists(), str(block)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the tutorials assume: some text, and evaluation items."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "my_texts").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:60]:
        (folder / "my_texts" / f"{path.stem}.txt").write_text(path.read_text())
    question = "What does a module of the standard library have to do before it can be imported?"
    (folder / "my_items.jsonl").write_text(f'{{"question": "{question}"}}\n')
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def start(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command of ours in a folder, in a fork that has imported the library."""
    python = forked_python()  # before the environment is copied: it adds to it
    if words[1] == "train":
        recipe = ROOT / "recipes" / f"{words[2]}.py"
        flags = [
            str(recipe.with_name(word)) if words[n + 2 : n + 3] == ["--config"] else word
            for n, word in enumerate(words[3:])
        ]
        own = [] if words[2] == "causal_lm" else NARROW
        command = [str(recipe), *flags, *TINY, *own]
    else:
        command = [str(Path(sys.executable).with_name("pretrain")), *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([python, *command], **options, timeout=300)


@pytest.mark.slow
def test_the_tutorials_run(workplace):
    order = ("docs/data.md", "docs/evaluation.md", "docs/library.md", "docs/architectures.md")
    order += ("README.md",)
    running = [block for block in BLOCKS if block.comment == "<!-- runs -->"]
    assert {block.page for block in running} == set(order)
    done = set()
    for block in sorted(running, key=lambda block: order.index(block.page)):
        for words in block.commands():
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            result = start(words, workplace)
            assert result.returncode == 0, f"{block.page}: {shlex.join(words)}\n{result.stderr}"
    for page, printed in (("docs/metrics.md", "rows, loss"), ("docs/evaluation.md", "Once upon")):
        (script,) = (b.text for b in BLOCKS if b.page == page and b.language == "python")
        code = f"import os\nos.chdir({str(workplace)!r})\n{script}"
        result = run_command(sys.executable, "-c", code)
        assert result.returncode == 0 and printed in result.stdout, result.stderr


def test_pretrain_train_knows_its_flags():
    (train,) = (p for name, p, _ in generate._commands() if name == "train")
    shown = train.format_help()
    assert "--gpus" in shown and "--config_file" in shown


def anchors(text: str) -> set[str]:
    """Return the anchors of a page, as GitHub and MkDocs make them from its headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


@pytest.fixture(scope="module")
def generated():
    return generate.pages()


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page, generated):
    here = page.relative_to(ROOT).as_posix()
    for address in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        path, _, anchor = address.partition("#")
        if path.startswith(SITE):
            path = re.sub(r"^(blob|tree)/main/", "/", path.removeprefix(SITE))
        if "://" in path or path.startswith(("mailto:", "/commits")):
            continue
        if path.startswith("/"):
            path = path[1:]
        elif path:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        target = path or here
        if target.startswith("docs/reference/"):
            text = generated[posixpath.basename(target)]
        else:
            assert (ROOT / target).exists(), f"{here} links to {address}"
            text = (ROOT / target).read_text() if target.endswith(".md") else ""
        if anchor:
            assert anchor in anchors(text), f"{here} links to {address}"


def test_the_generated_pages_hold_every_setting_command_and_name(generated):
    import pretrain_lib

    settings = parse_recipe(importlib.import_module("gpt2_124m").RECIPE, arguments=[])[0].to_dict()
    for section, values in settings.items():
        for name in values:
            assert f"| `{section}.{name}` |" in generated["settings.md"]
    for name, parser, _ in generate._commands():
        assert f"\n## {name}\n" in generated["commands.md"]
        for flag in parser.flags():
            assert flag in generated["commands.md"] or flag == "-h", flag
    for name in pretrain_lib.__all__:
        assert re.search(rf"^::: pretrain_lib\.[\w.]+\.{name}$", generated["api.md"], re.M), name


def test_settings_that_prose_names_exist(generated):
    sections = re.findall(r"^\| `(\w+)\.\w+` \|", generated["settings.md"], re.M)
    known = set(re.findall(r"^\| `(\w+\.\w+)` \|", generated["settings.md"], re.M))
    pattern = rf"`(?:--)?((?:{'|'.join(sorted(set(sections)))})\.(?!py|sh|jsonl|yaml)\w+)[ `]"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            assert name in known, (page, name)


def test_every_metric_is_described():
    text = (ROOT / "docs" / "metrics.md").read_text()
    loop = (ROOT / "src" / "pretrain_lib" / "training" / "loop.py").read_text()
    (row,) = re.findall(r'row = \{\n\s+"kind": "train",\n(.*?)\n    \}', loop, re.S)
    for name in re.findall(r'^\s+"(\w+)":', row, re.M):
        assert f"`{name}`" in text, name


def test_what_the_pages_make_is_ignored_by_git():
    made = {"site/index.html"}
    for _, words in COMMANDS:
        for flag, value in zip(words, words[1:], strict=False):
            if flag in ("--out", "--run.dir"):
                made.add(value)
            if words[:2] == ["pretrain", "new"]:
                made.add(words[3])
    made = {path for path in made if not path.startswith(("/", "~", "FOLDER"))}
    assert shutil.which("git")
    result = run_command("git", "check-ignore", "--no-index", *(f"{path}/x" for path in made))
    ignored = {line.removesuffix("/x") for line in result.stdout.splitlines()}
    assert made == ignored
