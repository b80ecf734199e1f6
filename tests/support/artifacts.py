"""What two runs of one configuration must have in common, however often one of them was killed."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from cbtm_ray import files

STAGES = ("tokenizer", "clusterer", "shards", "seed", "experts", "controls", "evaluation")
_EXACT = (".safetensors", ".npy", ".parquet", "tokenizer.json")


def artifacts(run_dir: str) -> dict[str, Any]:
    """Of a finished run, by name: hashes of models, clusterer, shards and tokenizer, contents and losses of curves from
    manifests, rows of results."""
    found: dict[str, Any] = {}
    for uri in files.list_files(run_dir):
        name = uri.removeprefix(f"{run_dir}/")
        if name.split("/")[0] not in STAGES:
            continue  # what was made of the run later
        if name.endswith(_EXACT):
            name = re.sub(
                r"-[0-9a-f]{16}\.npy$", ".npy", name
            )  # log-probabilities are named by the folder of the corpus too
            found[name] = hashlib.sha256(files.read_bytes(uri)).hexdigest()
        elif name.endswith("manifest.json"):
            manifest = files.read_json(uri)
            found[name] = manifest.get("content"), [(p["step"], p["loss_nats"]) for p in manifest.get("curve", [])]
        elif name == "evaluation/results.json":
            found[name] = files.read_json(uri)["rows"]
    return found
