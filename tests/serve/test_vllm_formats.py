"""What is exported, in stock vLLM: the merged mixture of experts, and adapters of one base behind the router."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.served_run import make_run
from benchmarks.vllm_servers import BIN, our_vllm
from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.export.adapters import factors_of, save_adapter
from cbtm_ray.models import load_model, save_model
from cbtm_ray.sparse import sparse_model
from cbtm_ray.stages import expert_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not BIN.exists(), reason="no .venv-vllm here; make .venv-vllm/cpu makes it"),
]
PORT = 8742
PROMPT = "Return an array of the given shape and type, filled with ones"
SCORE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=512)
token_ids = json.loads(sys.argv[2])
wanted = SamplingParams(max_tokens=1, prompt_logprobs=0)
found = model.generate([{"prompt_token_ids": token_ids}], wanted)[0].prompt_logprobs
print("LOGPROBS", json.dumps([row[token].logprob for row, token in zip(found[1:], token_ids[1:])]))
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("random"), "quickstart", seed=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_merged_model_has_the_same_logprobs(run_dir: str, top_k: int, tmp_path: Path) -> None:
    experts = [load_model(f"{run_dir}/{expert_folder(k)}") for k in range(4)]
    tokenizer = load_tokenizer(f"{run_dir}/tokenizer")
    save_model(sparse_model(experts[0], experts, top_k, random_state=0), tokenizer, str(tmp_path / "merged"))
    token_ids = [tokenizer.eos_token_id, *encode(tokenizer, [PROMPT])[0].tolist()]
    command = [BIN / "python", "-c", SCORE, str(tmp_path / "merged"), json.dumps(token_ids)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.partition("LOGPROBS ")[2].partition("\n")[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        rows_TV = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    expected = [float(row_V[token]) for row_V, token in zip(rows_TV, token_ids[1:], strict=True)]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def url(run_dir: str) -> Iterator[str]:
    """The endpoint with the random experts as adapters of the first of them."""
    seed, tokenizer = load_model(f"{run_dir}/{expert_folder(0)}"), load_tokenizer(f"{run_dir}/tokenizer")
    save_model(seed, tokenizer, f"{run_dir}/seed")
    for cluster in range(4):
        folder = Path(run_dir, "export", "adapters", f"cluster={cluster:04d}")
        factors = factors_of(load_model(f"{run_dir}/{expert_folder(cluster)}"), seed, 8)
        save_adapter(seed, factors, f"{run_dir}/seed", folder)
    files.write_json(f"{run_dir}/export/adapters/manifest.json", {})
    with our_vllm(run_dir, PORT, adapters=True, dense=False, group_cpus=0.5, vllm={"enforce_eager": True}) as found:
        yield found


def test_adapters_answer_as_peft_has_them(url: str, run_dir: str) -> None:
    tokenizer, seed = load_tokenizer(f"{run_dir}/tokenizer"), load_model(f"{run_dir}/seed")
    experts, seen = {}, set[int]()
    for cluster in range(4):
        folder = f"{run_dir}/export/adapters/cluster={cluster:04d}"
        experts[cluster] = PeftModel.from_pretrained(copy.deepcopy(seed), folder).eval()
    for prompt in (
        "The",
        PROMPT,
        "Sort the values along an axis and see also lexsort",
        "import numpy as np",
        "a matrix",
    ):
        token_ids = [tokenizer.eos_token_id, *encode(tokenizer, [prompt])[0].tolist()]
        body: dict[str, Any] = {"model": "cbtm", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0}
        answer = httpx.post(url, json={**body, "cbtm": {"return_routing": True}}, timeout=600)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        for expert, logprob in zip(choice["cbtm"]["experts"], choice["logprobs"]["token_logprobs"], strict=True):
            with torch.no_grad():
                row_V = experts[expert](torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(float(row_V.max()), abs=1e-3)
            token_ids.append(int(row_V.argmax()))
            seen.add(expert)
    assert len(seen) > 1
