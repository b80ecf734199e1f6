"""The averages of a finished run: models that load, of the mean parameters, measured as the evaluation measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbtm_ray import files
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.scoring import held_out_documents, logprobs_uri
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def averaged(finished_run: Run) -> Run:
    run_job(finished_run, "average_experts")
    return finished_run


def test_an_average_has_the_weighted_parameters_of_the_experts(averaged: Run) -> None:
    experts = [AutoModelForCausalLM.from_pretrained(averaged.uri(expert_folder(k))).state_dict() for k in range(2)]
    rows = {row["folder"]: row for row in averaged.manifest("average")["rows"]}
    assert list(rows) == [DENSE_FOLDER, "average/uniform", "average/routing"]
    assert rows["average/uniform"]["weights"] == [0.5, 0.5]
    assert sum(rows["average/routing"]["weights"]) == pytest.approx(1)
    for folder in ("average/uniform", "average/routing"):
        first, second = rows[folder]["weights"]
        for name, tensor in AutoModelForCausalLM.from_pretrained(averaged.uri(folder)).state_dict().items():
            torch.testing.assert_close(tensor, first * experts[0][name] + second * experts[1][name])
        assert len(AutoTokenizer.from_pretrained(averaged.uri(folder))) == 300


def test_routing_weights_are_the_mean_over_the_tuning_documents(averaged: Run) -> None:
    """The chosen routing's weights, token by token, computed anew from the saved log-probabilities where it needs them."""
    from cbtm_ray.evaluate.systems import ensemble_system, measure
    from cbtm_ray.merge.routers import Route

    documents, ensemble = held_out_documents(averaged), ensemble_system(averaged)
    logprobs = {name: files.read_array(logprobs_uri(averaged, name)) for name in ensemble.experts}
    [measured] = measure(averaged, documents, logprobs, [ensemble])
    rows = files.read_json(averaged.uri("evaluation", "results.json"))["rows"]
    chosen = next(row for row in rows if row.get("chosen"))
    route = Route(routing=chosen["routing"], top_k=chosen["top_k"], settings=chosen["settings"], prefix_tokens=8)
    expected = route.weights(measured.tuning).mean(axis=0)
    found = averaged.manifest("average")["rows"][2]["weights"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(measured.tuning.logprobs_TK) != len(measured.reported.logprobs_TK)


def test_an_average_is_measured_on_the_documents_reported_on(averaged: Run) -> None:
    rows = {row["folder"]: row for row in averaged.manifest("average")["rows"]}
    dense = files.read_json(averaged.uri("evaluation", "results.json"))["rows"][1]
    assert {key: dense[key] for key in ("ppl", "ppl_low", "ppl_high", "bpb")} == {
        key: rows[DENSE_FOLDER][key] for key in ("ppl", "ppl_low", "ppl_high", "bpb")
    }
    model = AutoModelForCausalLM.from_pretrained(averaged.uri("average/uniform")).eval()
    documents = held_out_documents(averaged)
    losses: list[torch.Tensor] = []
    for ids, tuning in zip(documents.tokens, documents.for_tuning, strict=True):
        stream = [0, *ids.tolist()]  # 0 ends a text in the run's tokenizer
        for first in range(0, 0 if tuning else len(ids), 32):
            window = torch.tensor([stream[first : first + 33]])
            with torch.no_grad():
                logprobs = model(window[:, :-1]).logits.log_softmax(-1)
            losses.append(-logprobs.gather(2, window[:, 1:, None]).flatten())
    assert rows["average/uniform"]["loss_nats"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_the_job_prints_both_beside_the_dense_control(averaged: Run, capsys: pytest.CaptureFixture) -> None:
    before = files.read_bytes(averaged.uri("average", "uniform", "model.safetensors"))
    run_job(averaged, "average_experts")
    out = capsys.readouterr().out
    assert "already done" in out
    for row in averaged.manifest("average")["rows"]:
        assert row["folder"] in out
        assert f"{row['ppl']:.2f} [{row['ppl_low']:.2f}, {row['ppl_high']:.2f}]" in out
    assert files.read_bytes(averaged.uri("average", "uniform", "model.safetensors")) == before


def test_a_run_that_is_not_evaluated_has_no_average(averaged: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    import dataclasses

    folder = str(tmp_path_factory.mktemp("bare"))
    run = Run(dataclasses.replace(averaged.config, run=dataclasses.replace(averaged.config.run, dir=folder)))
    with pytest.raises(UserError, match=r"evaluation is not finished\. Run first: python -m jobs\.evaluate_mixture"):
        run_job(run, "average_experts")
