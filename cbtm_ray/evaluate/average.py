"""Job `average_experts`: the experts' parameters averaged into one dense model, measured beside the dense control.

K experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from cbtm_ray import files
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.evaluate.scoring import held_out_documents, score_models
from cbtm_ray.evaluate.systems import Measured, ensemble_system, measure
from cbtm_ray.merge.mixture import average_weights
from cbtm_ray.merge.routers import Route
from cbtm_ray.models import save_model
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER


def average_experts(run: Run) -> dict[str, Any]:
    """Stage `average/{uniform,routing}/`: two averages, a Hugging Face folder each, with their held-out perplexity.

    `uniform` weighs all experts alike; `routing` by the mean weight that the ensemble's chosen routing gives them over the
    held-out documents it was tuned on (BTM, section 3: weights from a sample of the domain that the model is meant for).
    """
    run.require("evaluation", "evaluate_mixture")
    ensemble, documents = ensemble_system(run), held_out_documents(run)
    logprobs = score_models(run, [DENSE_FOLDER, *ensemble.experts])
    [measured] = measure(run, documents, logprobs, [ensemble])
    uniform_K = np.full(len(ensemble.experts), 1 / len(ensemble.experts))
    weights = {"average/uniform": uniform_K, "average/routing": _mean_weights(run, measured)}
    task = _write_average.options(num_cpus=run.config.train.cpus_per_expert)
    ray.get([task.remote(run.config, ensemble.experts, name, weights_K) for name, weights_K in weights.items()])
    logprobs |= score_models(run, list(weights))
    reported_T = documents.token_mask(tuning=False)
    dense_R = logprobs[DENSE_FOLDER][reported_T]
    return {
        "rows": [
            {"folder": name, "weights": weights_K, **documents.summarize(logprobs[name][reported_T], dense_R)}
            for name, weights_K in [(DENSE_FOLDER, None), *((name, found.tolist()) for name, found in weights.items())]
        ]
    }


def _mean_weights(run: Run, measured: Measured) -> np.ndarray:
    """The chosen routing's weights, averaged over the tokens of the tuning documents, float64 (K,) of sum 1."""
    evaluation = files.read_json(run.uri("evaluation", "results.json"))
    chosen = next(row for row in evaluation["rows"] if row.get("chosen"))
    route = Route(
        prefix_tokens=evaluation["prefix_tokens"], **{key: chosen[key] for key in ("routing", "top_k", "settings")}
    )
    mean_K = route.weights(measured.tuning).astype(np.float64).mean(axis=0)
    return mean_K / mean_K.sum()


@ray.remote
def _write_average(config: Config, experts: list[str], name: str, weights_K: np.ndarray) -> None:
    run = Run(config)
    model = average_weights([run.uri(expert) for expert in experts], weights_K)
    run.finish(name, {"content": save_model(model, load_tokenizer(run.uri("tokenizer")), run.uri(name))})
