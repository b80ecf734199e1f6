"""Model cards for a run and its experts, with the Hub's metadata."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cbtm_ray import files
from cbtm_ray.config import Config
from cbtm_ray.evaluate.result_rows import ResultRow, row_name
from cbtm_ray.inputs import is_path

TAG = "cluster-branch-train-merge"
"""In the metadata of every card."""
LOAD_EXPERT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
LOAD_ROUTER = """```python
import sys; sys.path.insert(0, "THIS_FOLDER")
from load_router import Router
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER/experts/cluster=0000")
token_ids = tokenizer("a text", add_special_tokens=False).input_ids
expert = Router("THIS_FOLDER/router").expert(token_ids)
model = AutoModelForCausalLM.from_pretrained(f"THIS_FOLDER/experts/cluster={expert:04d}")
```"""
LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

seed = AutoModelForCausalLM.from_pretrained("THIS_FOLDER/adapters/seed")
model = PeftModel.from_pretrained(seed, "THIS_FOLDER/adapters/cluster=0000")
```"""
AFTER_END_OF_TEXT = "Texts begin after the end-of-text token: the first input of a model is that token."


def license_of(config: Config) -> str | None:
    """The license in the model card of the seed's folder; None where there is no such card, or none in it."""
    name = config.seed_model.name_or_path
    if name is None or not files.exists(files.join(name, "README.md")):
        return None
    card = ModelCard(files.read_bytes(files.join(name, "README.md")).decode(), ignore_metadata_errors=True)
    found = card.data.get("license")
    return None if found is None else str(found)


def run_card(
    config: Config,
    rows: list[ResultRow],
    experts: list[dict[str, Any]],
    parts: list[str],
    license_id: str | None,
    dropped: str | None = None,
) -> str:
    """The card of the whole folder.

    Args:
        rows: of the evaluation.
        experts: cluster, documents, train_tokens and top_terms of each.
        parts: what the folder has.
        dropped: terms of the served router that the folder's router does without.
    """
    shown = _shown(rows)
    lines = [
        f"# {len(experts)} experts by Cluster-Branch-Train-Merge",
        "The corpus was clustered, a seed model branched into an expert for each cluster, and each trained on its own "
        "cluster alone. A router picks the expert of a text.",
        f"Seed: {_seed_name(config)}. License of the seed: {license_id or 'not known; ask before you publish'}.",
        "## Results",
        "Held-out perplexity, with 95 % intervals over documents; the dense control had the same training tokens.",
        _table(
            ["system", "perplexity", "ratio to dense"],
            [[row_name(row), _interval(row, "ppl", 2), _interval(row, "ratio", 3)] for row in shown],
        ),
        f"These are of the whole router. The one in this folder lacks {dropped}; it was not measured."
        if dropped
        else "",
        "## Experts",
        _table(
            ["cluster", "documents", "training tokens", "terms"],
            [[row["cluster"], row["documents"], row["train_tokens"], ", ".join(row["top_terms"])] for row in experts],
        ),
        "## Use",
        *_how_to_load(parts),
        *([LOAD_ADAPTER] if "adapters" in parts else []),
        AFTER_END_OF_TEXT,
        f"This folder has: {', '.join(parts)}.",
    ]
    return _card(config, [line for line in lines if line], license_id)


def _shown(rows: list[ResultRow]) -> list[ResultRow]:
    """The dense control, the mixture that is served, and one expert by the same routing, which the folder's router picks."""
    routings = {row["routing"] for row in rows if row.get("served")}
    single = [row for row in rows if row["system"] == "cbtm" and row["top_k"] == 1 and row["routing"] in routings]
    return [row for row in rows if row["system"] == "dense" or row.get("served") or row in single]


def _how_to_load(parts: list[str]) -> list[str]:
    if {"router", "experts"} <= set(parts):
        return [LOAD_ROUTER]
    names = {"experts": "experts/cluster=0000", "moe": "moe"}
    return [LOAD_EXPERT.format(folder=f"THIS_FOLDER/{names[part]}") for part in parts if part in names]


def expert_card(config: Config, expert: dict[str, Any], license_id: str | None) -> str:
    """The card of one expert; `expert` has valid_loss_nats beside what `run_card` shows."""
    loss = expert["valid_loss_nats"]
    lines = [
        f"# Expert {expert['cluster']}",
        f"Trained on {expert['train_tokens']:,} tokens of cluster {expert['cluster']}, which has {expert['documents']:,} "
        f"documents: {', '.join(expert['top_terms'])}.",
        f"Seed: {_seed_name(config)}. License of the seed: {license_id or 'not known; ask before you publish'}.",
        "" if loss is None else f"Perplexity on held-out documents of its cluster: {math.exp(loss):.2f}.",
        LOAD_EXPERT.format(folder="THIS_FOLDER"),
        AFTER_END_OF_TEXT,
    ]
    return _card(config, [line for line in lines if line], license_id)


def _card(config: Config, lines: list[str], license_id: str | None) -> str:
    base = config.seed_model.name_or_path
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, "mixture-of-experts"],
        license=license_id,
        base_model=None if base is None or _is_local(base) else base,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def _seed_name(config: Config) -> str:
    name = config.seed_model.name_or_path
    if name is None:
        return "a new model of this run"
    return Path(name).name if _is_local(name) else name


def _is_local(name: str) -> bool:
    """Whether a model is named by its place, which may be on another machine."""
    return is_path(name) or files.exists(name)


def _interval(row: Any, name: str, digits: int) -> str:
    value = row["ppl"] if name == "ppl" else row["ratio_to_dense"]
    return f"{value:.{digits}f} [{row[f'{name}_low']:.{digits}f}, {row[f'{name}_high']:.{digits}f}]"


def _table(names: list[str], rows: list[list[Any]]) -> str:
    cells = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in row) + " |" for row in cells)
