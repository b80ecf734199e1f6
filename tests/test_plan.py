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

from cbtm_ray import flops
from cbtm_ray.branch import expert_branches, seed_branch
from cbtm_ray.cluster import BalancedKMeans
from cbtm_ray.config import Config
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config, dump_config
from cbtm_ray.models import new_model
from cbtm_ray.plan import (
    CHECKPOINT_BYTES,
    START_S,
    Devices,
    Plan,
    all_reduce_bytes,
    clusterer_bytes,
    make_plan,
    makespan,
    model_of,
)
from cbtm_ray.plan_text import clock, main, size
from cbtm_ray.run import Run, expert_folder
from cbtm_ray.shard_steps import SHARD_ROWS, LocalShards, Shard
from cbtm_ray.tokens import train_tokenizer
from cbtm_ray.train import Trainer
from cbtm_ray.training_data import PackedSequences
from tests.tiny_models import changed


def config(**sections: dict[str, Any]) -> Config:
    least: dict[str, dict[str, Any]] = {
        "run": {"dir": "runs/a"},
        "corpus": {"paths": ["documents"]},
        "seed_model": {"train_tokens": 100_000},
        "train": {"gpus_per_expert": 1},
    }
    return build_config({name: {**least.get(name, {}), **sections.get(name, {})} for name in {**least, **sections}})


def devices(count: int = 4, peak_flops: float = 1e9) -> Devices:
    return Devices(name="other", count=count, peak_flops=peak_flops, utilisation=0.5, price_per_hour=2.0)


@pytest.mark.ray
def test_a_finished_run_took_what_its_plan_says(finished_run: Run) -> None:
    made = {name: finished_run.manifest(name) or {} for name in ("tokenizer", "seed", "controls/dense", "experts")}
    experts = [finished_run.manifest(expert_folder(k)) or {} for k in range(finished_run.config.cluster.n_clusters)]
    # A corpus of few words gives a smaller vocabulary than was asked for.
    tokens = dataclasses.replace(finished_run.config.tokens, vocab_size=made["tokenizer"]["vocabulary"])
    plan = make_plan(dataclasses.replace(finished_run.config, tokens=tokens), devices())
    assert made["seed"]["parameters"] == made["experts"]["parameters"] == plan.model.parameters
    assert made["seed"]["steps"] == plan.seed_steps
    assert made["seed"]["train_flops"] == pytest.approx(plan.seed_flops)
    assert made["controls/dense"]["train_flops"] == pytest.approx(plan.dense_flops)
    for expert in experts:
        assert (expert["steps"], expert["train_flops"]) == (plan.expert_steps, pytest.approx(plan.expert_flops))


@given(
    n_clusters=st.integers(1, 9),
    total_tokens=st.integers(10_000, 10**6),
    seed_tokens=st.integers(1, 10**6),
    batch_size=st.integers(1, 8),
)
@settings(max_examples=30)
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
    assert plan.seed_steps == seed_branch(run).spec.steps
    assert {branch.spec.steps for branch in experts} == {plan.expert_steps}
    assert plan.dense_flops == pytest.approx(
        flops.train_flops(plan.infer_flops_per_token, dense.spec.steps * plan.per_step)
    )


@pytest.mark.parametrize("sizes", [(16, 1, 2, 32), (24, 3, 4, 40), (64, 2, 2, 256)])
def test_a_new_model_has_the_parameters_of_the_plan(sizes: tuple[int, int, int, int]) -> None:
    width, layers, heads, inner = sizes
    tokenizer = train_tokenizer(["a small text about nothing much, again and again " * 5], 270)
    wanted = config(
        tokens={"vocab_size": len(tokenizer)},
        seed_model={"hidden_size": width, "n_layers": layers, "n_heads": heads, "intermediate_size": inner},
    )
    model = new_model(wanted.seed_model, tokenizer, 64, random_state=0)
    planned = model_of(wanted)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.matrix_parameters == flops.parameters(model)


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
    plan = make_plan(config(seed_model={"name_or_path": str(tmp_path), "train_tokens": 0}), devices())
    assert (plan.seed_steps, plan.seed_s) == (0, 0)  # taken as it is
    planned = plan.model
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.matrix_parameters == flops.parameters(model)
    assert (planned.n_layers, planned.hidden_size) == (loaded.num_hidden_layers, 32)


def test_a_model_that_is_not_here_is_refused_in_one_line() -> None:
    wanted = config(seed_model={"name_or_path": "nobody/no-such-model", "train_tokens": 0})
    with pytest.raises(
        UserError, match=r"^seed_model\.name_or_path='nobody/no-such-model' must be .* hf download"
    ) as e:
        model_of(wanted)
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
    assert plan.dense_flops == 4 * plan.expert_flops
    assert plan.seed_s == pytest.approx(plan.seed_flops / rate + START_S)
    dense, expert = plan.dense_flops / rate + START_S, plan.expert_flops / rate + START_S
    assert (plan.dense_s, plan.expert_runs_s) == (pytest.approx(dense), pytest.approx([expert] * 4))
    assert plan.training_s == pytest.approx(max(dense, 2 * expert))  # the control keeps one device, three serve four
    assert plan.device_hours == pytest.approx((plan.seed_s + dense + 4 * expert) / 3600)
    assert plan.parallel_dense_s == pytest.approx(plan.dense_flops / (4 * rate))


def test_experts_of_one_run_come_one_after_the_other_and_pay_one_start() -> None:
    plan = make_plan(config(cluster={"n_clusters": 8}, train={"experts_per_run": 3}), devices())
    alone = plan.expert_flops / 0.5e9
    assert plan.expert_runs_s == pytest.approx([3 * alone + START_S, 3 * alone + START_S, 2 * alone + START_S])


def test_two_experts_on_one_device_are_half_as_fast_and_hold_half_of_it() -> None:
    whole = make_plan(config(), devices(count=2))
    half = make_plan(config(train={"gpus_per_expert": 0.5}), devices(count=2))
    assert (whole.slots, half.slots) == (2, 4)
    assert half.dense_s - START_S == pytest.approx(2 * (whole.dense_s - START_S))
    assert half.share * half.dense_s < whole.dense_s


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
    assert plan.gradient_bytes == pytest.approx(plan.expert_steps * 4 / 2 * 4 * plan.model.parameters)


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
    assert lines["parameters"] == f"{plan.model.parameters:,}"
    assert lines["expert, each of K"] == f"{plan.expert_steps:,} steps"
    assert lines["epochs"] == f"{8 * plan.expert_steps * plan.per_step / 800_000:.2f}"
    assert float(lines["cost"]) == pytest.approx(3 * float(lines["device-hours"]), abs=0.03)
    assert "989 TFLOPs/s at the peak in bf16, 30% of it assumed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "error: --gpus=0 must be at least 1.\n"),
        (["--utilisation", "1.5"], "error: --utilisation=1.5 must be above 0 and at most 1, such as 0.3.\n"),
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
