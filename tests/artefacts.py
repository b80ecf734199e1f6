"""What two runs of one configuration must have in common, however often one of them was killed."""

from __future__ import annotations

import hashlib
from typing import Any

from cbtm_ray import files

STAGES = ("tokenizer", "clusterer", "shards", "seed", "experts", "controls", "evaluation")
_EXACT = (".safetensors", ".npy", ".parquet", "tokenizer.json")


def artefacts(run_dir: str) -> dict[str, Any]:
    """Of a finished run, by name: hashes of models, clusterer, shards and tokenizer, losses of curves, rows of results."""
    found: dict[str, Any] = {}
    for uri in files.list_files(run_dir):
        name = uri.removeprefix(f"{run_dir}/")
        if name.split("/")[0] not in STAGES:
            continue  # what was made of the run later
        if name.endswith(_EXACT):
            found[name] = hashlib.sha256(files.read_bytes(uri)).hexdigest()
        elif name.endswith("manifest.json") and (curve := files.read_json(uri).get("curve")):
            found[name] = [(point["step"], point["loss_nats"]) for point in curve]
        elif name == "evaluation/results.json":
            found[name] = files.read_json(uri)["rows"]
    return found
