"""English prose out of Python's own documentation and the docstrings of installed packages.

Files are parsed with :mod:`ast`, never imported. The text depends only on the installed versions, which
:func:`versions` lists, so a pinned environment gives the same text everywhere.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import DataError

__all__ = [
    "DOCSTRING_PACKAGES",
    "RULES",
    "docstring_documents",
    "paragraphs",
    "pydoc_documents",
    "versions",
]

#: Installed packages whose docstrings read as English, by import name -> distribution name. All are direct or
#: transitive requirements of this project, pinned in ``constraints.txt``.
DOCSTRING_PACKAGES: dict[str, str] = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
}

RULES = 1  #: of what counts as prose; raise it when the same files would give another text

_SHORTEST_PARAGRAPH = 80  # characters; shorter ones are headings, types and fragments
_SHORTEST_DOCUMENT = 400
_NOT_PROSE = re.compile(
    r">>>|^\s*(\.\. |:\w+|\||[+=\-~^*#]{3,}|\$)|\\[a-z]+\{|\\\\|\bhttps?://\S+$|::=|[{}<>=]{2,}",
    re.MULTILINE,
)
_ROLE = re.compile(r":[\w:+.-]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`")
_CODE = re.compile(r"`{1,2}([^`]*)`{1,2}_{0,2}")
_SKIPPED_DIRECTORIES = frozenset(
    {
        "test",
        "tests",
        "testing",
        "_vendor",
        "vendor",
        "externals",
        "site-packages",
        "idlelib",
        "lib2to3",
    }
)


def versions(kind: str) -> dict[str, str]:
    """Versions on which the text of ``kind`` ("pydoc" or "docstrings") depends.

    Raises:
        DataError: if a package of :data:`DOCSTRING_PACKAGES` is not installed.
    """
    if kind == "pydoc":
        return {"python": platform.python_version()}
    versions = {}
    for distribution in DOCSTRING_PACKAGES.values():
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(
                f"text source 'docstrings' reads {distribution}, which is not installed; install the project's "
                "requirements, or name another source"
            ) from None
    return versions


def pydoc_documents() -> Iterator[tuple[str, str]]:
    """The reference of ``help()`` and the standard library's docstrings, as ``(title, text)`` in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for title, text in sorted(_topics(library / "pydoc_data" / "topics.py").items()):
        yield from _document(f"topic {title}", [text], seen)
    yield from _package_documents("python", library, seen)


def docstring_documents() -> Iterator[tuple[str, str]]:
    """The docstrings of :data:`DOCSTRING_PACKAGES`, one document per source file, in a fixed order."""
    versions("docstrings")
    seen: set[str] = set()
    for package in sorted(DOCSTRING_PACKAGES):
        spec = importlib.util.find_spec(package)  # Finds a top-level package without importing it.
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"text source 'docstrings': package {package} has no directory; reinstall it")
        yield from _package_documents(package, Path(spec.submodule_search_locations[0]), seen)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a docstring that are prose, each on one line, without markup.

    Code, doctests, tables, directives, formulae, headings and parameter types are left out. A paragraph that is kept
    begins with a capital, ends as a sentence does, and consists mostly of words.
    """
    for block in re.split(r"\n\s*\n", text):
        if _NOT_PROSE.search(block):
            continue
        # The first line of a NumPy-style parameter is "name : type"; its explanation is the deeper-indented rest.
        lines = block.strip("\n").splitlines()
        if len(lines) > 1 and re.match(r"\s*[*\w, ]+ ?: ", lines[0]) and _indent(lines[1]) > _indent(lines[0]):
            lines = lines[1:]
        if len({_indent(line) for line in lines}) > 2:
            continue
        line = re.sub(r"\s+", " ", " ".join(lines)).strip()
        line = _CODE.sub(r"\1", _ROLE.sub(r"\1", line)).replace("**", "")
        letters = sum(c.isalpha() or c == " " for c in line)
        if (
            len(line) >= _SHORTEST_PARAGRAPH
            and line[0].isupper()
            and line[-1] in ".!?"
            and letters >= 0.9 * len(line)
            and line.isascii()
        ):
            yield line


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _document(title: str, texts: list[str], seen: set[str]) -> Iterator[tuple[str, str]]:
    """One document from many texts; paragraphs whose letters were seen before are dropped."""
    kept = []
    for text in texts:
        for paragraph in paragraphs(text):
            key = "".join(filter(str.isalpha, paragraph.lower()))
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
    document = "\n\n".join(kept)
    if len(document) >= _SHORTEST_DOCUMENT:
        yield title, document


def _package_documents(name: str, root: Path, seen: set[str]) -> Iterator[tuple[str, str]]:
    for relative in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if _SKIPPED_DIRECTORIES.isdisjoint(relative.split("/")[:-1]):
            yield from _document(f"{name}/{relative}", _docstrings(root / relative), seen)


def _docstrings(path: Path) -> list[str]:
    """Docstrings in the order of the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (
        SyntaxError,
        ValueError,
    ):  # Templates and bad-syntax fixtures: the library ships some.
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _topics(path: Path) -> dict[str, str]:
    """The dictionary ``topics`` that ``help()`` shows, read as a literal."""
    if not path.is_file():
        raise DataError(f"text source 'pydoc': {path} is missing; this Python comes without its help topics")
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return ast.literal_eval(node.value)
    raise DataError(f"text source 'pydoc': {path} defines no topics; this Python's documentation has another form")
