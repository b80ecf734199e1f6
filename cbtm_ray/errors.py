"""The one exception whose message is written for a person, how it is printed, and the words for a key that is not allowed."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A user's mistake: names the field, its value, the bound and what to do.

    Only a UserError becomes one line with exit code 2, or a 400. Every other exception, a plain ValueError of a library
    too, is a defect and keeps its traceback. Pydantic's validators raise ValueError, as Pydantic asks.
    """


def unknown_key(key: Any, allowed: Iterable[str], where: str, kind: str = "a key") -> str:
    """The message about a key in section `where` ("" for the root): the nearest allowed key, or all of them."""
    prefix = f"{where}." if where else ""
    names = {name.lower(): name for name in allowed}
    nearest = difflib.get_close_matches(str(key).lower(), names, n=1)
    advice = (
        f"Did you mean {prefix}{names[nearest[0]]}?"
        if nearest
        else f"Remove it. Allowed there: {', '.join(names.values())}."
    )
    return f"{prefix}{key} is not {kind}. {advice}"


def refuse(message: str) -> int:
    """Print a user's mistake in one line; the exit code for it."""
    print(f"error: {message.splitlines()[0]}", file=sys.stderr)
    return 2
