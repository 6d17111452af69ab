"""The routes of the API: OpenAI's under /v1, Soli's own under /soli."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import Response

from soli.analysis.parameters import count
from soli.experts.paged import PagedExperts
from soli.model.moe import RoutedExperts
from soli.serve import protocol_responses as protocol
from soli.serve.answering import respond
from soli.serve.chat_prompts import chat_batch
from soli.serve.errors import ApiError
from soli.serve.middleware import StrictRoute
from soli.serve.prompts import can_translate, completion_batch, translation_batch
from soli.serve.protocol_requests import ChatBody, CompletionBody, TranslateBody
from soli.serve.responses import CHAT, COMPLETION, TRANSLATION, AnswerFormat
from soli.serve.service import LoadedModel, Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
}


def openai_router(service: Service) -> APIRouter:
    """Models, completions, chat completions."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/models", response_model_exclude_unset=True)
    def models(
        anthropic_version: Annotated[str | None, Header()] = None,
    ) -> protocol.ModelList | protocol.AnthropicModelList:
        if anthropic_version is not None:  # the header of that API's clients
            return anthropic_models(service)
        return protocol.ModelList(object="list", data=[model_card(service, name) for name in service.names])

    @routes.get("/models/{name:path}", response_model_exclude_unset=True)
    def model(
        name: Annotated[str, Path(min_length=1)], anthropic_version: Annotated[str | None, Header()] = None
    ) -> protocol.ModelCard | protocol.AnthropicModel:
        service.check_model(name)
        return model_card(service, name) if anthropic_version is None else anthropic_model(service, name)

    @routes.post("/completions", response_model=None, responses=described(COMPLETION))
    async def completions(body: CompletionBody, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(service, request, body, completion_batch, COMPLETION, body.stream)

    @routes.post("/chat/completions", response_model=None, responses=described(CHAT))
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(service, request, body, chat_batch, CHAT, body.stream)

    return routes


def soli_router(service: Service) -> APIRouter:
    """What the model is, what an expert was selected for, and translation."""
    routes = APIRouter(prefix="/soli", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/model", response_model_exclude_unset=True)
    def model() -> protocol.ModelDescription:
        return describe(service.name, service.loaded)

    @routes.get("/experts")
    def experts() -> protocol.ExpertTiers:
        return expert_tiers(service.loaded)

    @routes.get("/experts/{layer}/{expert}", response_model_exclude_unset=True)
    def expert(
        layer: Annotated[int, Path(ge=0, le=10**6)],
        expert: Annotated[int, Path(ge=0, le=10**6)],
        limit: Annotated[int, Query(ge=1, le=32, deprecated=True, description="Without effect.")] = 12,
    ) -> protocol.ExpertReport:
        description = model()
        name = f"layers.{layer}"
        if name not in description.layers or expert >= description.experts:
            raise ApiError(404, f"there is no expert {expert} in layer {layer}: see /soli/model", "expert")
        report = service.expert_statistics.report(name, expert)
        paged = paged_layers(service.loaded)
        if name in paged:
            report.tier = paged[name].tiers[expert]
        return report

    @routes.post("/translate", response_model=None, responses=described(TRANSLATION))
    async def translate(body: TranslateBody, request: Request) -> Response:
        return await respond(service, request, body, translation_batch, TRANSLATION, body.stream)

    return routes


def model_card(service: Service, name: str) -> protocol.ModelCard:
    """One of the model's names."""
    card = protocol.ModelCard(id=name, object="model", created=service.created, owned_by="soli")
    if service.context_length is not None:
        card.max_model_len = service.context_length
    return card


def anthropic_model(service: Service, name: str) -> protocol.AnthropicModel:
    """The same in Anthropic's shape."""
    created = datetime.fromtimestamp(service.created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    card = protocol.AnthropicModel(type="model", id=name, display_name=name, created_at=created, lifecycle="active")
    if service.context_length is not None:
        card.max_input_tokens = service.context_length
    return card


def anthropic_models(service: Service) -> protocol.AnthropicModelList:
    """All names, on one page."""
    first, *_, last = service.names * 2
    models = [anthropic_model(service, name) for name in service.names]
    return protocol.AnthropicModelList(data=models, has_more=False, first_id=first, last_id=last)


def described(answer_format: AnswerFormat) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route that answers with a whole response, or with a stream of its chunks."""
    return {200: {"model": answer_format.response, "content": {"text/event-stream": {}}}}


def describe(name: str, loaded: LoadedModel) -> protocol.ModelDescription:
    """The model's sizes, and what it can do."""
    config = loaded.text_model.model.config
    parameters = count(config)
    moe_layers = list(loaded.text_model.model.moe_layers())
    layers = [layer for layer, _ in moe_layers if layer.startswith("layers.")]
    router = moe_layers[0][1].gate if moe_layers else None
    supported: dict[protocol.ModelMode, bool] = {
        "chat": loaded.template is not None,
        "translate": can_translate(loaded),
        "complete": True,
    }
    description = protocol.ModelDescription(
        name=name,
        layers=layers,
        experts=config.n_routed_experts if layers else 0,
        chosen=config.num_experts_per_tok if layers else 0,
        groups=router.G if router else 1,
        kept_groups=router.kept_groups if router else 1,
        total=parameters.total,
        activated=parameters.activated,
        modes=[mode for mode, is_supported in supported.items() if is_supported],
        context=loaded.text_model.positions,
    )
    for paged in paged_layers(loaded).values():
        description.paged = protocol.PagedModel(capacity=paged.capacity)
    return description


def paged_layers(loaded: LoadedModel) -> dict[str, PagedExperts]:
    """The layers of the main model whose experts are read from disk as they are needed, by name."""
    return {
        name: moe.experts.quantized
        for name, moe in loaded.text_model.model.moe_layers()
        if name.startswith("layers.")
        and isinstance(moe.experts, RoutedExperts)
        and isinstance(moe.experts.quantized, PagedExperts)
    }


def expert_tiers(loaded: LoadedModel) -> protocol.ExpertTiers:
    """Where the experts of the main model are now."""
    paged = paged_layers(loaded)
    layers = []
    for name, moe in loaded.text_model.model.moe_layers():
        if name.startswith("layers."):
            tiers = paged[name].tiers if name in paged else ["memory"] * moe.gate.weight.shape[0]
            memory, reading = ([e for e, now in enumerate(tiers) if now == tier] for tier in ("memory", "reading"))
            layers.append(protocol.LayerTiers(layer=name, memory=memory, reading=reading))
    return protocol.ExpertTiers(layers=layers)
