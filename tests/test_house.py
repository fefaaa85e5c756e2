"""The rules of the house: sizes, and modules that do not import each other in a circle."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {file.stem: file for file in sorted(ROOT.glob("*.py"))}
FILES = [*MODULES.values(), *(file for folder in ("tests", "results", "docs")
                              for file in sorted(ROOT.glob(f"{folder}/*.py")))]


def imported_modules(source, names):
    """The modules among `names` that a source imports anywhere, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found & set(names)


def find_circle(imports):
    """A list of modules, each importing the next and the last the first, or None.

    imports: {module: the modules that it imports}.
    """
    finished = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module):]
        if module in finished:
            return None
        for imported in sorted(imports[module]):
            circle = visit(imported, [*path, module])
            if circle:
                return circle
        finished.add(module)
        return None

    circles = (visit(module, []) for module in sorted(imports))
    return next((circle for circle in circles if circle), None)


def long_functions(source, limit=60):
    """["name: lines"] of the functions with more lines than the limit, docstring included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > limit:
                found.append(f"{node.name}: {lines} lines")
    return found


def long_lines(text, limit=100):
    """["number: columns"] of the lines with more columns than the limit."""
    return [f"{number}: {len(line)} columns" for number, line in enumerate(text.splitlines(), 1)
            if len(line) > limit]


def test_modules_do_not_import_in_a_circle():
    imports = {name: imported_modules(file.read_text(), MODULES)
               for name, file in MODULES.items()}
    assert imports["train"] >= {"checkpoint", "mora", "optimizer"}
    assert find_circle(imports) is None


def test_a_circle_inside_functions_is_found():
    late = "def f():\n    from b import g\n    return g"
    assert imported_modules(late, "ab") == {"b"}
    assert imported_modules("import os, b.c\nfrom . import a", "ab") == {"b"}
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_circle({"a": {"a"}}) == ["a"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_root_files():
    assert len(MODULES) <= 18, sorted(MODULES)


def test_configs():
    configs = sorted(file.name for file in (ROOT / "configs").glob("*.py"))
    assert 0 < len(configs) <= 24, configs


@pytest.mark.parametrize("file", MODULES.values(), ids=list(MODULES))
def test_functions_are_short(file):
    assert long_functions(file.read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_lines_are_short(file):
    assert long_lines(file.read_text()) == []


def test_too_long_is_found():
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * 59) == []
    assert long_functions("class C:\n  def f():\n" + body * 60) == ["f: 61 lines"]
    assert long_lines("a" * 100 + "\n" + "é" * 101) == ["2: 101 columns"]


def test_the_root_is_read_in_an_afternoon():
    assert sum(len(file.read_text().splitlines()) for file in MODULES.values()) < 5000
