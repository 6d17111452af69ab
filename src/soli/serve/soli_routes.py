"""Soli's own routes: what the model is, what an expert was selected for, and translation."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from soli.analysis.parameters import count
from soli.serve.errors import ApiError
from soli.serve.middleware import StrictRoute
from soli.serve.openai_routes import ERRORS, described, respond
from soli.serve.prompts import can_translate, translation_batch
from soli.serve.protocol_requests import TranslateBody
from soli.serve.protocol_responses import ExpertReport, ModelDescription, ModelMode
from soli.serve.responses import TRANSLATION
from soli.serve.service import LoadedModel, Service


def router(service: Service) -> APIRouter:
    """The routes under /soli."""
    routes = APIRouter(prefix="/soli", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/model")
    def model() -> ModelDescription:
        return describe(service.name, service.loaded)

    @routes.get("/experts/{layer}/{expert}")
    def expert(
        layer: Annotated[int, Path(ge=0, le=10**6)],
        expert: Annotated[int, Path(ge=0, le=10**6)],
        limit: Annotated[int, Query(ge=1, le=32)] = 12,
    ) -> ExpertReport:
        description = describe(service.name, service.loaded)
        name = f"layers.{layer}"
        if name not in description.layers or expert >= description.experts:
            raise ApiError(404, f"there is no expert {expert} in layer {layer}: see /soli/model", "expert")
        return service.expert_statistics.report(name, expert, limit)

    @routes.post("/translate", response_model=None, responses=described(TRANSLATION))
    async def translate(body: TranslateBody, request: Request) -> Response:
        batch = await asyncio.to_thread(translation_batch, body, service.loaded)
        return await respond(service, request, batch, TRANSLATION, body.stream)

    return routes


def describe(name: str, loaded: LoadedModel) -> ModelDescription:
    """The model's sizes, and what it can do."""
    text_model = loaded.text_model
    config = text_model.model.config
    parameters = count(config)
    moe_layers = list(text_model.model.moe_layers())
    layers = [layer for layer, _ in moe_layers if layer.startswith("layers.")]
    router = moe_layers[0][1].gate if moe_layers else None
    return ModelDescription(
        name=name,
        layers=layers,
        experts=config.n_routed_experts if layers else 0,
        chosen=config.num_experts_per_tok if layers else 0,
        groups=router.G if router else 1,
        kept_groups=router.kept_groups if router else 1,
        total=parameters.total,
        activated=parameters.activated,
        modes=_modes(loaded),
        context=text_model.positions,
    )


def _modes(loaded: LoadedModel) -> list[ModelMode]:
    supported: dict[ModelMode, bool] = {
        "chat": loaded.template is not None,
        "translate": can_translate(loaded),
        "complete": True,
    }
    return [mode for mode, is_supported in supported.items() if is_supported]
