"""Job `make_fewshot_task`: a few-shot task out of the run's own held-out documents, which domain is a text of?"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.scoring import held_out_documents
from cbtm_ray.run import Run

MAX_LABELS = 4
TEXT_TOKENS = 64


def make_task(run: Run) -> dict[str, Any]:
    """Stage `fewshot/`: `domains.jsonl`, the first tokens of held-out documents of the largest domains, with the domain.

    The half of the documents that routing is tuned on is 'train', the half that is reported on 'test'.

    Raises:
        UserError: the held-out documents are not of two domains.
    """
    run.require("shards", "partition_corpus")
    documents = held_out_documents(run)
    counts = Counter(domain for domain in documents.domains if domain)
    labels = sorted(sorted(counts, key=lambda domain: (-counts[domain], domain))[:MAX_LABELS])
    if len(labels) < 2:
        raise UserError(
            f"the held-out documents have the domains {labels}, and a task needs 2. Name their column: corpus.domain_column."
        )
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    rows = [
        {"text": text, "label": domain, "split": "train" if tuning else "test"}
        for tokens, domain, tuning in zip(documents.tokens, documents.domains, documents.for_tuning, strict=True)
        if domain in labels and (text := str(tokenizer.decode(tokens[:TEXT_TOKENS].tolist()))).strip()
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_bytes(run.uri("fewshot", "domains.jsonl"), lines.encode())
    return {"examples": len(rows), "labels": labels, "task": run.uri("fewshot", "domains.jsonl")}
