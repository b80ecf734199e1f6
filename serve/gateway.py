"""The HTTP side: who may ask what, which sequences that is, and the answer in OpenAI's format."""

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import metrics
from starlette.exceptions import HTTPException

from cbtm_ray.decode import sequence
from cbtm_ray.decode.engine import check_room
from cbtm_ray.decode.one_expert import unlike_one_expert
from cbtm_ray.errors import UserError
from cbtm_ray.merge.ensemble import describe_clusters, ensemble_of_one, load_ensemble
from cbtm_ray.merge.scores import check_top_k

from .answer import choice_pieces, decode, events, merged, sequence_request, total
from .arguments import AppArguments
from .expert_engines import ExpertEngines
from .limits import BodyLimits, Refused, among, bearer_of, out_of_bounds, read_tokens, refusal
from .placement import DENSE_MODEL, ENSEMBLE, Layout, Placement
from .prompts import PromptReader
from .protocol import ChatRequest, CompletionRequest, Error, ExpertState, Piece, choice_of

REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, 503: {"model": Error}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
web = FastAPI(title="cbtm-ray", version="1", docs_url=None, redoc_url=None, openapi_url=None, responses=REFUSALS)
web.add_middleware(BodyLimits)

PLAYGROUND = Path(__file__).with_name("playground.html")
PLAYGROUND_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@web.exception_handler(HTTPException)
@web.exception_handler(RequestValidationError)
@web.exception_handler(UserError)
@web.exception_handler(Exception)
async def refuse(_: Request, problem: Exception) -> Response:
    """An exception that nobody foresaw is raised again by Starlette when this is sent, so that Serve logs it."""
    return refusal(problem).response()


async def client(http: Request) -> None:
    """A dependency, because FastAPI validates a body only after it, so that a stranger learns nothing of the fields."""
    gateway: Any = serve.get_replica_context().servable_object
    gateway.admit(http)


async def administrator(http: Request) -> None:
    gateway: Any = serve.get_replica_context().servable_object
    gateway.admit_admin(http)


CLIENT = [Depends(client)]
ADMINISTRATOR = [Depends(administrator), Depends(HTTPBearer(scheme_name="bearer", auto_error=False))]


def _metrics() -> dict[str, Any]:
    """What Prometheus finds on the node's metrics port, beside Serve's own counts and latencies of requests."""
    bounds = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
    return {
        "ttft": metrics.Histogram("cbtm_ttft_s", "Seconds from a request to its first piece.", bounds),
        "in_flight": metrics.Gauge("cbtm_in_flight_sequences", "Sequences that the gateway has taken on."),
    }


@serve.deployment
@serve.ingress(web)
class Gateway:
    """Validates requests, sends their sequences to the expert group, and makes answers of what comes back."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        arguments: AppArguments,
        layout: Layout,
        groups: list[DeploymentHandle],
        registry: DeploymentHandle,
        engines: dict[str, list[DeploymentHandle]],
    ) -> None:
        self.arguments, self.registry = arguments, registry
        self.client_tokens = read_tokens(arguments.client_tokens, "client_tokens")
        self.admin_tokens = read_tokens(arguments.admin_tokens, "admin_tokens")
        ensemble, self.tokenizer = load_ensemble(arguments.run_dir, [], routing=arguments.routing)
        self.placement = Placement(layout, groups, registry, ensemble) if groups else None
        self.engines, self.reporting = None, None
        if engines:
            alone = ensemble_of_one(ensemble, {}, ensemble.model_config)
            self.engines = ExpertEngines(engines, ensemble, alone, registry)
            await self.engines.refresh()
            self.reporting = asyncio.create_task(self.engines.report_for_ever())
        self.top_k = arguments.top_k or (1 if engines else ensemble.served_top_k)
        self.sizes = {ENSEMBLE: list(ensemble.routes), DENSE_MODEL: [1]}
        self.experts = {ENSEMBLE: ensemble.n_experts, **({DENSE_MODEL: 1} if arguments.dense else {})}
        self.ensemble, self.max_length = ensemble, min(ensemble.max_length - bool(engines), arguments.cache_tokens)
        self.prompts = PromptReader(self.tokenizer, arguments.max_prompt_tokens)
        self.clusters = describe_clusters(arguments.run_dir)
        self.started, self.in_flight, self.measured = int(time.time()), 0, _metrics()

    async def check_health(self) -> None:
        """Serve's health check: without its reports this gateway would route to experts that are out of service."""
        if self.reporting is not None and self.reporting.done():
            raise RuntimeError("the gateway's reports have failed") from self.reporting.exception()

    @web.get("/healthz", openapi_extra={"security": []})
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @web.get("/", include_in_schema=False)
    async def playground(self) -> HTMLResponse:
        page = PLAYGROUND.read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": PLAYGROUND_POLICY})

    @web.get("/openapi.json", include_in_schema=False, dependencies=CLIENT)
    async def openapi(self, http: Request) -> dict[str, Any]:
        """FastAPI's document, with what it cannot know: the models served here, and whether clients need a token."""
        page = copy.deepcopy(http.app.openapi())
        for request in (CompletionRequest, ChatRequest):
            page["components"]["schemas"][request.__name__]["properties"]["model"]["enum"] = list(self.experts)
        return {**page, "security": [] if self.client_tokens is None else [{"bearer": []}]}

    @web.get("/v1/models", dependencies=CLIENT)
    async def models(self) -> dict[str, Any]:
        """The ensemble, and the dense control if it is served."""
        about = {"object": "model", "created": self.started, "owned_by": "cbtm-ray"}
        return {"object": "list", "data": [{"id": name, **about} for name in self.experts]}

    @web.get("/v1/experts", dependencies=CLIENT)
    async def list_experts(self) -> dict[str, Any]:
        """Every expert: its cluster, and what it has served since the endpoint was started; and how experts are mixed where
        a request does not say."""
        mixed = {"routing": self.arguments.routing, "top_k": self.top_k, "engine": self.arguments.engine}
        return {"object": "list", "data": await self._experts(), **mixed}

    @web.put("/v1/experts/{cluster}", dependencies=ADMINISTRATOR)
    async def set_expert(self, cluster: Annotated[int, InPath(ge=0)], state: ExpertState) -> dict[str, Any]:
        """Take an expert out of the ensemble, or back into it: answered when all groups know it."""
        n_experts = self.experts[ENSEMBLE]
        if cluster >= n_experts:
            raise Refused(404, f"There is no expert {cluster}; they are 0 to {n_experts - 1}.", code="not_found")
        changed = await self.registry.set_active.remote(cluster, state.active, n_experts)
        if changed is None:
            raise Refused(503, "No expert group has reported yet. Try again when one is up.", code="unavailable")
        if not changed:
            raise Refused(409, "The last expert cannot be taken out.", param="active", code="last_expert")
        return (await self._experts())[cluster]

    @web.post("/v1/completions", dependencies=CLIENT, responses=STREAM)
    async def completions(self, request: CompletionRequest) -> Response:
        """Continue prompts."""
        self._check(request, len(request.prompt))
        prompts = [await self.prompts.tokens(prompt) for prompt in request.prompt]
        return await self._answer(request, prompts, request.max_tokens)

    @web.post("/v1/chat/completions", dependencies=CLIENT, responses=STREAM)
    async def chat_completions(self, request: ChatRequest) -> Response:
        """Answer a chat."""
        self._check(request, 1)
        prompt = await self.prompts.chat_tokens(request)
        room = max(min(self.arguments.max_tokens, self.max_length - len(prompt)), 1)
        return await self._answer(request, [prompt], request.max_completion_tokens or request.max_tokens or room)

    def admit(self, http: Request) -> None:
        allowed = None if self.client_tokens is None else self.client_tokens + (self.admin_tokens or [])
        if allowed is not None and not among(bearer_of(http), allowed):
            raise Refused(401, "A valid bearer token is needed: Authorization: Bearer TOKEN.", code="invalid_api_key")

    def admit_admin(self, http: Request) -> None:
        if self.admin_tokens is None:
            raise Refused(403, "This server was started without admin_tokens.", code="forbidden")
        if not among(bearer_of(http), self.admin_tokens):
            raise Refused(401, "An administrator's bearer token is needed.", code="invalid_api_key")

    def _check(self, request: CompletionRequest | ChatRequest, n_prompts: int) -> None:
        if request.model not in self.experts:
            message = f"model={request.model[:80]!r} does not exist here. Use one of {', '.join(self.experts)}."
            raise Refused(404, message, param="model", code="model_not_found")
        if n_prompts * request.n > self.arguments.max_choices:
            most = self.arguments.max_choices
            raise out_of_bounds("n", f"n={request.n} for {n_prompts} prompts must be at most {most} choices together.")
        asked = [request.max_tokens, request.max_completion_tokens if isinstance(request, ChatRequest) else None]
        if max(tokens or 0 for tokens in asked) > self.arguments.max_tokens:
            raise out_of_bounds("max_tokens", f"max_tokens must be at most {self.arguments.max_tokens}.")

    async def _answer(
        self, request: CompletionRequest | ChatRequest, prompts: list[list[int]], max_tokens: int
    ) -> Response:
        """All choices, streamed or whole. Nothing is sent before the first piece, so that a refusal has its status."""
        arrived = time.perf_counter()
        sequences = self._sequences(request, prompts, max_tokens)
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0}
        parts = self._pieces(request, sequences, usage)
        first = await anext(parts)
        self.measured["ttft"].observe(time.perf_counter() - arrived)
        whole, part, prefix = request.KIND
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        if request.stream:
            stream = events(request, first, parts, {**head, "object": part}, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        choices = {first.index: first}
        async with aclosing(parts):
            async for piece in parts:
                choices[piece.index] = choices[piece.index] + piece if piece.index in choices else piece
        listed = [choice_of(choices[index], request, whole=True) for index in sorted(choices)]
        return JSONResponse({**head, "object": whole, "choices": listed, "usage": total(usage)})

    def _sequences(
        self, request: CompletionRequest | ChatRequest, prompts: list[list[int]], max_tokens: int
    ) -> list[sequence.Request]:
        """What the expert group is to decode: n sequences for each prompt."""
        sizes = self.sizes[request.model]
        top_k = request.cbtm.top_k or min(max(self.top_k, min(sizes)), max(sizes))
        check_top_k(top_k, sizes)
        seeds = [None if request.seed is None else request.seed + index for index in range(request.n)]
        found = [
            sequence_request(request, prompt, max_tokens=max_tokens, top_k=top_k, seed=seed)
            for prompt in prompts
            for seed in seeds
        ]
        for one in found:
            check_room(one, self.ensemble.max_length, self.arguments.cache_tokens)
            if self.placement is None and (reason := unlike_one_expert(one, self.ensemble.max_length)):
                raise UserError(f"{reason}, which engine=vllm does not do. Change it, or start with own_engine=true.")
        return found

    def _decode(
        self, request: CompletionRequest | ChatRequest, wanted: sequence.Request
    ) -> AsyncGenerator[list[sequence.Step]]:
        """By a vLLM engine, if there are any and one can; else by an expert group."""
        if self.engines is not None and unlike_one_expert(wanted, self.ensemble.max_length) is None:
            return self.engines.decode(request.model, wanted, streamed=request.stream)
        assert self.placement is not None, "the request was checked"
        return decode(self.placement, request.model, wanted)

    async def _pieces(
        self, request: CompletionRequest | ChatRequest, sequences: list[sequence.Request], usage: dict[str, int]
    ) -> AsyncGenerator[Piece]:
        """The pieces of all choices, while they have their places among those in flight."""
        if self.in_flight + len(sequences) > self.arguments.max_in_flight:
            raise Refused(503, "The server is busy. Try again later.", code="overloaded")
        self.in_flight += len(sequences)
        self.measured["in_flight"].set(self.in_flight)
        try:
            streams = [
                choice_pieces(index, one, request, self.tokenizer, self._decode(request, one), usage)
                for index, one in enumerate(sequences)
            ]
            async with aclosing(merged(streams)) as parts:
                async for piece in parts:
                    yield piece
        finally:
            self.in_flight -= len(sequences)
            self.measured["in_flight"].set(self.in_flight)

    async def _experts(self) -> list[dict[str, Any]]:
        requests, tokens, disabled = await self.registry.stats.remote()
        return [
            {**about, "requests": requests[k], "tokens": tokens[k], "state": "out" if k in disabled else "active"}
            for k, about in enumerate(self.clusters)
        ]
