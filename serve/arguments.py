"""The arguments of the endpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class AppArguments(BaseModel):
    """Arguments of `serve run serve.app:build name=value`, and `args` in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    run_dir: str
    """A finished run directory, path or URI."""
    top_k: int | None = Field(default=None, ge=1)
    """Experts mixed for a token, where the request does not say; all, if there are fewer. None: as in the row that the run's
    evaluation marks as served."""
    dense: bool = True
    """Whether the dense control is loaded too, as the model "dense"."""
    engine: Literal["own", "vllm"] = "own"
    """vllm: every expert is a stock vLLM engine of its own, in deployments Expert0 and so on, and one expert at a time
    decodes a text. own: this project's engine, which mixes the experts' distributions."""
    own_engine: bool = False
    """With engine=vllm: whether expert groups run beside the engines, for requests that need a mixture or else more than vLLM
    does. Without them such requests are refused."""
    adapters: bool = False
    """With engine=vllm: one engine, Experts, holds the seed and all experts as LoRA adapters (`jobs.extract_adapters`), in the
    place of an engine for each expert. Texts are the adapters', which are not quite the experts."""
    vllm: dict[str, Any] = {}
    """vLLM's own engine arguments (`EngineArgs`), such as gpu_memory_utilization, quantization or tensor_parallel_size."""
    experts_per_group: int | None = Field(default=None, ge=1)
    """Experts of one deployment, ExpertGroup0 and so on; None: all, in the deployment ExpertGroup."""
    resident_experts: int | None = Field(default=None, ge=1)
    """Experts of a group that have their weights in memory at a time, those used last; None: all."""
    routing: str | None = None
    """How experts are weighted: a router that the run has evaluated (`evaluate.routings`) and that needs no expert's
    likelihood of the text. Every `top_k` has the settings that the evaluation tuned and reported for it. None: as in the row
    that the run's evaluation marks as served."""
    group_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray sets aside for a replica of a group, or of a vLLM engine."""
    group_gpus: float = Field(default=0.0, ge=0)
    """GPUs of a replica of a group or of a vLLM engine, fractions allowed. Above 0 its models and their caches are on the GPU.
    Of a fraction, vLLM takes that much of 0.9 of the GPU's memory, unless `vllm` says gpu_memory_utilization."""
    autoscaling: dict[str, Any] | None = None
    """Serve's AutoscalingConfig of every group or engine, each scaled by its own load; `min_replicas: 0` lets cold ones go.
    None: one replica each, or what `deployments` of a configuration say."""
    max_sequences: int = Field(default=32, ge=1)
    """Sequences that an expert group or a vLLM engine decodes at once; more wait."""
    cache_tokens: int = Field(default=32768, ge=1)
    """Tokens of all sequences that each expert has memory for: 2 x layers x hidden size x 4 bytes a token.
    A vLLM engine on a GPU measures its memory itself."""
    max_in_flight: int = Field(default=128, ge=1)
    """Sequences that a gateway has taken on, decoding or waiting; requests beyond are answered with 503."""
    max_choices: int = Field(default=64, ge=1)
    """Sequences of one request: its prompts times n."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Tokens of a prompt. With the answer it must fit the experts' positions too."""
    max_tokens: int = Field(default=2048, ge=1)
    """Tokens that a request may ask for."""
    max_body_bytes: int = Field(default=2**20, ge=1)
    """Bytes of a request's body."""
    client_tokens: str | None = None
    """Where the bearer tokens of clients are: file:PATH_OR_URI, one a line, or env:NAME, in the gateway's environment.
    None: whoever reaches the port may ask."""
    admin_tokens: str | None = None
    """The same for the calls that change the ensemble. None: nobody may."""
    drain_s: float = Field(default=300.0, gt=0)
    """How long a replica that is to go may work on at what it has begun. Set it above the longest answer."""
