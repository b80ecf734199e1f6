"""The run directory: finished stages are skipped, others continued, and a differing configuration is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cbtm_ray.config import EXECUTION_FIELDS
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import config_tree, load_config
from cbtm_ray.stages import STAGE_SETTINGS
from tests.support.tiny import never, run_with


def finish(folder: Path, stage: str, **overrides: Any) -> None:
    run_with(folder, **overrides).stage(stage, dict)


def test_a_stage_runs_once(tmp_path: Path) -> None:
    made, ran = run_with(tmp_path).stage("corpus", lambda: {"documents": 3})
    assert ran
    assert made["documents"] == 3
    assert made["seconds"] >= 0
    assert run_with(tmp_path).stage("corpus", never) == (made, False)
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == made


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    run = run_with(tmp_path)

    def work() -> dict[str, Any]:
        assert run.manifest("shards") is None
        assert (tmp_path / "shards" / "settings.json").exists()
        return {}

    run.stage("shards", work)
    assert run.manifest("shards") is not None


def test_a_stage_that_fails_is_not_finished_and_is_continued(tmp_path: Path) -> None:
    run = run_with(tmp_path)

    def fail() -> dict[str, Any]:
        (tmp_path / "corpus" / "half.txt").write_text("made so far")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        run.stage("corpus", fail)
    assert run.manifest("corpus") is None
    run.check()
    made, ran = run.stage("corpus", lambda: {"found": (tmp_path / "corpus" / "half.txt").read_text()})
    assert ran
    assert made["found"] == "made so far"


@pytest.mark.parametrize(
    ("stage", "field", "before", "now"),
    [
        ("corpus", "run__seed", 0, 1),
        ("corpus", "corpus__text_column", "text", "body"),
        ("tokenizer", "tokens__vocab_size", 512, 1024),
        ("clusterer", "embed__dimensions", 10, 20),
        ("clusterer", "cluster__n_clusters", 2, 4),
        ("seed", "seed_model__hidden_size", 32, 64),
        ("seed", "train__betas", [0.9, 0.95], [0.9, 0.99]),
        ("experts", "train__learning_rate", 1e-3, 2e-3),
        ("experts", "tokens__sequence_length", 64, 128),
        ("evaluation", "evaluate__top_k", [1], [1, 2]),
    ],
)
def test_another_configuration_is_refused_by_the_stage_that_depends_on_it(
    tmp_path: Path, stage: str, field: str, before: Any, now: Any
) -> None:
    finish(tmp_path, stage, **{field: before})
    run_with(tmp_path, **{field: before}).check()
    with pytest.raises(UserError, match="was made with another configuration") as caught:
        run_with(tmp_path, **{field: now}).check()
    message = str(caught.value)
    assert f"run.dir={tmp_path} " in message
    assert f"{field.replace('__', '.')}={now!r} (the run has {before!r})" in message
    assert f"Give another run.dir, restore the field, or delete {tmp_path / stage}." in message


def test_clusters_older_than_their_refinement_are_not_taken_for_refined_ones(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    run.stage("clusterer", dict)
    settings = tmp_path / "clusterer" / "settings.json"
    older = {name: value for name, value in json.loads(settings.read_text()).items() if "refine" not in name}
    settings.write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"cluster.refine='likelihood' \(the run has 'none'\)"):
        run.check("clusterer")
    run_with(tmp_path, cluster__refine="none").check("clusterer")


def test_a_directory_older_than_a_field_was_made_with_its_default(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    older = {name: value for name, value in run.settings("evaluation").items() if name != "evaluate.routings"}
    (tmp_path / "evaluation").mkdir()
    settings = tmp_path / "evaluation" / "settings.json"
    settings.write_text(json.dumps(older))
    run.check()
    with pytest.raises(
        UserError, match=r"evaluate\.routings=\['prefix'\] \(the run has \['embedding', 'ngram', 'posterior', "
    ):
        run_with(tmp_path, evaluate__routings=["prefix"]).check()
    del older["tokens.sequence_length"]
    settings.write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"tokens\.sequence_length=64 \(the run has "):
        run_with(tmp_path, tokens__sequence_length=64).check()


def test_an_unfinished_stage_refuses_another_configuration_too(tmp_path: Path) -> None:
    run_with(tmp_path, run__seed=0).claim("corpus")
    with pytest.raises(UserError, match=r"run\.seed=1 \(the run has 0\)"):
        run_with(tmp_path, run__seed=1).check()


def refuse_input() -> dict[str, Any]:
    raise UserError("the column is called otherwise")


def test_a_stage_that_refused_its_input_takes_the_mended_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="called otherwise"):
        run_with(tmp_path, corpus__text_column="text").stage("corpus", refuse_input)
    mended = run_with(tmp_path, corpus__text_column="body")
    mended.check()
    assert mended.stage("corpus", dict)[1]


def test_a_stage_that_made_something_before_it_refused_its_input_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "model.safetensors").write_text("made with the first configuration")
    with pytest.raises(UserError, match="called otherwise"):
        run_with(tmp_path, seed_model__hidden_size=32).stage("seed", refuse_input)
    with pytest.raises(UserError, match=r"seed_model\.hidden_size=64 \(the run has 32\)"):
        run_with(tmp_path, seed_model__hidden_size=64).check()


@pytest.mark.parametrize("dense", [False, True])
def test_the_dense_control_is_tied_like_the_experts_that_it_is_trained_with(tmp_path: Path, dense: bool) -> None:
    first = run_with(tmp_path, train__learning_rate=0.1)

    def refuse_later() -> dict[str, Any]:
        first.claim("controls/dense")
        if dense:
            first.finish("controls/dense", {})
        return refuse_input()

    with pytest.raises(UserError, match="called otherwise"):
        first.stage("experts", refuse_later)
    mended = run_with(tmp_path, train__learning_rate=0.2)
    if dense:
        with pytest.raises(UserError, match=rf"or delete {tmp_path}/controls/dense\.$"):
            mended.check()
    else:
        mended.check()


def test_an_evaluation_that_refused_its_input_keeps_log_probabilities_and_takes_the_mended_one(tmp_path: Path) -> None:
    def score_then_refuse() -> dict[str, Any]:
        (tmp_path / "evaluation" / "logprobs").mkdir()
        (tmp_path / "evaluation" / "logprobs" / "seed-0123.npy").touch()
        return refuse_input()

    with pytest.raises(UserError, match="called otherwise"):
        run_with(tmp_path, evaluate__fewshot=["gone.jsonl"]).stage("evaluation", score_then_refuse)
    assert run_with(tmp_path, evaluate__fewshot=["there.jsonl"]).stage("evaluation", dict)[1]
    assert (tmp_path / "evaluation" / "logprobs" / "seed-0123.npy").exists()


def test_every_differing_field_is_named(tmp_path: Path) -> None:
    finish(tmp_path, "clusterer")
    changed = run_with(tmp_path, embed__dimensions=7, cluster__n_clusters=3, cluster__balanced=False)
    with pytest.raises(UserError, match=r"cluster\.balanced=False .*cluster\.n_clusters=3 .*embed\.dimensions=7 "):
        changed.check()


def test_a_field_that_no_made_stage_depends_on_may_change(tmp_path: Path) -> None:
    for stage in ("corpus", "tokenizer", "clusterer", "shards"):
        finish(tmp_path, stage)
    run_with(tmp_path, train__learning_rate=0.5, evaluate__top_k=[3], seed_model__hidden_size=32).check()


def test_the_training_budget_of_the_experts_leaves_the_seed(tmp_path: Path) -> None:
    finish(tmp_path, "seed")
    run_with(tmp_path, train__total_tokens=2_000_000, train__learning_rate=0.5).check()


def test_a_finished_run_can_be_given_a_control_once_its_evaluation_is_gone(tmp_path: Path) -> None:
    for stage in STAGE_SETTINGS:
        finish(tmp_path, stage, train__controls=["random"])
    more = run_with(tmp_path, train__controls=["random", "unbalanced"])
    with pytest.raises(
        UserError, match=r"train\.controls=\['random', 'unbalanced'\] \(the run has \['random'\]\)"
    ) as caught:
        more.check()
    later = ("evaluation", "average", "export/moe", "export/adapters")
    assert str(caught.value).endswith(f"or delete {', '.join(str(tmp_path / stage) for stage in later)}.")
    for stage in later:
        shutil.rmtree(tmp_path / stage)
    more.check()
    for stage in ("experts", "controls/dense", "controls/random", "controls/unbalanced"):
        with pytest.raises(UserError, match=r"train\.learning_rate"):
            run_with(tmp_path, train__controls=["random"], train__learning_rate=0.5).check()
        (tmp_path / stage / "settings.json").unlink()


def test_where_and_how_fast_it_runs_may_change(tmp_path: Path) -> None:
    for stage in STAGE_SETTINGS:
        finish(tmp_path, stage)
    changed = {
        "embed__batch_documents": 5,
        "embed__gpus": 0.5,
        "cluster__actors": 7,
        "cluster__gpus_per_actor": 1,
        "seed_model__cpus": 3,
        "train__slots": 5,
        "train__experts_per_run": 4,
        "train__cpus_per_expert": 2,
        "train__gpus_per_expert": 2,
        "train__workers_per_expert": 2,
        "train__parallel": "fsdp",
        "train__tensorboard": True,
        "train__trackers": ["mlflow"],
        "train__log_every": 3,
        "train__checkpoint_every": 17,
        "train__notice_every": 5,
        "train__max_failures": 9,
        "train__micro_batch_size": 2,
        "train__activation_checkpointing": True,
        "train__compile": True,
        "train__clusters": [1],
        "train__evaluate_every": 6,
        "train__evaluate_sequences": 8,
        "evaluate__batch_tokens": 99,
        "run__shared": [str(tmp_path / "none")],
        "sweep__clusters": [2, 4],
        "sweep__total_tokens": [1_600_000],
        "sweep__dense_runs": ["runs/large"],
    }
    assert {name.replace("__", ".") for name in changed} | {"run.dir"} == EXECUTION_FIELDS
    run_with(tmp_path, **changed).check()


def test_a_training_option_is_also_the_seed_s_unless_it_is_marked_otherwise(tmp_path: Path) -> None:
    """The names in the settings.json of runs that there are, which must be accepted."""
    run = run_with(tmp_path)
    shared = {"train.batch_size", "train.schedule", "train.warmup_steps", "train.betas", "train.weight_decay",
              "train.clip_norm", "train.precision", "train.cross_documents"}  # fmt: skip
    own = {"train.total_tokens", "train.budget", "train.warm_start", "train.learning_rate", "train.final_lr_fraction"}
    parts = {"train.trainable"}  # newer than these; it is 'all' where a run does not say
    length = {"tokens.sequence_length"}
    seeds = {f"seed_model.{name}" for name in config_tree(run.config)["seed_model"]} - {"seed_model.cpus"}
    assert run.settings("seed").keys() == shared | length | seeds
    assert run.settings("experts").keys() == shared | length | own | parts
    assert run.settings("controls/moe").keys() == run.settings("controls/dense").keys() == shared | length | own
    assert run.settings("evaluation").keys() >= {"train.controls"}


def test_finished_stages_of_a_shared_run_are_taken_and_all_else_is_its_own(tmp_path: Path) -> None:
    finish(tmp_path / "base", "corpus")
    finish(tmp_path / "base", "experts")
    finish(tmp_path / "other", "corpus")
    finish(tmp_path / "other", "shards")
    run_with(tmp_path / "other").claim("seed")
    shared = [str(tmp_path / "base"), str(tmp_path / "other")]
    run = run_with(tmp_path / "point", run__shared=shared)
    run.open()
    assert run.stage("corpus", never)[1] is False
    owners = {stage: Path(run.uri(stage, "x")).parent.parent.name for stage in ("corpus", "shards", "seed", "experts")}
    assert owners == {"corpus": "base", "shards": "other", "seed": "point", "experts": "point"}
    assert run.uri("shards/controls/random") == str(tmp_path / "other" / "shards" / "controls" / "random")
    assert run.uri() == str(tmp_path / "point")
    run.stage("seed", dict)
    finish(tmp_path / "base", "seed")
    assert run_with(tmp_path / "point", run__shared=shared).uri("seed") == str(tmp_path / "point" / "seed")


def test_a_shared_stage_of_another_configuration_is_refused(tmp_path: Path) -> None:
    finish(tmp_path / "base", "clusterer", cluster__n_clusters=2)
    point = run_with(tmp_path / "point", run__shared=[str(tmp_path / "base")], cluster__n_clusters=4)
    with pytest.raises(UserError, match=r"cluster\.n_clusters=4 \(the run has 2\)"):
        point.open()


def test_a_shared_run_that_does_not_fit_is_named_and_no_folder_is_to_be_deleted(tmp_path: Path) -> None:
    finish(tmp_path / "base", "corpus", run__seed=1)
    run_with(tmp_path / "point").stage("tokenizer", dict)
    point = run_with(tmp_path / "point", run__shared=[str(tmp_path / "base")])
    with pytest.raises(UserError) as caught:
        point.open()
    assert str(caught.value) == (
        f"run.shared: {tmp_path}/base was made with another configuration: run.seed=0 (the run has 1). Take it out of "
        "run.shared, or restore the field."
    )


def test_folders_of_a_shared_run_are_never_to_be_deleted(tmp_path: Path) -> None:
    for stage in ("corpus", "tokenizer"):
        finish(tmp_path / "point", stage, tokens__vocab_size=300)
    (tmp_path / "base" / "clusterer").mkdir(parents=True)
    (tmp_path / "base" / "clusterer" / "manifest.json").write_text("{}")  # of an earlier version, tied to nothing
    point = run_with(tmp_path / "point", run__shared=[str(tmp_path / "base")], tokens__vocab_size=400)
    with pytest.raises(UserError, match=rf"or delete {tmp_path}/point/tokenizer\.$"):
        point.open()


def test_a_moved_run_is_the_same_run(tmp_path: Path) -> None:
    for stage in STAGE_SETTINGS:
        finish(tmp_path / "here", stage)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = run_with(tmp_path / "there")
    moved.check()
    assert moved.stage("corpus", never)[1] is False


def test_begin_keeps_the_whole_configuration(tmp_path: Path) -> None:
    run = run_with(tmp_path / "new" / "run", run__seed=5)
    run.open()
    assert load_config(str(tmp_path / "new" / "run" / "config.yaml")) == run.config


def test_begin_overwrites_nothing_where_it_refuses(tmp_path: Path) -> None:
    first = run_with(tmp_path, run__seed=0)
    first.open()
    first.stage("corpus", dict)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run\.seed"):
        run_with(tmp_path, run__seed=1).open()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_need_names_the_job_that_is_missing(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    with pytest.raises(
        UserError, match=r"clusterer is not finished\. Run first: python -m jobs\.fit_clusters --config"
    ):
        run.require("clusterer", "fit_clusters")
    run.claim("clusterer")
    with pytest.raises(UserError, match="clusterer is not finished"):
        run.require("clusterer", "fit_clusters")
    run.finish("clusterer", {"n_iter": 3})
    assert run.require("clusterer", "fit_clusters") == {"n_iter": 3}


def test_manifests_of_folders_inside_a_stage(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert run.manifest("experts", "cluster=0003") is None
    run.finish("experts/cluster=0003", {"cluster": 3})
    assert run.manifest("experts", "cluster=0003") == {"cluster": 3}
    assert run.manifest("experts") is None


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_with(Path("runs/a"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.stage("corpus", dict)
    assert (tmp_path / "runs" / "a" / "corpus" / "manifest.json").exists()


def test_every_field_belongs_to_a_stage_or_to_execution(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    owned = {name for stage in STAGE_SETTINGS for name in run.settings(stage)}
    assert "run.seed" in owned
    assert owned & EXECUTION_FIELDS == set()
    assert owned | EXECUTION_FIELDS == {
        f"{name}.{key}" for name, keys in config_tree(run.config).items() for key in keys
    }
