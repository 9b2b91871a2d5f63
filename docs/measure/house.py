"""The house in numbers: `python docs/measure/house.py` prints for each package its modules, lines, floors (the longest
chain of imports inside it, at the top of modules), its longest module and its longest function.
"""

import ast
from functools import cache
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]


def imports(tree: ast.Module, package: str) -> set[str]:
    """Modules of the same package that are imported when this one is; not those under TYPE_CHECKING or in functions."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(package)}
    return found


def measure(source: Path) -> str:
    files = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(source.rglob("*.py"))}
    names = {".".join(file.relative_to(source.parent).with_suffix("").parts): file for file in files}
    arrows = {
        name: imports(files[file], source.name) & names.keys() - {name}
        for name, file in names.items()
        if file.name != "__init__.py"  # faces only hand names on
    }

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in arrows[name] if other in arrows), default=0)

    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    functions = {
        f"{name.removeprefix(source.name + '.')}.{node.name}": node.end_lineno - node.lineno + 1
        for name, file in names.items()
        for node in ast.walk(files[file])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    longest = max(functions, key=functions.get)
    of_modules = f"module median {median(lines.values()):.0f} max {max(lines.values())}"
    return (
        f"{source.name}: {len(files)} modules, {sum(lines.values()):,} lines, {max(map(floor, arrows))} floors, "
        f"{of_modules}, longest function {longest} {functions[longest]}"
    )


if __name__ == "__main__":
    for package in [*ROOT.glob("libs/*/src/*"), *ROOT.glob("apps/*/src/*")]:
        if (package / "__init__.py").exists():
            print(measure(package))
