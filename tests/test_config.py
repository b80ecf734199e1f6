"""The configuration: what is refused and how it is said, overrides, and the shipped YAML files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_ray.config import EXECUTION_FIELDS, Config, TrainConfig
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config, config_tree, dump_config, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

MINIMAL = """
run:
  dir: runs/a
corpus:
  paths: [documents]
seed_model:
  train_tokens: 1000
"""


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The least that is a configuration, with more keys in the named sections."""
    minimal = yaml.safe_load(MINIMAL)
    return {name: {**minimal.get(name, {}), **sections.get(name, {})} for name in {**minimal, **sections}}


def write(folder: Path, text: str) -> str:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_file_loads(path: Path) -> None:
    assert isinstance(load_config(str(path)), Config)


def test_there_are_shipped_files() -> None:
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


def test_fields_that_are_not_given_have_their_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.run.dir, config.corpus.paths, config.seed_model.train_tokens) == ("runs/a", ("documents",), 1000)
    assert config.train == TrainConfig()
    assert config.train.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"controls": ["rnd"]}},
            r"^train\.controls\.0='rnd': must be 'random', 'unbalanced', 'metadata' or 'moe'\.$",
        ),
        ({"train": {"controls": ["random", "random"]}}, r"^train\.controls=.* names a control twice\. Keep one\.$"),
        (
            {"train": {"controls": ["metadata"]}},
            r"'metadata', which needs .* set corpus\.domain_column, or leave it out\.$",
        ),
        (
            {"train": {"controls": ["unbalanced"]}, "cluster": {"balanced": False}},
            r"^train\.controls has 'unbalanced', which is what cluster\.balanced=False makes .*: leave it out\.$",
        ),
        (
            {"evaluate": {"routings": ["learned"]}},
            r"^evaluate\.routings\.0='learned': must be 'embedding', 'ngram', 'posterior', ",
        ),
        ({"evaluate": {"routings": []}}, r"^evaluate\.routings=\[\] has too few|^evaluate\.routings=\[\]"),
        ({"evaluate": {"routings": ["prefix"] * 2}}, r"^evaluate\.routings=.* names a router twice\. Keep one\.$"),
        (
            {"train": {"controls": ["moe"]}, "cluster": {"n_clusters": 1}},
            r"^train\.controls has 'moe', which runs 2 of cluster\.n_clusters=1 experts .* raise that to 2",
        ),
    ],
)
def test_a_control_or_router_that_cannot_be_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(tree(**sections))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 10, "workers_per_expert": 4},
            r"^train\.batch_size=10 must be a multiple of train\.workers_per_expert=4\.$",
        ),
        (
            {"batch_size": 16, "workers_per_expert": 4, "gpus_per_expert": 2},
            r"^train\.gpus_per_expert=2 must be 0 or give each of train\.workers_per_expert=4 a GPU of its own, or the ",
        ),
        (
            {"batch_size": 16, "workers_per_expert": 2, "gpus_per_expert": 3},
            r"^train\.gpus_per_expert=3 must be 0 or give each of train\.workers_per_expert=2 a GPU of its own, or the ",
        ),
        (
            {"batch_size": 16, "workers_per_expert": 2, "cpus_per_expert": 1e-4},
            r"^train\.cpus_per_expert=0\.0001 must give each of train\.workers_per_expert=2 at least 0\.0001\.$",
        ),
    ],
)
def test_workers_share_batches_and_gpus_evenly(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(tree(train=fields))


@pytest.mark.parametrize(
    ("section", "field", "within", "beyond"),
    [
        ("train", "gpus_per_expert", 1e-4, 9e-5),
        ("train", "gpus_per_expert", 2.0, 1.5),
        ("cluster", "gpus_per_actor", 1.0, 1.5),
        ("train", "cpus_per_expert", 1e-4, 9e-5),
        ("evaluate", "temperatures", [1e-6, 1e6], [9e-7]),
        ("evaluate", "betas", [1e-6, 1e6], [1e300]),
        ("evaluate", "max_documents", 2, 1),
        ("tokens", "vocab_size", 2**24, 2**24 + 1),
        ("seed_model", "hidden_size", 4, 6),
    ],
)
def test_what_a_stage_could_not_work_with_is_out_of_bounds(section: str, field: str, within: Any, beyond: Any) -> None:
    build_config(tree(**{section: {field: within}}))
    with pytest.raises(UserError, match=rf"^{section}\.{field}"):
        build_config(tree(**{section: {field: beyond}}))


def test_there_are_no_controls_but_those_asked_for() -> None:
    assert build_config(tree()).train.controls == ()
    asked = {"train": {"controls": ["metadata", "random", "unbalanced"]}, "corpus": {"domain_column": "topic"}}
    assert build_config(tree(**asked)).train.controls == ("metadata", "random", "unbalanced")


def test_an_unknown_key_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"^train\.lerning_rate is not a key\. Did you mean train\.learning_rate\?"):
        build_config(tree(train={"lerning_rate": 1e-3}))


def test_an_unknown_key_gets_all_that_are_allowed_there() -> None:
    allowed = ", ".join(field.name for field in dataclasses.fields(TrainConfig))
    with pytest.raises(UserError, match=f"Allowed there: {allowed}\\."):
        build_config(tree(train={"qqqq": 1}))


def test_an_unknown_section_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"^trian is not a key\. Did you mean train\?$"):
        build_config(tree(trian={"steps": 3}))


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("train", "batch_size", 0, "must be greater than or equal to 1"),
        ("train", "warmup_steps", -1, "must be greater than or equal to 0"),
        ("train", "learning_rate", 0.0, "must be greater than 0"),
        ("train", "learning_rate", math.nan, "must be a finite number"),
        ("train", "learning_rate", True, "must be a number"),
        ("train", "gpus_per_expert", False, "must be a number"),
        ("train", "final_lr_fraction", 1.5, "must be less than or equal to 1"),
        ("train", "schedule", "step", "must be 'linear' or 'cosine'"),
        ("train", "precision", "fp16", "must be 'fp32' or 'bf16'"),
        ("train", "gpus_per_expert", -0.5, "must be greater than or equal to 0"),
        ("corpus", "valid_fraction", 1.0, "must be less than 1"),
        ("corpus", "paths", "documents", "must be a list. Write it in brackets: corpus.paths=[...]."),
        ("corpus", "text_column", 3, "must be a valid string"),
        ("tokens", "vocab_size", 257, "must be greater than or equal to 258"),
        ("tokens", "sequence_length", 7, "must be greater than or equal to 8"),
        ("embed", "dimensions", 1, "must be greater than or equal to 2"),
        ("cluster", "actors", 17, "must be less than or equal to 16"),
        ("cluster", "n_clusters", 0, "must be greater than or equal to 1"),
        ("cluster", "n_clusters", 8.0, "must be a valid integer"),
        ("cluster", "n_clusters", "8", "must be a valid integer"),
        ("cluster", "n_clusters", True, "must be a valid integer"),
        ("cluster", "balanced", "perhaps", "must be a valid boolean"),
        ("run", "seed", -1, "must be greater than or equal to 0"),
        ("run", "dir", None, "must be a valid string"),
    ],
)
def test_a_value_out_of_bounds_or_of_another_type_is_refused(section: str, key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError, match="must be") as caught:
        build_config(tree(**{section: {key: value}}))
    assert str(caught.value).startswith(f"{section}.{key}={value!r}: {allowed}")


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize(
    ("section", "key"),
    [("corpus", "text_column"), ("corpus", "domain_column"), ("tokens", "tokenizer"), ("embed", "encoder"),
     ("seed_model", "name_or_path"), ("train", "warm_start"), ("run", "dir")],
)  # fmt: skip
def test_an_empty_name_is_refused(section: str, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{section}\.{key}={value!r}: must not be empty\. Give it, or leave "):
        build_config(tree(**{section: {key: value}}))


def test_an_empty_path_which_would_be_the_working_directory_is_refused() -> None:
    with pytest.raises(UserError, match=r"^corpus\.paths\.1='': must not be empty"):
        build_config(tree(corpus={"paths": ["a", ""]}))


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay"])
def test_infinity_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"train\.{key}=inf"):
        build_config(tree(train={key: math.inf}))


def test_a_beta_of_one_which_adamw_refuses_is_refused_here() -> None:
    with pytest.raises(UserError, match=r"train\.betas\.1=1\.0: must be less than 1"):
        build_config(tree(train={"betas": [0.9, 1.0]}))


def test_one_beta_is_too_few() -> None:
    with pytest.raises(UserError, match=r"^train\.betas=\[0\.9\] has too few values\. Give at least 2\.$"):
        build_config(tree(train={"betas": [0.9]}))


def test_three_betas_are_too_many() -> None:
    with pytest.raises(UserError, match=r"^train\.betas=\[0\.9, 0\.9, 0\.9\] has too many values\. Give at most 2\.$"):
        build_config(tree(train={"betas": [0.9, 0.9, 0.9]}))


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        ({"embedder": "sentence"}, "embed.encoder goes with embed.embedder=sentence"),
        ({"encoder": "some/encoder"}, "embed.encoder goes with embed.embedder=sentence"),
        ({"normalisation": "standard"}, "embed.normalisation=standard goes with embed.embedder=word_tfidf"),
    ],
)
def test_settings_of_another_embedder_are_refused(embed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(tree(embed=embed))


@pytest.mark.parametrize("key", ["temperatures", "betas", "gammas"])
def test_an_empty_list_of_candidates_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"evaluate\.{key}="):
        build_config(tree(evaluate={key: []}))


def test_a_seed_that_the_hash_of_documents_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.seed=18446744073709551616"):
        build_config(tree(run={"seed": 2**64}))


def test_several_errors_come_at_once() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=0: .*; train\.learning_rate=-1\.0: must be greater than 0"):
        build_config(tree(train={"batch_size": 0, "learning_rate": -1.0}))


def test_a_missing_key_is_named_with_both_ways_to_give_it() -> None:
    broken = tree()
    del broken["run"]["dir"]
    with pytest.raises(UserError, match=r"^run\.dir is missing\. Add it to the config file or give run\.dir=VALUE on"):
        build_config(broken)


def test_a_missing_section_is_named() -> None:
    broken = tree()
    del broken["corpus"]
    with pytest.raises(UserError, match=r"^corpus is missing"):
        build_config(broken)


def test_a_section_must_hold_keys() -> None:
    with pytest.raises(UserError, match=r"^tokens=3: must be a dictionary"):
        build_config({**tree(), "tokens": 3})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpus": {"packages": ["numpy"]}}, r"either corpus\.paths or corpus\.packages"),
        ({"corpus": {"paths": []}}, r"either corpus\.paths or corpus\.packages"),
        (
            {"corpus": {"paths": [], "packages": ["x", "y", "x"]}},
            r"^corpus\.packages=\['x', 'y', 'x'\] names a package twice\. Keep one\.$",
        ),
        (
            {"corpus": {"paths": [], "packages": ["x"], "valid_paths": ["v"]}},
            r"corpus\.valid_paths needs corpus\.paths",
        ),
        ({"seed_model": {"train_tokens": 0}}, r"seed_model\.train_tokens >= 1, or set seed_model\.name_or_path"),
        (
            {"seed_model": {"hidden_size": 65}},
            r"seed_model\.hidden_size=65 must be a multiple of n_heads=2",
        ),
        (
            {"corpus": {"sample_documents": 4}, "cluster": {"n_clusters": 5}},
            r"corpus\.sample_documents=4 must be at least cluster\.n_clusters=5",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(tree(**sections))


def test_a_budget_below_one_step_an_expert_is_refused_and_the_least_is_named() -> None:
    sections = {
        "cluster": {"n_clusters": 3},
        "tokens": {"sequence_length": 8},
        "train": {"batch_size": 2, "total_tokens": 47},
    }
    with pytest.raises(UserError, match=r"train\.total_tokens=47 must give each of the 3 .* 16 tokens; raise it to 48"):
        build_config(tree(**sections))
    sections["train"]["total_tokens"] = 48
    assert build_config(tree(**sections)).train.total_tokens == 48


def test_a_seed_model_by_name_needs_no_training() -> None:
    config = build_config(tree(seed_model={"name_or_path": "gpt2", "train_tokens": 0}))
    assert config.seed_model.train_tokens == 0


def test_one_cluster_is_allowed() -> None:
    assert build_config(tree(cluster={"n_clusters": 1})).cluster.n_clusters == 1


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml is not a file\. Give a YAML file"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load_config(str(tmp_path))


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  batch_size: 4\n  log_every: 1\n  batch_size: 8\n"
    with pytest.raises(UserError, match=r"a\.yaml: batch_size stands twice.* Keep one"):
        load_config(write(tmp_path, text))


MERGED = """
run: {dir: runs/a}
corpus: {paths: [documents]}
seed_model: {train_tokens: 1000}
train: {<<: MERGES, log_every: 3}
"""


@pytest.mark.parametrize("merges", ["{log_every: 7, slots: 5}", "[{slots: 5}, {log_every: 7}]"])
def test_merged_keys_give_way_to_those_beside_them(tmp_path: Path, merges: str) -> None:
    train = load_config(write(tmp_path, MERGED.replace("MERGES", merges))).train
    assert (train.slots, train.log_every) == (5, 3)


def test_an_anchor_is_merged(tmp_path: Path) -> None:
    anchored = MERGED.replace("seed_model: {", "seed_model: &sizes {").replace("MERGES", "*sizes")
    with pytest.raises(UserError, match=r"^train\.train_tokens is not a key"):
        load_config(write(tmp_path, anchored))


@pytest.mark.parametrize(
    ("merges", "key"),
    [("{slots: 5}, log_every: 1", "log_every"), ("{slots: 5, slots: 6}", "slots"), ("{}, <<: {}", "<<")],
)
def test_a_key_that_is_repeated_beside_or_inside_merged_ones_is_refused(tmp_path: Path, merges: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} stands twice.* Keep one"):
        load_config(write(tmp_path, MERGED.replace("MERGES", merges)))


def test_a_file_below_the_users_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, MINIMAL)
    assert load_config("~/a.yaml").run.dir == "runs/a"


def test_a_repeated_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run stands twice"):
        load_config(write(tmp_path, MINIMAL + "run:\n  seed: 1\n"))


def test_broken_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not valid YAML: .*line 2") as caught:
        load_config(write(tmp_path, "run: [\nx: }\n"))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"run:\n  dir: caf\xe9\n")
    with pytest.raises(UserError, match=r"is not valid YAML: .*0xe9"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["", "- run\n- corpus\n", "run"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="must hold sections such as 'run:' and 'corpus:'"):
        load_config(write(tmp_path, text))


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = MINIMAL + f"train: !!python/object/apply:os.mkdir ['{made}']\n"
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(write(tmp_path, text))
    assert not made.exists()


def test_an_override_replaces_adds_and_makes_sections(tmp_path: Path) -> None:
    overrides = ["run.dir=runs/b", "train.total_tokens=100000", "evaluate.top_k=[1, 3]", "cluster.n_clusters=2"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert (config.run.dir, config.train.total_tokens, config.evaluate.top_k) == ("runs/b", 100_000, (1, 3))
    assert config.seed_model.train_tokens == 1000


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["run.seed=1", "run.seed=2"])
    assert config.run.seed == 2


def test_an_override_without_value_is_none(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  slots: 3\n"
    assert load_config(write(tmp_path, text), ["train.slots="]).train.slots is None


def test_an_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL), ["run.dir=s3://b/x?region=y"]).run.dir == "s3://b/x?region=y"


@pytest.mark.parametrize("number", ["2e-3", "2.0e-3", "0.002", "2E-3"])
def test_a_float_may_be_written_in_any_way(tmp_path: Path, number: str) -> None:
    assert load_config(write(tmp_path, MINIMAL), [f"train.learning_rate={number}"]).train.learning_rate == 2e-3
    text = MINIMAL + f"train:\n  learning_rate: {number}\n"
    assert load_config(write(tmp_path, text)).train.learning_rate == 2e-3


@pytest.mark.parametrize("override", ["seed", "run.seed", "seed=1", "run=1", ".seed=1", "run.=1", "--help"])
def test_what_is_no_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"is not an override\. Write section\.key=value, such as") as caught:
        load_config(write(tmp_path, MINIMAL), [override])
    assert repr(override) in str(caught.value)


def test_an_override_of_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.sed is not a key\. Did you mean run\.seed\?"):
        load_config(write(tmp_path, MINIMAL), ["run.sed=1"])


def test_an_override_of_invalid_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'run\.dir=\[a': the value is not valid YAML\. Quote it"):
        load_config(write(tmp_path, MINIMAL), ["run.dir=[a"])


def test_an_override_inside_what_is_no_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train=7 must be a section with keys"):
        load_config(write(tmp_path, MINIMAL + "train: 7\n"), ["train.batch_size=1"])


def test_a_configuration_cannot_be_changed() -> None:
    config = build_config(tree())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run = dataclasses.replace(config.run, seed=1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.batch_size = 1  # type: ignore[misc]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    learning_rate=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    text=st.text(min_size=1),
    top_k=st.lists(st.integers(1, 9)),
)
def test_a_dumped_configuration_loads_as_itself(
    seed: int, learning_rate: float, betas: tuple[float, float], text: str, top_k: list[int]
) -> None:
    config = build_config(
        tree(
            run={"seed": seed, "dir": text},
            train={"learning_rate": learning_rate, "betas": betas},
            evaluate={"top_k": top_k},
        )
    )
    assert build_config(yaml.safe_load(dump_config(config))) == config
    assert build_config(config_tree(config)) == config


def test_execution_fields_exist() -> None:
    sections = config_tree(build_config(tree()))
    assert {f"{section}.{key}" for section, keys in sections.items() for key in keys} >= EXECUTION_FIELDS


def test_parts_of_a_batch_are_at_most_the_batch() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch_size=32 must be at most train\.batch_size=16"):
        build_config(tree(train={"micro_batch_size": 32}))
    assert build_config(tree(train={"micro_batch_size": 16})).train.micro_batch_size == 16


def test_only_clusters_that_there_are_can_be_trained() -> None:
    with pytest.raises(UserError, match=r"train\.clusters=\[3, 8\] must be below cluster\.n_clusters=8"):
        build_config(tree(train={"clusters": [3, 8]}))
    with pytest.raises(UserError, match=r"train\.clusters"):
        build_config(tree(train={"clusters": []}))
    assert build_config(tree(train={"clusters": [3, 7]})).train.clusters == (3, 7)
