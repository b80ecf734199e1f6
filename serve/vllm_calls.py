"""What the deployment asks of vLLM: an engine of a model, and tokens of texts. vLLM is imported where it is used."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from cbtm_ray import files
from cbtm_ray.decode.one_expert import ExpertRequest, ExpertTokens
from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config

VLLM_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else each engine would be three processes
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines of a node would share its first cores
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_BLOCK_TOKENS = 32
"""vLLM's own 128 would keep no prompt of less for the next expert's or request's use."""
OURS = ("model", "tokenizer", "skip_tokenizer_init", "max_num_seqs", "enable_lora")
"""Engine arguments that the endpoint itself sets."""

Made = list[tuple[str, ExpertTokens | Exception]]


def engine_arguments(
    model_uri: str, max_sequences: int, cache_tokens: int, given: dict[str, Any], *, gpu: bool
) -> dict[str, Any]:
    """vLLM's arguments: ours, those given over them. On a GPU vLLM itself measures the memory for its cache.

    Raises:
        UserError: one is given that the endpoint itself sets.
    """
    if ours := sorted(given.keys() & set(OURS)):
        raise UserError(f"vllm={ours[0]} is set by the endpoint itself. Leave it out.")
    config: Any = load_model_config(model_uri)
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    found = {"dtype": dtype, "max_num_seqs": max_sequences, "skip_tokenizer_init": True, "enable_prefix_caching": True}
    if not gpu:
        found |= {"block_size": CPU_BLOCK_TOKENS, "kv_cache_memory_bytes": cache_tokens * cache_bytes(config, dtype)}
    return found | given


def cache_bytes(config: Any, dtype: str) -> int:
    """Bytes of keys and values of one token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)


def make_engine(model_uri: str, arguments: dict[str, Any]) -> Any:
    """The engine with the model of a folder or URI.

    Raises:
        UserError: vLLM is not installed, or does not know an argument.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as problem:
        raise UserError(
            f"engine=vllm needs vLLM, which cannot be imported here ({problem}). Start the server from an environment of "
            "requirements-vllm-cpu.txt or requirements-vllm-cuda.txt."
        ) from problem
    with files.local_folder(model_uri) as folder:
        try:
            engine_args = EngineArgs(model=folder, disable_log_stats=True, **arguments)
        except TypeError as problem:
            raise UserError(f"vllm={problem}. Use the names of vLLM's EngineArgs.") from problem
        return LLMEngine.from_engine_args(engine_args, enable_multiprocessing=False)


def fetch_adapters(adapters: dict[int, str]) -> tuple[dict[int, Any], dict[str, Any]]:
    """vLLM's requests of adapters, by expert, and the engine arguments for them. Folders of a URI are copied here for good."""
    from vllm.lora.request import LoRARequest

    kept = tempfile.mkdtemp(prefix="cbtm-adapters-")
    found, ranks = {}, list[int]()
    for expert, uri in adapters.items():
        path = os.path.join(kept, str(expert))
        with files.local_folder(uri) as folder:
            shutil.copytree(folder, path)
        ranks.append(files.read_json(os.path.join(path, "adapter_config.json"))["r"])
        found[expert] = LoRARequest(f"expert-{expert}", expert + 1, path)
    allowed = min(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= max(ranks))
    return found, {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": allowed}


def step(
    engine: Any,
    added: list[tuple[str, ExpertRequest]],
    left: list[str],
    end_of_text: int,
    adapters: dict[int, Any],
) -> Made:
    """Let texts in and out, and make one step: the tokens of each text."""
    engine.abort_request(left)
    made: Made = []
    for name, request in added:
        if name in left:
            continue
        try:
            prompt = {"prompt_token_ids": request.token_ids}
            adapter = adapters.get(request.expert)
            engine.add_request(name, prompt, sampling_params(request, end_of_text), lora_request=adapter)
        except ValueError as problem:  # vLLM refuses this text, and goes on with the others
            made.append((name, problem))
    if engine.has_unfinished_requests():
        made += [(output.request_id, expert_tokens(output)) for output in engine.step() if output.outputs[0].token_ids]
    return made


def sampling_params(request: ExpertRequest, end_of_text: int) -> Any:
    """vLLM's SamplingParams for the tokens that `Engine` would draw from."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        seed=request.sampling.seed,
        max_tokens=request.max_tokens,
        stop_token_ids=[end_of_text],
        logprobs=request.top_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def expert_tokens(output: Any) -> ExpertTokens:
    """The new tokens of vLLM's output of a step."""
    made = output.outputs[0]
    token_ids, rows = list(made.token_ids), made.logprobs
    return ExpertTokens(
        token_ids=token_ids,
        logprobs=None if rows is None else [row[token].logprob for token, row in zip(token_ids, rows, strict=True)],
        top_logprobs=None if rows is None else [_best(row) for row in rows],
        finish_reason=made.finish_reason,
        cached_tokens=output.num_cached_tokens or 0,
    )


def _best(row: dict[int, Any]) -> list[tuple[int, float]]:
    """Best first; the drawn token may come after those that were asked for."""
    return [(token, found.logprob) for token, found in sorted(row.items(), key=lambda pair: pair[1].rank)]
