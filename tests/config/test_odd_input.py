"""Odd settings: one line that names flag or file, value, rule and remedy; nothing is made."""

import dataclasses
import math
import sys

import pytest

from pretrain_lib import GPT2Config, LlamaConfig, Recipe
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.models.rope import RopeScaling
from pretrain_lib.training.run_recipe import run_recipe
from pretrain_lib.values import kinds_of, rules_of
from tests.conftest import change, run_recipe_script

GPT2_RECIPE = Recipe(model=GPT2Config())
LLAMA_RECIPE = Recipe(model=LlamaConfig())
SCALING = RopeScaling("yarn", 2.0, original_context_length=32)


def refuse(recipe, *arguments):
    """Return the one line with which a recipe's arguments are refused."""
    with pytest.raises(ValueError, match=".") as refused:
        parse_recipe(recipe, arguments=[str(argument) for argument in arguments])
    text = str(refused.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("optimizer.epsilon", "-1", "must be a number of at least 1e-30 and at most 1"),
        ("optimizer.betas", "[0.9, 1]", "must be two numbers of at least 0 and below 1"),
        ("optimizer.betas", "[-0.1, 0.9]", "must be two numbers of at least 0 and below 1"),
        ("optimizer.betas", "[0.9]", "must be two numbers"),
        ("optimizer.learning_rate", "1e400", "must be a number of at least 0"),
        ("model.dropout", "1", "must be a number of at least 0 and below 1"),
        ("model.dropout", "-0.1", "must be a number of at least 0 and below 1"),
        ("schedule.tokens", "1e30", "must be a number of tokens of at least 1 and at most 1,000"),
        ("schedule.tokens", "1e999999999", "must be a number of tokens"),
        ("schedule.final_fraction", "-1", "must be a number of at least 0 and at most 1"),
        ("samples.temperature", "1e-40", "must be 0, or a number of at least 0.001"),
        ("stability.spike_sigma", "0", "must be a number above 0, or null"),
        ("samples.top_p", "0", "must be a number above 0 and at most 1, or null"),
        ("samples.growth", "1e300", "must be a number of at least 1 and at most 1,000"),
        ("schedule.kind", "cosin", "must be cosine, linear, constant or wsd; did you mean cosine?"),
        ("scores.tasks", "hellaswag", "must be a list such as [a, b]"),
        ("run.dir", "", "must be text"),
        ("data.document_masking", "yes", "must be true or false"),
    ],
)
def test_a_flag_is_refused_by_its_rule(flag, value, expected):
    shown = value or "''"
    assert refuse(GPT2_RECIPE, f"--{flag}", value).startswith(f"--{flag} {shown} {expected}")


def test_a_run_folder_behind_a_url_is_refused():
    recipe = change(GPT2_RECIPE, run={"dir": "s3://bucket/run"})
    with pytest.raises(ValueError, match=r"^run\.dir=s3://bucket/run must be a local path; copy"):
        recipe.check(processes=1)


def test_a_misspelt_name_among_the_allowed_changes_is_refused():
    error = refuse(GPT2_RECIPE, "--run.allow_changes", "[schedule.token]")
    assert error.startswith("run.allow_changes=")
    assert "schedule.token is no setting; did you mean schedule.tokens?" in error
    for name in ("data", "schedule.tokens", "model.dropout"):
        parse_recipe(GPT2_RECIPE, arguments=["--run.allow_changes", f"[{name}]"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: {seed: 1}\nrun: {seed: 2}", "{f}, line 2: run stands twice, also in line 1"),
        (b"run:\n  seed: 1\n  seed: 2", "{f}, line 3: seed stands twice, also in line 2"),
        (b"run: {dir: \xff}", "{f} is not UTF-8 (byte 0xff at position 11): save it as UTF-8"),
        ("run: {seed: 1}".encode("utf-16"), "{f} is not UTF-8"),
        (b"run: {seed: 1", "{f}, line 1: "),
        (b"run: [seed]", "{f}: run must hold settings"),
        (b"run: !!python/object:os.system {}", "{f}, line 1: the tag !!python/object:os.system is"),
        (b"run: {seed: !mine 1}", "{f}, line 1: the tag !mine is not allowed"),
        (b"run.seed: 1", "{f}: run.seed is a setting in a section: write run: {{seed: 1}}"),
        (b"run: 5", "{f}: run must hold settings"),
        (b"[1, 2]", "{f} must hold sections"),
        (b"rnu: {seed: 1}", "{f}: rnu.seed is no setting; did you mean run.seed?"),
        (b"run: {sede: 1}", "{f}: run.sede is no setting; did you mean run.seed?"),
        (b"run: {seed: }", "{f}: run.seed '' must be a whole number"),
        (b"run: {seed: [1]}", "{f}: run.seed ['1'] must be a whole number"),
        (b"run: {max_time: 1:30}", "{f}: run.max_time 1:30 must be a time"),
        (b"data: {document_masking: on}", "{f}: data.document_masking on must be true or false"),
        (b"optimizer: {betas: [0.9, .nan]}", "{f}: optimizer.betas"),
        (b"\x00", "{f} is no YAML"),
        (b"run: '\n\n  0'\n", "{f}: run must hold settings, such as run: {{seed: 1}}, not '\\n0'"),
        (b'"a\\nb": 3', "{f}: 'a\\nb' must hold settings"),
        (b'"a.b\\n": "c\\nd"', "{f}: 'a.b\\n' is a setting in a section"),
        (b'"a\\nb": 3\n"a\\nb": 4', "{f}, line 2: 'a\\nb' stands twice"),
        (b'run: {"a\\nb": 3}', "{f}: 'run.a\\nb' is no setting"),
        (b"? [a]\n: b", "{f}, line 1: the key ['a'] is not a name"),
        (b"run: {? {a: b} : c}", "{f}, line 1: the key {{'a': 'b'}} is not a name"),
    ],
)
def test_an_overlay_is_refused_with_its_name_and_line(tmp_path, content, expected):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    error = refuse(GPT2_RECIPE, "--config", file)
    assert error.startswith(expected.format(f=file)) and "\n" not in error


@pytest.mark.parametrize(
    "flags", [["--no\npe"], ["x\ny"], ["--run.seed", "1\n2"], ["--config", "\n"]]
)
def test_what_is_written_over_two_lines_is_refused_in_one(flags):
    assert "\n" not in refuse(GPT2_RECIPE, *flags)


@pytest.mark.parametrize("content", ["run:\n#  seed: 1\n", "run: null", "run: {}", "", "# nothing"])
def test_a_section_without_keys_keeps_the_recipes_own(tmp_path, content):
    recipe = change(GPT2_RECIPE, run={"seed": 7, "dir": "runs/own"})
    file = tmp_path / "empty.yaml"
    file.write_text(content)
    assert parse_recipe(recipe, arguments=["--config", str(file)])[0] == recipe


def test_an_overlay_that_is_not_there_is_named(tmp_path):
    assert refuse(GPT2_RECIPE, "--config", tmp_path / "no.yaml").startswith("--config ")
    assert "cannot be read: Is a directory" in refuse(GPT2_RECIPE, "--config", tmp_path)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "o.yaml").write_text("run: {dir: ~/runs/x}\nscores: {include_path: ~/tasks}")
    flags = ["--config", "~/o.yaml", "--run.resume", "~/runs/y"]
    config, _ = parse_recipe(GPT2_RECIPE, arguments=flags)
    assert config.run.dir == f"{tmp_path}/runs/x"
    assert config.run.resume == f"{tmp_path}/runs/y"
    assert config.scores.include_path == f"{tmp_path}/tasks"
    assert dataclasses.replace(GPT2_RECIPE.run, dir="~/z").dir == f"{tmp_path}/z"


def outside(rule):
    """Return texts of another type, out of range, NaN, infinite, empty, by a rule's fields."""
    kinds = [kind for kind in kinds_of(rule.kind) if kind is not type(None)]
    wrong = [""] + ["null"] * (type(None) not in kinds_of(rule.kind) and str not in kinds)
    if str in kinds:
        return wrong
    wrong += ["x y", "{a: 1}", "[[1]]", "'", "[", "\0", "☃", "nan", "inf", "-inf", "-nan", "1e400"]
    numbers = [k for k in kinds if isinstance(k, type) and issubclass(k, int | float)]
    if bool not in numbers and numbers:
        limits = [(rule.minimum, -1), (rule.maximum, 1)]
        wrong += [f"{limit + side:.17g}" for limit, side in limits if limit is not None]
        wrong += [f"{limit:.17g}" for limit in (rule.above, rule.below) if limit is not None]
        wrong += ["true", "9" * 5000]
        wrong += ["1.5", "1e30"] if all(issubclass(k, int) for k in numbers) else []
    return wrong


def fields_of(recipe):
    for section in dataclasses.fields(recipe):
        for name, rule in rules_of(type(getattr(recipe, section.name))).items():
            yield f"{section.name}.{name}", rule


ALL = {name: (GPT2_RECIPE, rule) for name, rule in fields_of(GPT2_RECIPE)}
ALL |= {name: (LLAMA_RECIPE, rule) for name, rule in fields_of(LLAMA_RECIPE) if name not in ALL}


@pytest.mark.parametrize("name", ALL)
def test_no_value_outside_a_rule_is_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, rule = ALL[name]
    section, _, field = name.partition(".")
    tried = outside(rule)
    if rule.kind == list[str]:
        tried = ["", "x", "{a: 1}", "[[1]]", "[", "nan", "null"]
    for value in tried:
        flag = refuse(recipe, f"--{name}={value}")
        assert flag.startswith(f"--{name} "), (value, flag)
        assert "must be" in flag or "has no field" in flag, (value, flag)
    assert refuse(recipe, f"--{name}", tried[-1]) == flag
    for value in ("", ".nan", "[[1]]", "{a: 1}"):
        file = tmp_path / "odd.yaml"
        file.write_text(f"{section}:\n  {field}: {value}\n")
        if value == ".nan" and str in kinds_of(rule.kind):
            continue  # it is text
        error = refuse(recipe, "--config", file)
        assert error.startswith(f"{file}: {name} "), error
    assert refuse(recipe, f"--{name}").startswith(f"--{name} expected one argument")
    assert refuse(recipe, f"--{name}x", "1").startswith(f"there is no flag --{name}x; did you mean")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.yaml"]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_in_python_is_held_to_the_same_rules(name):
    recipe, rule = ALL[name]
    section, _, field = name.partition(".")
    for value in (math.nan, math.inf, object(), [[1]], {"a": 1}):
        with pytest.raises(ValueError, match=rf"{name}=.* must be"):
            change(recipe, **{section: {field: value}}).check_values()


@pytest.mark.parametrize("name", ALL)
def test_help_tells_sentence_rule_and_default(name, capsys):
    recipe, rule = ALL[name]
    assert rule.help and rule.help[-1] == "." and rule.help.count(". ") <= 2
    shown = help_of(recipe, capsys)
    default = getattr(getattr(recipe, name.split(".")[0]), name.split(".")[1])
    start = shown.index(f"--{name} ")
    text = shown[start : start + 700]
    assert " ".join(rule.help.split())[:60] in text
    assert " ".join(rule.describe().split()) in text
    assert "default: " in text
    if isinstance(default, int) and not isinstance(default, bool):
        assert f"default: {int(default)}" in text


def help_of(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(recipe, arguments=["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", rules_of(RopeScaling))
def test_no_value_outside_a_rule_is_taken_within_a_setting(name):
    rule = rules_of(RopeScaling)[name]
    known = {f.name: getattr(SCALING, f.name) for f in dataclasses.fields(SCALING)}
    for value in outside(rule):
        if value.isprintable() and value.isalnum() or value[:1] == "-":
            written = {k: v for k, v in known.items() if v is not None} | {name: value}
            text = ", ".join(f"{key}: {item}" for key, item in written.items())
            error = refuse(LLAMA_RECIPE, "--model.rope_scaling", f"{{{text}}}")
            assert error.startswith(f"--model.rope_scaling with {name} "), error
    assert "lacks factor" in refuse(LLAMA_RECIPE, "--model.rope_scaling", "{kind: yarn}")
    assert "did you mean factor" in refuse(LLAMA_RECIPE, "--model.rope_scaling", "{factr: 1}")


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE=2 is set in the environment, but not RANK"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE=two in the environment must be a number"),
        ({"WANDB_MODE": "online"}, {"log.trackers": "[wandb]"}, "wandb needs a login: run `wandb"),
        ({}, {"log.trackers": "[tensorbord]"}, "did you mean tensorboard?"),
        ({}, {"run.resume": "atuo"}, "did you mean auto?"),
        ({}, {"run.initial_weights": "{d}/nothing"}, "is no folder: give one with config.json"),
        ({}, {"run.initial_weights": "{d}/broken"}, "config.json is damaged, no JSON"),
        (
            {},
            {"scores.tasks": "[x]", "scores.include_path": "{d}/no"},
            "scores.include_path={d}/no",
        ),
        ({}, {"batch.tokens": "1000"}, "batch.tokens=1000 must be a multiple of"),
        ({}, {"samples.top_p": "0"}, "--samples.top_p 0 must be a number above 0"),
    ],
)
def test_a_run_is_refused_before_anything_is_made(
    environment, flags, expected, tmp_path, monkeypatch, capsys
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = {"run.dir": "{d}/run", "scores.tasks": "[]"} | flags
    words = [f"--{name}={value.format(d=tmp_path)}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    with pytest.raises(SystemExit) as end:
        run_recipe(lambda config: pytest.fail("it has begun"), GPT2_RECIPE)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert expected.format(d=tmp_path) in shown
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_real_process_says_it_in_one_line_too(tmp_path):
    flags = ["--run.dir", tmp_path / "run", "--optimizer.epsilon", "-1"]
    result = run_recipe_script(*flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --optimizer.epsilon -1 must be")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("null", ["~", "null", "Null", "NULL"])
def test_null_is_read_in_every_spelling_of_yaml(tmp_path, null):
    file = tmp_path / "null.yaml"
    file.write_text(f"run: {{max_steps: {null}}}\ndata: {{path: {null}}}")
    config, _ = parse_recipe(GPT2_RECIPE, arguments=["--config", str(file)])
    assert config.run.max_steps is None and config.data.path is None
    file.write_text("run: {dir: '~'}")  # quoted, it is text
    assert parse_recipe(GPT2_RECIPE, arguments=["--config", str(file)])[0].run.dir != "null"
