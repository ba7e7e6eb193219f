"""What must stay out: imports that go up, torch in `--help`, pickle anywhere, recipes that do not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth.recipe import load

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lorabooth").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
DEMO = ROOT / "lorabooth" / "pocket" / "demo" / "recipe.toml"

PICKLING = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.save",
    "eval",
    "exec",
    "os.system",
    "__import__",
}
FORBIDDEN_TRUE = {"trust_remote_code", "allow_pickle", "shell"}
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "pydantic",
    "rich",
    "numpy",
    "PIL",
    "tomlkit",
)


def test_rooms_import_one_way() -> None:
    """The contracts are in pyproject.toml, [tool.importlinter]."""
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in ("train", "pocket", "evaluate"))]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from lorabooth.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Typer itself takes pydantic for the types of a command's options, where it is installed.
    allowed = {"pydantic"} if len(arguments) > 1 else set()
    assert set(found.stdout.splitlines()[-1].split()) - {"HEAVY"} <= allowed


def test_commands_on_files_copy_while_torch_is_loaded_and_do_not_wait_for_it() -> None:
    code = "import sys, lorabooth.exchange, lorabooth.cli.merge; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_importing_the_package_is_cheap_and_its_names_are_there() -> None:
    code = "import sys, lorabooth; print('torch' in sys.modules); print(*lorabooth.__all__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, names = found.stdout.splitlines()
    assert heavy == "False"
    assert {"Recipe", "train", "RunResult", "sample", "load_adapter"} <= set(names.split())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_no_remote_code_no_eval(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        where = f"{source}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLING, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLING, where
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, where
            for keyword in node.keywords:
                assert keyword.arg != "custom_pipeline", where
                if keyword.arg in FORBIDDEN_TRUE:
                    assert ast.unparse(keyword.value) == "False", where


def test_the_fence_against_pickle_sees_it() -> None:
    tree = ast.parse("import torch\nx = torch.load(f)")
    assert any(isinstance(n, ast.Call) and ast.unparse(n.func) in FORBIDDEN_CALLS for n in ast.walk(tree))


def test_no_file_says_where_it_was_made() -> None:
    here = re.compile(re.escape(str(ROOT)) + r"\b|" + re.escape(str(ROOT.parent / "shared")))
    for source in [*SOURCES, *RECIPES, DEMO]:
        assert not here.search(source.read_text(encoding="utf-8")), source


def test_the_issue_s_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    wanted = {"pocket-demo", "sd15-subject", "sd15-person", "sd21-subject", "style", "several-subjects"}
    assert names >= wanted


@pytest.mark.parametrize("path", [*RECIPES, DEMO], ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_commented(path: Path) -> None:
    recipe = load(path)
    assert recipe.subjects
    assert path.read_text(encoding="utf-8").count("#") >= 5


def test_the_demo_s_recipe_is_the_one_under_recipes() -> None:
    assert load(ROOT / "recipes" / "pocket-demo.toml") == load(DEMO)


def test_what_recipes_are_about() -> None:
    by_name = {path.stem: load(path) for path in RECIPES}
    assert by_name["pocket-demo"].model.base == "pocket"
    assert by_name["sd15-person"].adapter.text_encoder
    assert len(by_name["several-subjects"].subjects) > 1
    assert {by_name[name].prior.mode for name in by_name} == {"generated", "distill"}
