"""What a finished or half-finished stage was made of: refused once one of its inputs is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cbtm_ray import files
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run
from cbtm_ray.stages import MADE_FROM, STAGE_SETTINGS, before
from tests.support.tiny import never, run_with


def make(run: Run, *stages: str, content: str = "first") -> None:
    """Finish these stages, or all, with what their manifest says of their content."""
    for stage in stages or STAGE_SETTINGS:
        run.stage(stage, lambda: {"content": content})


def delete(folder: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(folder / stage)


def listed(error: pytest.ExceptionInfo[UserError], folder: Path) -> list[str]:
    """The folders of the run that a message asks to delete."""
    asked = str(error.value).lower().rpartition("delete ")[2].partition(": the same")[0].rstrip(".")
    return [uri.removeprefix(f"{folder}/".lower()) for uri in asked.split(", ")]


def test_every_stage_says_what_it_is_made_from() -> None:
    assert MADE_FROM.keys() == STAGE_SETTINGS.keys()
    for stage, inputs in MADE_FROM.items():
        assert MADE_FROM.keys() >= set(inputs)
        assert stage not in before(stage)


def test_a_field_of_a_deleted_stage_is_known_to_the_stages_after_it(tmp_path: Path) -> None:
    run = run_with(tmp_path, cluster__n_clusters=8)
    make(run)
    delete(tmp_path, "clusterer")
    with pytest.raises(UserError, match=r"configuration: cluster\.n_clusters=4 \(the run has 8\)\. Give") as caught:
        run_with(tmp_path, cluster__n_clusters=4).open()
    kept = ("corpus", "tokenizer", "clusterer", "seed")
    assert listed(caught, tmp_path) == [s for s in STAGE_SETTINGS if s not in kept and "/controls/" not in s]


def test_a_stage_made_again_as_it_was_leaves_the_stages_after_it_finished(tmp_path: Path) -> None:
    make(run_with(tmp_path))
    for stage in ("corpus", "clusterer", "shards", "seed", "experts"):
        delete(tmp_path, stage)
        run = run_with(tmp_path, cluster__actors=5)
        run.check()
        make(run, stage)
        if stage == "shards":  # whose folder holds the partitions of the controls too
            make(run, *(stage for stage in STAGE_SETTINGS if stage.startswith("shards/")))
        run_with(tmp_path).check()
    assert run_with(tmp_path).stage("evaluation", never)[1] is False


def test_of_a_finished_input_only_its_content_counts(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    make(run)
    for stage in STAGE_SETTINGS:
        run.finish(stage, {"content": "first", "seconds": 99.5, "ended": 1.5, "curve": [], "uris": ["elsewhere"]})
    run.check()


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_whose_input_is_another_now_is_refused(tmp_path: Path, finished: bool) -> None:
    run = run_with(tmp_path)
    make(run, "corpus", "tokenizer", "clusterer")
    if finished:
        make(run, "shards")
    else:
        run.claim("shards")
    delete(tmp_path, "clusterer")
    run.open()
    make(run, "clusterer", content="second")
    with pytest.raises(UserError) as caught:
        run.stage("shards", never)
    assert str(caught.value) == (
        f"{tmp_path}/shards was made from another clusterer than {tmp_path}/clusterer. Delete {tmp_path}/shards: the same "
        "command makes it again."
    )
    with pytest.raises(UserError, match="another clusterer"):
        run_with(tmp_path).open()


def test_all_that_comes_after_another_input_is_named(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    make(run)
    delete(tmp_path, "corpus")
    make(run, "corpus", content="second")
    with pytest.raises(UserError, match="tokenizer was made from another corpus than") as caught:
        run.open()
    assert listed(caught, tmp_path) == [s for s in STAGE_SETTINGS if s != "corpus" and "/controls/" not in s]


def test_another_seed_of_the_random_choices_is_another_corpus(tmp_path: Path) -> None:
    """Though the corpus says the same of its content: the seed of all stages is among its settings."""
    make(run_with(tmp_path))
    delete(tmp_path, "corpus")
    with pytest.raises(UserError, match=r"run\.seed=1 \(the run has 0\)"):
        run_with(tmp_path, run__seed=1).open()


def test_a_folder_of_an_earlier_version_is_continued_as_it_is(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    make(run)
    for stage in STAGE_SETTINGS:
        files.write_json(run.uri(stage, "settings.json"), run.settings(stage))
        files.write_json(run.uri(stage, "manifest.json"), {})
    files.delete(run.uri("controls", "dense", "settings.json"))
    files.delete(run.uri("evaluation", "manifest.json"))
    run.open()
    assert run.stage("experts", never)[1] is False
    make(run, "evaluation")
    assert "made_from" not in files.read_json(run.uri("evaluation", "settings.json"))
    with pytest.raises(UserError, match=r"cluster\.n_clusters"):
        run_with(tmp_path, cluster__n_clusters=4).open()


def test_stages_of_a_shared_run_are_inputs_like_others(tmp_path: Path) -> None:
    base, shared = run_with(tmp_path / "base"), [str(tmp_path / "base")]
    make(base, "corpus", "tokenizer", "clusterer", "shards", "seed")
    make(run_with(tmp_path / "point", run__shared=shared), "experts")
    run_with(tmp_path / "point", run__shared=shared).open()
    delete(tmp_path / "base", "shards")
    make(run_with(tmp_path / "base"), "shards", content="second")
    with pytest.raises(UserError) as caught:
        run_with(tmp_path / "point", run__shared=shared).open()
    assert str(caught.value) == (
        f"run.shared: {tmp_path}/point/experts was made from another shards than {tmp_path}/base/shards. Take {tmp_path}/base "
        "out of run.shared, or give another run.dir."
    )


def test_one_seed_serves_shards_of_any_clusters(tmp_path: Path) -> None:
    """As in a sweep, which trains it on the first of them."""
    make(run_with(tmp_path / "shared"), "corpus", "tokenizer")
    for k in (2, 4):
        shared = [str(tmp_path / "shared")]
        make(run_with(tmp_path / f"k{k}", run__shared=shared, cluster__n_clusters=k), "clusterer", "shards")
    first = [str(tmp_path / "shared"), str(tmp_path / "k2")]
    make(run_with(tmp_path / "shared", run__shared=first, cluster__n_clusters=2), "seed")
    point = run_with(tmp_path / "k4", run__shared=[str(tmp_path / "shared")], cluster__n_clusters=4)
    point.open()
    make(point, "experts")


def test_experts_of_a_warm_start_are_made_from_those_of_the_other_run(tmp_path: Path) -> None:
    make(run_with(tmp_path / "other"))
    warm = {"train__warm_start": str(tmp_path / "other")}
    make(run_with(tmp_path / "run", **warm))
    delete(tmp_path / "other", "experts")
    run_with(tmp_path / "run", **warm).check()
    make(run_with(tmp_path / "other"), "experts", content="second")
    with pytest.raises(UserError, match=f"run/experts was made from another seed than {tmp_path}/other/experts"):
        run_with(tmp_path / "run", **warm).check()


def checkpoints(folder: Path, shards: str = "first", seed: str = "first", **settings: Any) -> tuple[str, str]:
    """Where a new run has the checkpoints of its seed and of an expert."""
    run = run_with(folder, **settings)
    make(run, "corpus", "tokenizer", "clusterer")
    make(run, "shards", content=shards)
    run.claim("seed")
    of_seed = run.checkpoints("seed")
    make(run, "seed", content=seed)
    run.claim("experts")
    of_expert = run.checkpoints("experts/cluster=0003")
    shutil.rmtree(folder)
    return of_seed, of_expert


def test_checkpoints_of_other_settings_inputs_or_shards_are_never_found(tmp_path: Path) -> None:
    of_seed, of_expert = checkpoints(tmp_path)
    assert of_seed.startswith(f"{tmp_path}/checkpoints/seed/")
    assert of_expert.startswith(f"{tmp_path}/checkpoints/experts/cluster=0003/")
    assert checkpoints(tmp_path, train__log_every=3) == (of_seed, of_expert)
    assert checkpoints(tmp_path, train__total_tokens=3_200_000)[0] == of_seed
    others = [
        checkpoints(tmp_path, train__total_tokens=3_200_000)[1],
        checkpoints(tmp_path, seed="second")[1],
        *checkpoints(tmp_path, shards="second"),
    ]
    assert len({of_seed, of_expert, *others}) == 6


def test_checkpoints_of_an_earlier_version_are_where_they_were(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    files.write_json(run.uri("experts", "settings.json"), run.settings("experts"))
    assert run.checkpoints("experts/cluster=0003") == f"{tmp_path}/checkpoints/experts/cluster=0003"


def test_the_settings_of_a_stage_name_what_it_was_made_from(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    make(run, "corpus", "tokenizer", "clusterer")
    run.claim("shards")
    made_from = json.loads((tmp_path / "shards" / "settings.json").read_text())["made_from"]
    assert made_from == {stage: run.identity(stage) for stage in ("corpus", "tokenizer", "clusterer")}
    assert len(set(made_from.values())) == 3
