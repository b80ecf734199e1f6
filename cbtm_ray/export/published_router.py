"""The router of a run as files that load_router.py reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cbtm_ray import files
from cbtm_ray.cluster.embed import load_centers, saved_settings
from cbtm_ray.cluster.ngrams import ARRAYS
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.merge.ensemble import served_route, tuned_routes


def write_router(run_dir: str, folder: Path) -> dict[str, Any]:
    """Write router.json and router.npz: the served router, with the settings that were tuned for one expert.

    Returns:
        What router.json says. `dropped` names the distances where the embedder is no table of tokens: words and sentence
        encoders take more than numpy.

    Raises:
        UserError: without the distances nothing is left.
    """
    route = tuned_routes(run_dir, served_route(run_dir).routing).get(1)
    if route is None:
        raise UserError(f"run_dir={run_dir}: its served router cannot choose one expert. Leave router out of --parts.")
    clusterer, folder_uri = files.join(run_dir, "clusterer"), files.join(run_dir, "ngrams")
    centers_KD = load_centers(clusterer).numpy()
    embedder = saved_settings(files.join(clusterer, "embedder"))["embedder"]
    end_of_text = load_tokenizer(files.join(run_dir, "tokenizer")).eos_token_id
    said: dict[str, Any] = {"routing": route.routing, "experts": len(centers_KD), "end_of_text": end_of_text}
    arrays: dict[str, np.ndarray] = {}
    if route.router.evidence == "ngrams":
        said |= {"beta": route.settings.get("beta", 1.0), "gamma": route.gamma}
        arrays |= {name: files.read_array(files.join(folder_uri, f"{name}.npy")) for name in ARRAYS}
    if "temperature" in route.settings and embedder == "token_tfidf":
        said |= {name: route.settings[name] for name in ("temperature", "legacy_d4") if name in route.settings}
        table_VD = files.read_array(files.join(clusterer, "embedder", "table.npy"))
        arrays |= {"centers_KD": centers_KD, "table_VD": table_VD}
    elif "temperature" in route.settings:
        said["dropped"] = f"the distances to the centers, which need the embedder {embedder!r}"
    if not arrays:
        raise UserError(
            f"run_dir={run_dir}: the router needs the embedder {embedder!r}, which numpy alone does not run. Leave router out "
            "of --parts, or serve by ngram."
        )
    folder.mkdir(parents=True)
    np.savez(folder / "router.npz", **arrays)  # type: ignore[arg-type]
    files.write_json(str(folder / "router.json"), said)
    return said
