"""The documentation inside installed Python packages: real text that every machine has, with the package as domain."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from cbtm_ray.corpus.documents import Document
from cbtm_ray.errors import UserError

MIN_CHARACTERS = 200
_LONG_STRING = re.compile(rb'("""|\'\'\').{%d}' % MIN_CHARACTERS, re.DOTALL)
_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def package_documents(package: str, max_bytes: int) -> Iterator[Document]:
    """Docstrings of at least 200 characters, each text once, until `max_bytes` of them are given.

    Files come in the order of a hash of their path, so that a capped package is sampled and not just begun.
    Ids are hashes of the text. The package is read, never imported.

    Raises:
        UserError: the package is not installed.
    """
    seen: set[str] = set()
    budget_bytes = max_bytes
    for path in _source_files(package):
        for text in _docstrings(path.read_bytes()):
            document_id = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            if document_id in seen:
                continue
            seen.add(document_id)
            budget_bytes -= len(text.encode())
            if budget_bytes < 0:
                return
            yield Document(id=document_id, text=text, domain=package)


def package_folder(package: str) -> Path:
    """Where an installed package lies. UserError if it does not, or is a single file."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"corpus.packages: {package!r} is not an installed package. Install it or take it out.")
    return Path(next(iter(spec.submodule_search_locations)))


def _source_files(package: str) -> list[Path]:
    root = package_folder(package)
    return sorted(root.rglob("*.py"), key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


def _docstrings(source: bytes) -> Iterator[str]:
    if not _LONG_STRING.search(source):
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other Python versions are no documentation here
        return
    for node in ast.walk(tree):
        if isinstance(node, _OWNERS):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS and _is_encodable(text):
                yield text


def _is_encodable(text: str) -> bool:
    """False for texts with lone surrogates, which escape sequences in docstrings can make and UTF-8 cannot hold."""
    return not re.search(r"[\ud800-\udfff]", text)
