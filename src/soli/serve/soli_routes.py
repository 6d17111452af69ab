"""Soli's own routes: what the model is, what an expert has played, and translation as the model in the box does it."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from soli.analysis.parameters import count
from soli.engine.request import Request as EngineRequest
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.eval.translation import translation_request
from soli.serve.answer_schema import TranslationAnswer, answers
from soli.serve.choices import CompletionChoice
from soli.serve.errors import ApiError
from soli.serve.openai_routes import ERRORS, respond
from soli.serve.prompts import PARAMS, Asked
from soli.serve.protocol import TranslateBody
from soli.serve.service import Loaded, Service
from soli.serve.strict import StrictRoute


def router(service: Service) -> APIRouter:
    """The routes under /soli."""
    routes = APIRouter(prefix="/soli", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/model")
    def model() -> dict[str, Any]:
        return describe(service.name, service.loaded)

    @routes.get("/experts/{layer}/{expert}")
    def expert(
        layer: Annotated[int, Path(ge=0, le=10**6)],
        expert: Annotated[int, Path(ge=0, le=10**6)],
        limit: Annotated[int, Query(ge=1, le=32)] = 12,
    ) -> dict[str, Any]:
        found = describe(service.name, service.loaded)
        name = f"layers.{layer}"
        if name not in found["layers"] or expert >= found["experts"]:
            raise ApiError(404, f"there is no expert {expert} in layer {layer}: see /soli/model", "expert")
        return service.experts.about(name, expert, limit)

    @routes.post("/translate", response_model=None, responses=answers(TranslationAnswer))
    async def translate(body: TranslateBody, request: Request) -> Response:
        loaded = service.loaded
        wanted = await asyncio.to_thread(_translation, body, loaded)
        asked = Asked((wanted,), 1, body.soli, {"prompt_ids": "text", **PARAMS}, usage_chunk=True)
        return await respond(
            service, request, asked, "soli.translation", lambda at: CompletionChoice(at, loaded.text_model), body.stream
        )

    return routes


def describe(name: str, loaded: Loaded) -> dict[str, Any]:
    """The model in figures, as GET /soli/model gives them."""
    config, text_model = loaded.text_model.model.config, loaded.text_model
    counted = count(config)
    layers = [layer for layer, _ in text_model.model.moe_layers() if layer.startswith("layers.")]
    gates = [moe.gate for _, moe in text_model.model.moe_layers()]
    modes = ["chat"] if loaded.template is not None else []
    if _translates(loaded):
        modes.append("translate")
    return {
        "name": name,
        "layers": layers,
        "experts": config.n_routed_experts if layers else 0,
        "chosen": config.num_experts_per_tok if layers else 0,
        "groups": gates[0].G if gates else 1,
        "kept_groups": gates[0].kept_groups if gates else 1,
        "total": counted.total,
        "activated": counted.activated,
        "modes": [*modes, "complete"],
        "context": text_model.positions,
    }


def _translates(loaded: Loaded) -> bool:
    return all(loaded.text_model.tokenizer.has_token(token) for token in ("<|en|>", "<|zh|>"))


def _translation(body: TranslateBody, loaded: Loaded) -> EngineRequest:
    if not _translates(loaded):
        raise ApiError(400, "this model was not trained to translate: use /v1/completions", "text")
    try:
        prompt, room = translation_request(loaded.text_model, body.text, body.to)
    except SoliError as error:
        raise ApiError(400, str(error), "text") from error
    return EngineRequest(
        prompt_ids=tuple(prompt),
        max_new_tokens=body.max_tokens or room,
        sampling=SamplingParams(body.temperature, seed=body.seed),
        stop_ids=loaded.text_model.stop_ids,
        trace=body.soli.routing != "none",
        masked_experts=frozenset((layer, expert) for layer, expert in body.soli.mute),
    )
