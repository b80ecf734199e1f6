"""One model in stock vLLM: a replica is one engine, in the replica's own process, that decodes many texts at once.

Ray Serve's own LLM deployments speak OpenAI's format, which the gateway speaks already; between the two go token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import ray
from ray import serve

from cbtm_ray import files
from cbtm_ray.decode.one_expert import ExpertRequest, ExpertTokens
from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config

from .replica import MESSAGE_S

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

SWITCH_S = 0.0005
"""Python's 5 ms would hold the engine's thread up after every operator in which it let the event loop run."""

Made = list[tuple[str, ExpertTokens | Exception]]


@serve.deployment(health_check_period_s=2)
class VLLMEngine:
    """An engine, which one thread steps, and the queue of each text that it decodes."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model_uri: str, end_of_text: int, *, max_sequences: int, cache_tokens: int, vllm: dict[str, Any]
    ) -> None:
        self._end_of_text, self._texts = end_of_text, dict[str, _Text]()
        self._added, self._left = list[tuple[str, ExpertRequest]](), list[str]()
        self._work, self.n_tokens = asyncio.Event(), 0
        sys.setswitchinterval(SWITCH_S)
        self._thread = ThreadPoolExecutor(1)  # for good: PyTorch keeps a team of threads for each thread that calls it
        arguments = engine_arguments(model_uri, max_sequences, cache_tokens, vllm, gpu=bool(ray.get_gpu_ids()))
        self._engine = await self._in_thread(make_engine, model_uri, arguments)
        self._stepping = asyncio.create_task(self._step_for_ever())

    async def check_health(self) -> None:
        """Serve's health check: an engine that failed is not mended by waiting."""
        if self._stepping.done():
            raise RuntimeError("the engine has failed") from self._stepping.exception()

    async def describe(self) -> dict[str, int]:
        """State of the replica: pid, running (texts), tokens decoded since it started."""
        return {"pid": os.getpid(), "running": len(self._texts), "tokens": self.n_tokens}

    async def generate(self, request: ExpertRequest) -> AsyncIterator[ExpertTokens]:
        """Decode a text: its next tokens, together those that were made since the last message."""
        await self.check_health()
        name, text = uuid.uuid4().hex, _Text(request)
        self._texts[name] = text
        self._added.append((name, request))
        self._work.set()
        ended, pause_s = False, 0.0
        try:
            while not ended:
                tokens = await text.next_message(pause_s)
                ended = tokens.finish_reason is not None
                yield tokens
                pause_s = MESSAGE_S * (len(self._texts) - 1) if request.message_tokens == 1 else 0.0
        finally:
            del self._texts[name]
            if not ended:
                self._left.append(name)
                self._work.set()

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _step_for_ever(self) -> None:
        """Step the engine while there is work, and hand every token to its text."""
        try:
            while True:
                await self._work.wait()
                added, self._added = self._added, []
                left, self._left = self._left, []
                made = await self._in_thread(_step, self._engine, added, left, self._end_of_text)
                for name, tokens in made:
                    self.n_tokens += len(tokens.token_ids) if isinstance(tokens, ExpertTokens) else 0
                    if (text := self._texts.get(name)) is not None:
                        text.add(tokens)
                if not (self._added or self._left or self._engine.has_unfinished_requests()):
                    self._work.clear()
        except BaseException as problem:
            for text in self._texts.values():
                text.add(RuntimeError(f"the engine has failed: {problem}"))
            raise


class _Text:
    """A text that the engine decodes, and its tokens since the last message."""

    def __init__(self, request: ExpertRequest) -> None:
        self.request = request
        self._made = list[ExpertTokens]()
        self._problem: Exception | None = None
        self._enough, self._ended = asyncio.Event(), asyncio.Event()

    def add(self, tokens: ExpertTokens | Exception) -> None:
        if isinstance(tokens, Exception):
            self._problem = tokens
        else:
            self._made.append(tokens)
        if isinstance(tokens, Exception) or tokens.finish_reason:
            self._ended.set()
        # Each part has a token, or more.
        if self._ended.is_set() or len(self._made) >= self.request.message_tokens:
            self._enough.set()

    async def next_message(self, after_s: float) -> ExpertTokens:
        """The tokens since the last message: as many as the request wants, not before a time is over; or all to the end."""
        if after_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), after_s)
        await self._enough.wait()
        if self._problem is not None:
            raise RuntimeError("decoding has failed") from self._problem
        made, self._made = self._made, []
        self._enough.clear()
        return reduce(ExpertTokens.followed_by, made)


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
            "requirements-vllm-cpu.txt or requirements-vllm.txt."
        ) from problem
    with files.local_folder(model_uri) as folder:
        try:
            engine_args = EngineArgs(model=folder, disable_log_stats=True, **arguments)
        except TypeError as problem:
            raise UserError(f"vllm={problem}. Use the names of vLLM's EngineArgs.") from problem
        return LLMEngine.from_engine_args(engine_args, enable_multiprocessing=False)


def _step(engine: Any, added: list[tuple[str, ExpertRequest]], left: list[str], end_of_text: int) -> Made:
    """Let texts in and out, and make one step: the tokens of each text."""
    engine.abort_request(left)
    made: Made = []
    for name, request in added:
        if name in left:
            continue
        try:
            prompt = {"prompt_token_ids": request.token_ids}
            engine.add_request(name, prompt, sampling_params(request, end_of_text))
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
