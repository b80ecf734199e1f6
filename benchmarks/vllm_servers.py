"""Servers of the environment .venv-vllm: stock vLLM with one model, and the endpoint with engine=vllm."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv-vllm" / "bin"
START_S = 900.0
"""The longest that engines may take to start, one beside the other."""


@contextlib.contextmanager
def stock_vllm(folder: str, port: int, *, max_sequences: int, cache_bytes: int) -> Iterator[str]:
    """vLLM's own server with the model of a folder; the address of its completions."""
    command = [
        BIN / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "expert",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", str(max_sequences),
        "--kv-cache-memory-bytes", str(cache_bytes), "--block-size", "32", "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    with _running(
        [str(part) for part in command], {"VLLM_LOGGING_LEVEL": "WARNING"}, f"http://127.0.0.1:{port}/health"
    ):
        yield f"http://127.0.0.1:{port}/v1/completions"


@contextlib.contextmanager
def our_vllm(run_dir: str, port: int, **arguments: Any) -> Iterator[str]:
    """The endpoint with engine=vllm on a Ray of its own, by `serve run`; the address of its completions."""
    args = {"run_dir": run_dir, "engine": "vllm", "drain_s": 5.0, **arguments}
    app = {"name": "cbtm", "import_path": "serve.app:build", "route_prefix": "/", "args": args}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
        env = {"RAY_ADDRESS": "local", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_SERVE_PROXY_USE_GRPC": "1"}
        url = f"http://127.0.0.1:{port}"
        with _running([str(BIN / "serve"), "run", str(path)], env, f"{url}/healthz"):
            yield f"{url}/v1/completions"


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str], health: str) -> Iterator[None]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + START_S
        try:
            while not _is_up(health):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read()[-4000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(120)


def _is_up(health: str) -> bool:
    try:
        return httpx.get(health, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
