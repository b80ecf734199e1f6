"""The endpoint's benchmarks: a finished run of random experts, what they can be told, and Serve's replicas."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np
import psutil

from benchmarks.decoding import SIZES, make_experts
from cbtm_ray import files
from cbtm_ray.cluster.embed import TokenTfidf, save_embedder, silent_tokens
from cbtm_ray.cluster.ngrams import count_pairs, smooth
from cbtm_ray.config import EmbedConfig
from cbtm_ray.corpus.installed_docs import package_documents
from cbtm_ray.corpus.tokenizer import encode, save_tokenizer, train_tokenizer
from cbtm_ray.models import save_model
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

PACKAGE, PACKAGE_BYTES = "numpy", 1_500_000
DIMENSIONS, MAX_PAIRS = 100, 50_000
SETTINGS = {"temperature": 0.5, "beta": 0.2, "gamma": 1.0, "reread_cost": 0.2}


def parser(doc: str | None, *, tokens: int, port: int) -> argparse.ArgumentParser:
    """What every benchmark of the endpoint can be told; `tokens` and `port` are its defaults."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--size", choices=list(SIZES), default="quickstart", help="of random experts")
    found.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    found.add_argument("--tokens", type=int, default=tokens, help="tokens of an answer")
    found.add_argument("--port", type=int, default=port, help="of the endpoint; a peer's server has the next")
    found.add_argument("--seed", type=int, default=0)
    return found


def replicas(deployment: str = "") -> list[psutil.Process]:
    """Processes of a deployment's replicas, or of all, on this process' own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # they come and go meanwhile
            if f"ServeReplica:default:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def read_texts() -> list[str]:
    """Documents that every installation has."""
    return [document.text for document in package_documents(PACKAGE, PACKAGE_BYTES)]


def make_run(folder: Path, size: str, seed: int) -> str:
    """Write experts of a size of benchmarks/decoding.py, one model beside them as the dense control, and what routes.

    Tokenizer and embedder are fitted on documents; every document is in the cluster of the nearest center, each of which is
    that of one document.
    """
    texts = read_texts()
    tokenizer = train_tokenizer(texts, SIZES[size]["vocab_size"])
    if len(tokenizer) != SIZES[size]["vocab_size"]:
        raise ValueError(f"size={size} needs more text than {PACKAGE} has for its vocabulary. Choose a smaller one.")
    documents = encode(tokenizer, texts)
    experts = make_experts(size, seed)
    for cluster, model in enumerate(experts):
        save_model(model, tokenizer, files.join(str(folder), expert_folder(cluster)))
    save_model(experts[0], tokenizer, str(folder / DENSE_FOLDER))
    save_tokenizer(tokenizer, str(folder / "tokenizer"))
    embedder = TokenTfidf.fit(documents, silent_tokens(tokenizer), dimensions=DIMENSIONS, random_state=seed)
    save_embedder(embedder, EmbedConfig(dimensions=DIMENSIONS), str(folder / "clusterer" / "embedder"))
    chosen = np.random.default_rng(seed).permutation(len(documents))[: len(experts)]
    centers_KD = embedder.transform([documents[i] for i in chosen])
    files.write_array(str(folder / "clusterer" / "centers.npy"), centers_KD)
    nearest_N = (embedder.transform(documents) @ centers_KD.T).argmax(axis=1)
    end_of_text = int(tokenizer.eos_token_id)
    counts = count_pairs(
        documents, nearest_N, vocabulary=len(tokenizer), n_clusters=len(experts), end_of_text=end_of_text
    )
    smooth(counts, end_of_text=end_of_text, max_pairs=MAX_PAIRS).tables().save(str(folder / "ngrams"))
    clusters = [{"cluster": k, "top_terms": [], "documents": 0} for k in range(len(experts))]
    files.write_json(str(folder / "clusterer" / "manifest.json"), {"clusters": clusters})
    files.write_json(str(folder / "shards" / "manifest.json"), {"train": {"clusters": clusters}})
    results = {
        "rows": [{"routing": "ngram", "top_k": 1, "served": True}],
        "routers": {"ngram": dict.fromkeys(range(1, len(experts) + 1), SETTINGS)},
        "prefix_tokens": 0,
    }
    files.write_json(str(folder / "evaluation" / "results.json"), results)
    files.write_json(str(folder / "evaluation" / "manifest.json"), {})
    return str(folder)
