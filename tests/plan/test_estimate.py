"""Plans: the formulas by hand, against the code that they describe, and against a finished run."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from cbtm_ray.branch.branches import expert_branches, in_proportion, seed_branch
from cbtm_ray.branch.upcycle import upcycle
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.shard_steps import SHARD_ROWS, LocalShards, Shard
from cbtm_ray.config import Config, TrainConfig
from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config, dump_config
from cbtm_ray.models import new_model
from cbtm_ray.plan.estimate import (
    CHECKPOINT_BYTES,
    COMPILE_S,
    START_S,
    Devices,
    Plan,
    Training,
    all_reduce_bytes,
    make_plan,
    makespan,
)
from cbtm_ray.plan.sizes import clusterer_bytes
from cbtm_ray.plan.table import clock, main, size
from cbtm_ray.run import Run
from cbtm_ray.stages import expert_folder
from cbtm_ray.train import flops
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.trainer import Trainer
from tests.support.tiny_models import changed


def config(**sections: dict[str, Any]) -> Config:
    least: dict[str, dict[str, Any]] = {
        "run": {"dir": "runs/a"},
        "corpus": {"paths": [str(Path(__file__).parents[2] / "requirements.txt")]},
        "seed_model": {"train_tokens": 100_000},
        "train": {"gpus_per_expert": 1},
    }
    return build_config({name: {**least.get(name, {}), **sections.get(name, {})} for name in {**least, **sections}})


def devices(count: int = 4, peak_flops: float = 1e9) -> Devices:
    return Devices(name="other", count=count, peak_flops=peak_flops, utilization=0.5, price_per_hour=2.0)


@pytest.mark.ray
def test_a_finished_run_took_what_its_plan_says(finished_run: Run) -> None:
    made = {name: finished_run.manifest(name) or {} for name in ("tokenizer", "seed", "controls/dense", "experts")}
    experts = [finished_run.manifest(expert_folder(k)) or {} for k in range(finished_run.config.cluster.n_clusters)]
    # A corpus of few words gives a smaller vocabulary than was asked for.
    tokens = dataclasses.replace(finished_run.config.tokens, vocab_size=made["tokenizer"]["vocabulary"])
    plan = make_plan(dataclasses.replace(finished_run.config, tokens=tokens), devices())
    assert made["seed"]["parameters"] == made["experts"]["parameters"] == plan.seed.parameters
    assert made["seed"]["steps"] == plan.seed.steps
    assert made["seed"]["train_flops"] == pytest.approx(plan.seed.flops)
    assert made["controls/dense"]["train_flops"] == pytest.approx(plan.dense.flops)
    for expert in experts:
        assert (expert["steps"], expert["train_flops"]) == (plan.expert.steps, pytest.approx(plan.expert.flops))


@given(
    n_clusters=st.integers(1, 9),
    total_tokens=st.integers(10_000, 10**6),
    seed_tokens=st.integers(1, 10**6),
    batch_size=st.integers(1, 8),
)
@settings(max_examples=15)
def test_steps_are_those_of_the_training_runs(
    n_clusters: int, total_tokens: int, seed_tokens: int, batch_size: int
) -> None:
    wanted = config(
        cluster={"n_clusters": n_clusters},
        tokens={"sequence_length": 64},
        seed_model={"train_tokens": seed_tokens},
        train={"total_tokens": total_tokens, "batch_size": batch_size},
    )
    plan, run = make_plan(wanted, devices()), Run(wanted)
    dense, *experts = expert_branches(run)
    assert plan.seed.steps == seed_branch(run).spec.steps
    assert {branch.spec.steps for branch in experts} == {plan.expert.steps}
    assert dense.spec.steps == plan.dense.steps
    assert plan.dense.flops == pytest.approx(flops.train_flops(plan.dense.infer_flops, plan.dense.tokens))


@pytest.mark.parametrize("sizes", [(16, 1, 2, 32), (24, 3, 4, 40), (64, 2, 2, 256)])
def test_a_new_model_and_its_mixture_of_experts_are_counted_as_they_are(sizes: tuple[int, int, int, int]) -> None:
    width, layers, heads, inner = sizes
    tokenizer = train_tokenizer(["a small text about nothing much, again and again " * 5], 270)
    wanted = config(
        tokens={"vocab_size": len(tokenizer), "sequence_length": 64},
        seed_model={"hidden_size": width, "n_layers": layers, "n_heads": heads, "intermediate_size": inner},
        train={"controls": ["moe"]},
    )
    model = new_model(wanted.seed_model, tokenizer, 64, random_state=0)
    plan = make_plan(wanted, devices())
    assert plan.moe
    assert sizes_of(plan.seed) == sizes_of(plan.expert) == counted(model, 64)
    assert sizes_of(plan.moe) == counted(upcycle(model, 8, random_state=0), 64)
    assert (plan.moe.steps, plan.moe.tokens) == (plan.dense.steps, plan.dense.tokens)


def sizes_of(training: Training) -> tuple[int, float]:
    return training.parameters, training.infer_flops


def counted(model: Any, context: int) -> tuple[int, float]:
    return sum(p.numel() for p in model.parameters()), flops.model_flops_per_token(model, context)


@pytest.mark.parametrize(
    "loaded",
    [
        GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=64),
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=False),
        OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                  word_embed_proj_dim=16, max_position_embeddings=64),
    ],
    ids=["gpt2", "llama", "opt"],
)  # fmt: skip
def test_a_hugging_face_folder_is_counted_without_its_weights(tmp_path: Path, loaded: Any) -> None:
    loaded.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    seed_model = {"name_or_path": str(tmp_path), "train_tokens": 0}
    plan = make_plan(config(seed_model=seed_model), devices())
    assert (plan.seed.steps, plan.seed_s) == (0, 0)  # taken as it is
    assert sizes_of(plan.expert) == counted(model, 256)
    if loaded.model_type != "llama":
        with pytest.raises(UserError, match=r"^train\.controls has 'moe', but the seed model cannot be upcycled"):
            make_plan(config(seed_model=seed_model, train={"controls": ["moe"]}), devices())


def test_a_model_that_is_not_here_is_refused_in_one_line() -> None:
    wanted = config(seed_model={"name_or_path": "nobody/no-such-model", "train_tokens": 0})
    with pytest.raises(
        UserError, match=r"^seed_model\.name_or_path='nobody/no-such-model' must be .* hf download"
    ) as e:
        make_plan(wanted, devices())
    assert "\n" not in str(e.value)


def test_an_encoder_that_is_not_here_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^embed\.encoder='nobody/none' must be"):
        make_plan(config(embed={"embedder": "sentence", "encoder": "nobody/none"}), devices())


@pytest.mark.parametrize(
    ("durations", "slots", "expected"),
    [([5.0], 1, 5), ([4.0, 1, 1, 1, 1], 2, 4), ([3.0, 3, 3], 2, 6), ([1.0, 1, 4], 2, 5), ([2.0, 2], 9, 2), ([], 3, 0)],
)
def test_makespan_by_hand(durations: list[float], slots: int, expected: float) -> None:
    assert makespan(durations, slots) == expected


def test_times_of_a_plan_by_hand() -> None:
    plan = make_plan(config(cluster={"n_clusters": 4}, train={"total_tokens": 400_000}), devices(count=4))
    rate = 0.5e9
    assert plan.dense.flops == 4 * plan.expert.flops
    held_out = plan.expert.infer_flops * 32 * 256  # one loss at the end
    seed, dense, expert = (
        (training.flops + held_out) / rate + START_S for training in (plan.seed, plan.dense, plan.expert)
    )
    assert plan.seed_s == pytest.approx(seed)
    assert [plan.run_s(run) for run in plan.first_runs] == pytest.approx([dense] + [expert] * 4)
    # The control keeps one device, three serve four.
    assert plan.runs_s(plan.first_runs) == pytest.approx(max(dense, 2 * expert))
    assert plan.device_hours == pytest.approx((seed + dense + 4 * expert) / 3600)
    assert plan.parallel_dense_s == pytest.approx((plan.dense.flops + held_out) / (4 * rate))


def test_experts_of_one_run_come_one_after_the_other_and_pay_one_start() -> None:
    plan = make_plan(config(cluster={"n_clusters": 8}, train={"experts_per_run": 3}), devices())
    alone = plan.expert.device_flops / 0.5e9
    expected = [3 * alone + START_S, 3 * alone + START_S, 2 * alone + START_S]
    assert [plan.run_s(run) for run in plan.expert_runs] == pytest.approx(expected)


def test_two_experts_on_one_device_are_half_as_fast_and_hold_half_of_it() -> None:
    whole = make_plan(config(), devices(count=2))
    half = make_plan(config(train={"gpus_per_expert": 0.5}), devices(count=2))
    assert (whole.slots, half.slots) == (2, 4)
    assert half.run_s([half.dense]) - START_S == pytest.approx(2 * (whole.run_s([whole.dense]) - START_S))
    assert half.share * half.run_s([half.dense]) < whole.run_s([whole.dense])
    assert half.state_bytes(half.seed) == 2 * whole.state_bytes(whole.seed) == 2 * 16 * whole.seed.parameters


ALL_CONTROLS = {
    "corpus": {"domain_column": "topic"},
    "train": {"controls": ["random", "unbalanced", "metadata", "moe"]},
}


def test_controls_cost_hours_and_bytes_of_their_own() -> None:
    plain, plan = (make_plan(config(**sections), devices(count=4)) for sections in ({}, ALL_CONTROLS))
    assert plan.moe
    assert plan.first_runs == plain.first_runs
    assert [len(run) for run in plan.control_runs] == [1] * (1 + 3 * 8)
    expert = plan.expert.flops / 0.5e9 + START_S  # a control's experts have no held-out documents
    moe = (plan.moe.flops + plan.moe.infer_flops * 32 * 256) / 0.5e9 + START_S
    assert [plan.run_s(run) for run in plan.control_runs] == pytest.approx([moe] + [expert] * 24)
    assert plan.runs_s(plan.control_runs) == pytest.approx(max(moe, 8 * expert))
    assert plan.device_hours == pytest.approx(plain.device_hours + (moe + 24 * expert) / 3600)
    assert plan.model_bytes == plain.model_bytes + 4 * (plan.moe.parameters + 24 * plan.expert.parameters)
    assert plan.checkpoint_bytes == 2 * CHECKPOINT_BYTES * (plan.moe.parameters + 3 * plan.expert.parameters)
    assert plain.checkpoint_bytes == 2 * CHECKPOINT_BYTES * 4 * plain.expert.parameters


def test_experts_of_all_controls_share_runs_and_the_mixture_of_experts_has_its_own() -> None:
    sections = {**ALL_CONTROLS, "train": {**ALL_CONTROLS["train"], "experts_per_run": 5}}
    plan = make_plan(config(**sections), devices())
    assert [len(run) for run in plan.control_runs] == [1, 5, 5, 5, 5, 4]


def test_the_control_without_balance_fits_clusters_once_more() -> None:
    both = clusterer_bytes(config(train={"controls": ["unbalanced"]}))
    assert both == clusterer_bytes(config()) + clusterer_bytes(config(cluster={"balanced": False}))


def test_budgets_by_size_are_bounded_by_one_cluster_of_nearly_all_tokens() -> None:
    equal = make_plan(config(), devices())
    plan = make_plan(config(train={"budget": "by_size"}), devices())
    (largest, *others), steps = plan.skewed_runs, plan.expert.steps
    assert [training.steps for training in largest] == [8 * steps - 7]
    assert [training.steps for run in others for training in run] == [1] * 7
    assert in_proportion(8 * steps, [10**9, *[1] * 7]) == [8 * steps - 7, *[1] * 7]
    assert plan.runs_s(plan.skewed_runs) > plan.runs_s(plan.expert_runs)
    assert plan.device_hours == equal.device_hours  # the same FLOPs, whoever has them


def test_some_clusters_are_trained_without_any_control() -> None:
    plan = make_plan(config(**{**ALL_CONTROLS, "train": {**ALL_CONTROLS["train"], "clusters": [3, 5, 3]}}), devices())
    assert (plan.control_runs, plan.trainings) == ([], [plan.seed, plan.expert, plan.expert])
    assert plan.device_hours == pytest.approx((plan.seed_s + 2 * plan.run_s([plan.expert])) / 3600)
    assert plan.model_bytes == 3 * 4 * plan.seed.parameters


def test_workers_share_a_run_and_talk() -> None:
    train = {"gpus_per_expert": 4, "workers_per_expert": 4, "batch_size": 16}
    alone = make_plan(config(), devices(count=8))
    ddp = make_plan(config(train=train), devices(count=8))
    held_out = ddp.dense.infer_flops * 32 * 256  # read by every worker
    assert ddp.run_s([ddp.dense]) - START_S == pytest.approx((ddp.dense.flops / 4 + held_out) / 0.5e9)
    weights = 4 * ddp.dense.parameters
    assert (alone.worker_bytes(alone.dense), ddp.worker_bytes(ddp.dense)) == (0, ddp.dense.steps * 1.5 * weights)
    fsdp = make_plan(config(train={**train, "parallel": "fsdp", "micro_batch_size": 1}), devices(count=8))
    assert fsdp.worker_bytes(fsdp.dense) == fsdp.dense.steps * 4 * 3 * 0.75 * weights  # four parts, thrice 3/4 of all
    assert ddp.state_bytes(ddp.seed) == alone.state_bytes(alone.seed) == 4 * fsdp.state_bytes(fsdp.seed)


def test_a_worker_uses_one_gpu_or_all_cpus_of_its_share() -> None:
    on_cpus = {"gpus_per_expert": 0, "cpus_per_expert": 4}
    four_cpus, two_gpus = (make_plan(config(train=t), devices(count=8)) for t in (on_cpus, {"gpus_per_expert": 2}))
    assert (four_cpus.share, four_cpus.compute_devices) == (4, 4)
    assert (two_gpus.share, two_gpus.compute_devices) == (2, 1)


def test_recomputing_compiling_and_evaluating_take_time() -> None:
    plan = make_plan(config(train={"activation_checkpointing": True}), devices())
    held_out = plan.expert.infer_flops * 32 * 256
    assert plan.expert.device_flops == pytest.approx(plan.expert.flops * 4 / 3 + held_out)
    evaluated = make_plan(config(train={"evaluate_every": 10, "evaluate_sequences": 8}), devices()).expert
    assert evaluated.steps == 48
    assert evaluated.device_flops - evaluated.flops == pytest.approx(evaluated.infer_flops * 5 * 8 * 256)
    compiled = make_plan(config(train={"compile": True}), devices())
    assert compiled.seed_s == pytest.approx(make_plan(config(), devices()).seed_s + COMPILE_S)


def test_checkpoints_are_written_but_for_the_last_step() -> None:
    plan = make_plan(config(train={"checkpoint_every": 24}), devices())
    assert (plan.seed.steps, plan.expert.steps, plan.dense.steps) == (25, 48, 384)
    assert plan.written_bytes == CHECKPOINT_BYTES * plan.seed.parameters * (1 + 8 * 1 + 15)


def test_slots_of_the_configuration_bound_what_trains_at_once() -> None:
    assert make_plan(config(train={"slots": 3}), devices(count=8)).slots == 3
    assert make_plan(config(train={"slots": 30}), devices(count=8)).slots == 8


def test_devices_that_hold_no_expert_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--gpus=1 is less than the 2 that one expert takes"):
        make_plan(config(train={"gpus_per_expert": 2}), devices(count=1))


def test_ring_all_reduce_by_hand() -> None:
    assert [all_reduce_bytes(100, workers) for workers in (1, 2, 4)] == [0, 100, 150]


def test_gradients_of_the_parallel_dense_model_by_hand() -> None:
    plan = make_plan(config(cluster={"n_clusters": 4}), devices(count=2))
    assert plan.gradient_bytes == pytest.approx(plan.expert.steps * 4 / 2 * 4 * plan.dense.parameters)


def test_a_checkpoint_has_the_bytes_of_the_plan() -> None:
    tokenizer = train_tokenizer(["a small text about nothing much, again and again " * 5], 270)
    wanted = config(seed_model={"hidden_size": 128, "n_heads": 2}, train={"gpus_per_expert": 0})
    model = new_model(wanted.seed_model, tokenizer, 1024, random_state=0)
    documents = [np.arange(200, dtype=np.int32) % len(tokenizer)] * 40
    spec = changed(expert_branches(Run(wanted))[1].spec, steps=1, batch_size=2, sequence_length=8)
    trainer = Trainer(model, PackedSequences(documents, sequence_length=8, end_of_text=0, seed=0), spec)
    trainer.train_step()
    written = io.BytesIO()
    torch.save({"name": "x", "state": trainer.state_dict()}, written)
    parameters = sum(p.numel() for p in model.parameters())
    assert len(written.getvalue()) == pytest.approx(CHECKPOINT_BYTES * parameters, rel=0.05)


class _CountedShards(LocalShards):
    """Shards that count the bytes which actors, one to a shard, would send and get."""

    sent = 0

    def total(self, step: Any, *args: Any) -> tuple:
        for shard in self._shards:
            result = step(shard, *args)
            self.sent += sum(_bytes(part) for part in result) + sum(_bytes(part) for part in args)
        return super().total(step, *args)


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 8 * isinstance(value, float)


@pytest.mark.parametrize("balanced", [True, False])
def test_a_fit_sends_about_what_the_plan_says(balanced: bool) -> None:
    n, n_clusters, dimensions = 2 * SHARD_ROWS, 16, 20
    rng = np.random.default_rng(0)
    points = rng.normal(size=(n, dimensions)) + 2 * rng.normal(size=(n_clusters, dimensions))[rng.integers(0, 16, n)]
    shards = _CountedShards([Shard(part, i) for i, part in enumerate(torch.tensor(points).float().split(SHARD_ROWS))])
    states = BalancedKMeans(n_clusters, balanced=balanced, max_iter=6, tol=0).iterations(shards)
    iterations = max(state.iteration for state in states)
    planned = clusterer_bytes(
        config(
            corpus={"sample_documents": n},
            embed={"dimensions": dimensions},
            cluster={"n_clusters": n_clusters, "balanced": balanced, "max_iter": iterations, "actors": 2},
        )
    )
    assert 0.5 < (planned - 4 * n) / shards.sent < 2


def test_the_network_bytes_grow_with_clusters_and_not_with_documents() -> None:
    def sent(n_clusters: int, documents: int) -> int:
        return clusterer_bytes(config(cluster={"n_clusters": n_clusters}, corpus={"sample_documents": documents}))

    assert sent(128, 100_000) > 10 * sent(16, 100_000)
    assert sent(16, 2_000_000) - 4 * 2_000_000 == sent(16, 1_000_000) - 4 * 1_000_000


def run_job(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(config()))
    status = main("plan", ["--config", str(path), *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_print_holds_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_job(
        tmp_path, capsys, "--gpu", "h100", "--gpus", "4", "--price-per-hour", "3", "--corpus-tokens", "800000",
        "train.precision=bf16",
    )  # fmt: skip
    assert (status, err) == (0, "")
    lines = {line[:28].strip(): line[28:50].strip() for line in reversed(out.splitlines())}
    plan: Plan = make_plan(config(), devices())
    assert lines["devices"] == "4 x h100"
    assert lines["parameters"] == f"{plan.seed.parameters:,}"
    assert lines["expert, each of K"] == f"{plan.expert.steps:,} steps"
    assert lines["epochs"] == f"{plan.dense.tokens / 800_000:.2f}"
    assert float(lines["cost"]) == pytest.approx(3 * float(lines["device-hours"]), abs=0.03)
    assert "989 TFLOPs/s at the peak in bf16, 30% of it assumed" in out


CHANGED: dict[str, Any] = {
    "train.total_tokens": 400_000,
    "train.budget": "by_size",
    "train.clusters": [0],
    "train.controls": ["random"],
    "train.trainable": "ffn",
    "train.batch_size": 8,
    "train.micro_batch_size": 1,
    "train.precision": "bf16",
    "train.activation_checkpointing": True,
    "train.compile": True,
    "train.slots": 1,
    "train.experts_per_run": 2,
    "train.cpus_per_expert": 2,
    "train.gpus_per_expert": 4,
    "train.workers_per_expert": 1,
    "train.parallel": "ddp",
    "train.checkpoint_every": 3,
    "train.evaluate_every": 1,
    "train.evaluate_sequences": 8,
    "evaluate.max_documents": 3,
    "evaluate.fewshot": ["task.jsonl"],
    "evaluate.fewshot_seeds": [1],
    "evaluate.fewshot_examples": 3,
}
OF_NO_COST = {
    "warm_start", "learning_rate", "final_lr_fraction", "schedule", "warmup_steps", "betas", "weight_decay", "clip_norm",
    "cross_documents", "log_every", "tensorboard", "trackers", "notice_every", "max_failures",
}  # fmt: skip


def test_every_training_option_is_in_the_plan_or_of_no_cost() -> None:
    assert {field.name for field in dataclasses.fields(TrainConfig)} == OF_NO_COST | {
        name.removeprefix("train.") for name in CHANGED if name.startswith("train.")
    }


@pytest.mark.parametrize("name", CHANGED)
def test_what_an_option_costs_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    section, field = name.split(".")
    before: dict[str, dict[str, Any]] = {
        "train": {"gpus_per_expert": 2, "workers_per_expert": 2, "parallel": "fsdp", "checkpoint_every": 20},
        "evaluate": {"fewshot": ["task.jsonl", "other.jsonl"]},
    }
    if field == "cpus_per_expert":
        before["train"]["gpus_per_expert"] = 0
    after = {**before, section: {**before[section], field: CHANGED[name]}}
    prints = []
    for sections in (before, after):
        path = tmp_path / "b.yaml"
        path.write_text(dump_config(config(**sections)))
        main("plan", ["--config", str(path), "--gpu", "other", "--tflops", "0.001", "--gpus", "8"])
        prints.append(capsys.readouterr().out)
    assert prints[0] != prints[1]


def test_what_a_job_would_refuse_is_said_below_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = run_job(tmp_path, capsys, "corpus.paths=[/nowhere]")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "dense control" in out
    assert "error: corpus.paths: /nowhere does not exist" in error


def test_what_is_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train.controls=[random,metadata,moe]", "corpus.domain_column=topic", "train.budget=by_size"]
    status, out, _ = run_job(tmp_path, capsys, "--gpus", "4", *given)
    assert status == 0
    for said in (
        "  by size                           1 to 377 steps  each expert, by its cluster's tokens: not known yet",
        "  experts by size, at most",
        "control random                           8 experts  of the same steps\n",
        "control metadata                         8 experts  of the same steps; as many domains as clusters assumed\n",
        "control moe                              384 steps",
        "by 27 models once each; at most 2,000 documents\n",
        "after them, 4 at once, if their shares are equal",
        "on 1 device, by train.workers_per_expert=1\n",
    ):
        assert said in out
    _, out, _ = run_job(tmp_path, capsys, "train.gpus_per_expert=2", "train.workers_per_expert=2")
    assert "on 2 devices, by train.workers_per_expert=2\n" in out
    assert "sent by each of its 2 workers, ddp; " in out
    assert "yet" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "error: --gpus=0 must be at least 1.\n"),
        (["--utilization", "1.5"], "error: --utilization=1.5 must be above 0 and at most 1, such as 0.3.\n"),
        (["--price-per-hour", "-1"], "error: --price-per-hour=-1.0 must be 0 or more.\n"),
        (["--gpu", "other"], "error: --gpu=other needs --tflops"),
        (["--gpu", "b200", "train.gpus_per_expert=1"], "error: --gpu=b200 needs --tflops"),
        (["--tflops", "0"], "error: --tflops=0.0 must be above 0.\n"),
        (["--corpus-tokens", "0"], "error: --corpus-tokens=0 must be at least 1."),
        (["train.gpus_per_expert=0"], "error: train.gpus_per_expert=0 trains on CPUs. Plan for GPUs with"),
        (["train.gpus_per_exper=1"], "error: train.gpus_per_exper is not a key. Did you mean train.gpus_per_expert?"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run_job(tmp_path, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_sizes_and_times_are_read_easily() -> None:
    assert [size(n) for n in (0, 12, 1500, 2.5e9, 3e18)] == ["0 B", "12 B", "1.5 kB", "2.5 GB", "3e+03 PB"]
    assert [clock(s) for s in (12.4, 3599, 3600, 9e6)] == ["12 s", "3,599 s", "1.0 h", "2,500.0 h"]
