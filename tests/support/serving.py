"""Serve's end, so that the next module can start it again on the session's Ray."""

from __future__ import annotations

import time

import ray
from ray import serve


def stop_serve() -> None:
    """Also waits for the actors to be gone, for a new proxy would take the dying one's name for its own."""
    serve.shutdown()
    until = time.monotonic() + 120
    while any(actor["name"].startswith("SERVE_") for actor in ray.util.list_named_actors(all_namespaces=True)):
        assert time.monotonic() < until
        time.sleep(0.1)
