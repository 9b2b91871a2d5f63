"""Who may import whom, and what must be quick."""

import ast
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = {"mm_parallel", "mm_data", "mm_convert", "mm_models", "mm_train", "mm_infer"}
ALLOWED = {
    "mm_parallel": set(),
    "mm_data": set(),
    "mm_convert": set(),
    "mm_models": {"mm_parallel"},
    "mm_train": {"mm_parallel", "mm_data", "mm_convert", "mm_models"},
    "mm_infer": {"mm_parallel", "mm_data", "mm_convert", "mm_models"},
}
SOURCES = {p.name: p for p in [*ROOT.glob("libs/*/src/*"), *ROOT.glob("apps/*/src/*")] if p.name in SIBLINGS}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_package_is_looked_at():
    assert set(SOURCES) == SIBLINGS


@pytest.mark.parametrize("package", sorted(SIBLINGS))
def test_arrows(package):
    for file in SOURCES[package].rglob("*.py"):
        forbidden = imports(file) & SIBLINGS - ALLOWED[package] - {package}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {forbidden}"


def test_only_plans_draw_the_arrow_from_models_to_parallel():
    drawn = {f.name for f in SOURCES["mm_models"].rglob("*.py") if "mm_parallel" in imports(f)}
    typing_only = {"family.py", "families.py"}  # name the type of what is returned, under TYPE_CHECKING
    assert drawn - typing_only == {"plan.py"}


def test_the_only_file_that_knows_devices():
    for file in [*ROOT.glob("libs/*/src/**/*.py"), *ROOT.glob("apps/*/src/**/*.py")]:
        # attention has a kernel for each; mm_convert's store knows what pickles may name
        if file.name != "device.py" and file.parent.name not in ("store", "attention"):
            text = file.read_text()
            for word in ("torch.cuda", "torch_npu", "torch.npu", '"nccl"', '"hccl"'):
                assert word not in text, f"{file.relative_to(ROOT)} mentions {word}: ask mm_parallel.device"


@pytest.mark.parametrize("package", sorted(SIBLINGS))
def test_metadata_says_what_is_imported(package):
    project = tomllib.loads((SOURCES[package].parent.parent / "pyproject.toml").read_text())["project"]
    declared = {d.split("[")[0].split(">")[0].split("=")[0].strip() for d in project["dependencies"]}
    used = set().union(*(imports(f) for f in SOURCES[package].rglob("*.py"))) & SIBLINGS - {package}
    assert {name.replace("_", "-") for name in used} <= declared
    assert not any(d.startswith("torch==") for d in project["dependencies"]), "a package must not pin torch"
    assert "torch_npu" not in declared


@pytest.mark.parametrize("package", sorted(SIBLINGS))
def test_siblings_are_asked_for_by_compatible_versions(package):
    """They are released one by one: a package names the minor version that it was written against, which is here."""
    project = tomllib.loads((SOURCES[package].parent.parent / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        name, _, bounds = re.match(r"([a-z-]+)(\[[a-z,]+\])?(.*)", dependency).groups()
        if (sibling := name.replace("-", "_")) in SIBLINGS:
            major, minor, _ = re.findall(r"\d+", (SOURCES[sibling] / "__about__.py").read_text())
            assert bounds == f">={major}.{minor},<{major}.{int(minor) + 1}", f"{package} asks for {dependency}"


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def test_mm_convert_is_light():
    light = "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    asks_for_help = "try: main(['--help'])\nexcept SystemExit as e: assert not e.code"
    for code in ("import mm_convert", f"from mm_convert.cli import main\n{asks_for_help}"):
        subprocess.run([sys.executable, "-c", f"import sys\n{code}\n{light}"], check=True, capture_output=True)


def test_its_help_is_quick():
    # The best of three: what is promised is the program's own time, not that of a busy machine.
    script = "from mm_convert.cli import main; main(['--help'])"
    assert min(seconds(sys.executable, "-c", script) for _ in range(3)) < 0.5


@pytest.mark.parametrize("program", ["mm_train", "mm_infer", "mm_infer.chat", "mm_infer.caption"])
def test_a_typo_is_answered_without_torch(program):
    wrong = (
        f"import sys, runpy\nsys.argv = ['x', '--modle', 'a']\ntry: runpy.run_module('{program}', run_name='__main__')"
    )
    code = f"{wrong}\nexcept SystemExit as e: assert e.code == 2\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "did you mean --model?" in done.stderr
