"""The one exception whose message is written for a person."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: names the field, its value, the bound and what to do.

    Only a UserError becomes one line with exit code 2, or a 400. Every other exception, a plain ValueError of a library
    too, is a defect and keeps its traceback. Pydantic's validators raise ValueError, as Pydantic asks.
    """
