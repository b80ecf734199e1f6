"""What is looked for before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cbtm_ray.errors import UserError
from cbtm_ray.inputs import check_inputs
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from tests.tiny import tiny_tree, write_corpus


def run_with(tmp_path: Path, **sections: dict[str, Any]) -> Run:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=8))
    for section, fields in sections.items():
        tree[section].update(fields)
    return Run(build_config(tree))


def test_what_is_there_passes(tmp_path: Path) -> None:
    check_inputs(run_with(tmp_path))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpus": {"paths": ["/nowhere"]}}, r"^corpus\.paths: /nowhere holds no documents"),
        ({"corpus": {"valid_paths": ["/nowhere"]}}, r"^corpus\.valid_paths: /nowhere holds no documents"),
        (
            {"corpus": {"paths": [], "packages": ["yaml", "no_such"]}},
            r"^corpus\.packages: 'no_such' is not an installed",
        ),
        ({"tokens": {"tokenizer": "./nowhere"}}, r"^tokens\.tokenizer='\./nowhere' does not exist\. Give a folder"),
        ({"seed_model": {"name_or_path": "/no/model"}}, r"^seed_model\.name_or_path='/no/model' does not exist"),
        ({"embed": {"embedder": "sentence", "encoder": "/nowhere"}}, r"^embed\.encoder='/nowhere' does not exist"),
        ({"train": {"warm_start": "runs/nowhere"}}, r"^train\.warm_start='runs/nowhere' does not exist"),
        ({"tokens": {"tokenizer": "foo://bar"}}, r"^tokens\.tokenizer=foo://bar cannot be reached: "),
    ],
)
def test_what_is_not_there_is_refused_by_its_field(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_inputs(run_with(tmp_path, **sections))


def test_a_name_that_the_hub_may_have_passes(tmp_path: Path) -> None:
    check_inputs(run_with(tmp_path, tokens={"tokenizer": "someone/tokenizer"}, seed_model={"name_or_path": "model"}))


def test_what_a_finished_stage_was_made_of_may_be_gone(tmp_path: Path) -> None:
    run = run_with(tmp_path, corpus={"paths": ["/gone"]}, seed_model={"name_or_path": "/gone"})
    run.stage("corpus", dict)
    run.stage("seed", dict)
    check_inputs(run)
