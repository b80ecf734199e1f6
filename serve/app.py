"""`serve run serve.app:build run_dir=runs/quickstart`: the arguments, and how the deployments hang together."""

# No `from __future__ import annotations` here: `serve run` makes the arguments of the class that it finds in the annotation.
from typing import Any

from ray.serve import Application

from cbtm_ray import files
from cbtm_ray.merge.ensemble import served_route, tuned_routes

from .arguments import AppArguments
from .gateway import Gateway
from .placement import spread
from .registry import ExpertRegistry
from .replica import ExpertGroup

UNLIMITED = 10_000  # requests in an expert group: the gateways limit what they send
ONE_LOOP = {
    "env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
}
"""For replicas: Serve's own tasks, its router and our code in one event loop, not in three that wake each other for a message.
Nothing of ours holds a loop up for long: engines and the reading of prompts have threads of their own."""


def build(arguments: AppArguments) -> Application:
    """The application for `serve run` and `serve deploy`.

    Raises:
        UserError: the run is not finished, or cannot be served by that routing.
    """
    served = served_route(arguments.run_dir)
    routing = arguments.routing or served.routing
    tuned_routes(arguments.run_dir, routing)
    arguments = arguments.model_copy(update={"run_dir": files.absolute(arguments.run_dir), "routing": routing})
    drain: dict[str, Any] = {"graceful_shutdown_timeout_s": arguments.drain_s}
    classes: tuple[Any, Any, Any] = ExpertRegistry, ExpertGroup, Gateway
    roster_class, group_class, gateway_class = classes
    registry = roster_class.bind()
    layout = spread(
        len(files.read_array(files.join(arguments.run_dir, "clusterer", "centers.npy"))), arguments.experts_per_group
    )
    scaling = {} if arguments.autoscaling is None else {"autoscaling_config": arguments.autoscaling}
    groups = [
        group_class.options(
            name=name,
            max_ongoing_requests=UNLIMITED,
            ray_actor_options={
                "num_cpus": arguments.group_cpus,
                "num_gpus": arguments.group_gpus,
                "runtime_env": ONE_LOOP,
            },
            **drain,
            **scaling,
        ).bind(
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
    # Beyond its own limit a gateway refuses politely; Serve, which knows no format, only far beyond.
    requests = 2 * arguments.max_in_flight
    options = {
        "max_ongoing_requests": requests,
        "max_queued_requests": requests,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": ONE_LOOP},
        **drain,
    }
    return gateway_class.options(**options).bind(arguments, layout, groups, registry)
