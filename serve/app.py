"""`serve run serve.app:build run_dir=runs/quickstart`: the arguments, and how the deployments hang together."""

# No `from __future__ import annotations` here: `serve run` makes the arguments of the class that it finds in the annotation.
from typing import Any

from ray.serve import Application

from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.merge.ensemble import served_route, tuned_routes
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

from .arguments import AppArguments
from .gateway import Gateway
from .placement import DENSE_MODEL, ENSEMBLE, Layout, spread
from .registry import ExpertRegistry
from .replica import ExpertGroup
from .vllm_calls import VLLM_ENV
from .vllm_engine import VLLMEngine

UNLIMITED = 10_000  # requests in an expert group: the gateways limit what they send
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""For replicas: Serve's own tasks, its router and our code in one event loop, not in three that wake each other for a message.
Nothing of ours holds a loop up for long: engines and the reading of prompts have threads of their own."""
ADAPTERS = "export/adapters"
GPU_SHARE = 0.9
"""Of a GPU's memory, for the engines on it: vLLM's own share of a whole one."""


def build(arguments: AppArguments) -> Application:
    """The application for `serve run` and `serve deploy`.

    Raises:
        UserError: the run is not finished, or cannot be served by that routing or that engine.
    """
    served = served_route(arguments.run_dir)
    routing = arguments.routing or served.routing
    routes = tuned_routes(arguments.run_dir, routing)
    _check_engine(arguments, routing, min(routes))
    arguments = arguments.model_copy(update={"run_dir": files.absolute(arguments.run_dir), "routing": routing})
    n_experts = len(files.read_array(files.join(arguments.run_dir, "clusterer", "centers.npy")))
    layout = spread(n_experts, arguments.experts_per_group)
    classes: tuple[Any, Any] = ExpertRegistry, Gateway
    registry_class, gateway_class = classes
    registry = registry_class.bind()
    by_vllm = arguments.engine == "vllm"
    engines = _engines(arguments, n_experts) if by_vllm else {}
    groups = _groups(arguments, layout, registry) if not by_vllm or arguments.own_engine else []
    # Beyond its own limit a gateway refuses politely; Serve, which knows no format, only far beyond.
    requests = 2 * arguments.max_in_flight
    options = {
        "max_ongoing_requests": requests,
        "max_queued_requests": requests,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": ONE_LOOP}},
        "graceful_shutdown_timeout_s": arguments.drain_s,
    }
    return gateway_class.options(**options).bind(arguments, layout, groups, registry, engines)


def _check_engine(arguments: AppArguments, routing: str, least_top_k: int) -> None:
    """UserError if the vLLM engines cannot do what the other arguments want."""
    if arguments.engine == "own":
        for name in ("own_engine", "adapters", "vllm"):
            if getattr(arguments, name):
                raise UserError(f"{name}={getattr(arguments, name)} needs engine=vllm. Add that, or leave it out.")
        return
    if arguments.adapters and not files.exists(files.join(arguments.run_dir, ADAPTERS, "manifest.json")):
        raise UserError(
            f"adapters=True: run_dir={arguments.run_dir} has none. Run first: python -m jobs.extract_adapters"
        )
    if not arguments.own_engine and max(arguments.top_k or 1, least_top_k) > 1:
        problem = f"top_k={arguments.top_k}" if (arguments.top_k or 1) > 1 else f"routing={routing!r}"
        raise UserError(
            f"{problem} mixes experts, and engine=vllm decodes each text by one expert at a time. Leave it out, or set "
            "own_engine=true."
        )


def _groups(arguments: AppArguments, layout: Layout, registry: Any) -> list[Any]:
    """The deployments of the expert groups, which mix."""
    group_class: Any = ExpertGroup
    return [
        group_class.options(name=name, **_replica_options(arguments, ONE_LOOP)).bind(
            arguments.run_dir,
            layout,
            index,
            routing=arguments.routing,
            dense=arguments.dense,
            max_sequences=arguments.max_sequences,
            cache_tokens=arguments.cache_tokens,
            resident_experts=arguments.resident_experts,
            registry=registry,
        )
        for index, name in enumerate(layout.names)
    ]


def _engines(arguments: AppArguments, n_experts: int) -> dict[str, list[Any]]:
    """The deployments of the vLLM engines, by model and expert: one an expert or one for all, and one of the dense control."""
    engine_class: Any = VLLMEngine
    vllm, gpus = dict(arguments.vllm), arguments.group_gpus
    if 0 < gpus < 1:
        vllm.setdefault("gpu_memory_utilization", GPU_SHARE * gpus)
    end_of_text = load_tokenizer(files.join(arguments.run_dir, "tokenizer")).eos_token_id

    def engine(name: str, folder: str, adapters: dict[int, str] | None = None) -> Any:
        return engine_class.options(name=name, **_replica_options(arguments, ONE_LOOP | VLLM_ENV)).bind(
            files.join(arguments.run_dir, folder),
            end_of_text,
            max_sequences=arguments.max_sequences,
            cache_tokens=arguments.cache_tokens,
            vllm=vllm,
            adapters=adapters,
        )

    if arguments.adapters:
        folders = {k: files.join(arguments.run_dir, ADAPTERS, f"cluster={k:04d}") for k in range(n_experts)}
        experts = [engine("Experts", "seed", folders)] * n_experts
    else:
        experts = [engine(f"Expert{cluster}", expert_folder(cluster)) for cluster in range(n_experts)]
    return {ENSEMBLE: experts} | ({DENSE_MODEL: [engine("Dense", DENSE_FOLDER)]} if arguments.dense else {})


def _replica_options(arguments: AppArguments, env_vars: dict[str, str]) -> dict[str, Any]:
    scaling = {} if arguments.autoscaling is None else {"autoscaling_config": arguments.autoscaling}
    return {
        "max_ongoing_requests": UNLIMITED,
        "graceful_shutdown_timeout_s": arguments.drain_s,
        "ray_actor_options": {
            "num_cpus": arguments.group_cpus,
            "num_gpus": arguments.group_gpus,
            "runtime_env": {"env_vars": env_vars},
        },
        **scaling,
    }
