"""Where experts are, through the API: in traces, per expert, and all at once; nothing of it for a model in memory."""

import httpx
import pytest

from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from soli.engine.text_model import TextModel, text_model
from soli.experts.load import load_paged_model
from soli.serve.app import create_app
from soli.serve.service import LoadedModel, Service
from tests.engine.tiny import tiny_tokenizer
from tests.experts.folders import E, K, mixture_folder, resident_model
from tests.kernels.weights import needs_kernels
from tests.serve.live import live

CAPACITY = 7
BODY = {"prompt": [5], "max_tokens": 6, "temperature": 0, "soli": {"routing": "full"}}


@pytest.fixture
def client_of():
    """A client of a server of a model."""
    engines = []

    def start(together: TextModel):
        engine = AsyncEngine(Engine(together, EngineLimits(cache_bytes=2**22)))
        service = Service("tiny", lambda: LoadedModel(together, engine, None))
        service.start()
        while not service.ready:
            assert service.failure is None, service.failure
        server = live(create_app(service))
        client = httpx.Client(base_url=server.__enter__(), timeout=60)
        engines.append((client, server, engine))
        return client

    yield start
    for client, server, engine in engines:
        client.close()
        server.__exit__(None, None, None)
        engine.close()


def traced_layers(client: httpx.Client) -> list[dict]:
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    return [layer for token in answer.json()["choices"][0]["soli"]["tokens"] for layer in token["layers"]]


@needs_kernels
def test_a_model_read_from_disk(client_of) -> None:
    model, store = load_paged_model(mixture_folder("int8"), CAPACITY, mtp=False, prefetch="off")
    client = client_of(text_model(model, tiny_tokenizer()))
    assert client.get("/soli/model").json()["paged"] == {"capacity": CAPACITY}
    before = client.get("/soli/experts").json()["layers"]
    assert [(layer["memory"], layer["reading"]) for layer in before] == [([], [])] * 3
    layers = traced_layers(client)
    misses = sum(expert["tier"] == "disk" for layer in layers for expert in layer["selected"])
    assert misses == store.stats.misses >= 3 * K
    assert sum(layer["bytes_read"] for layer in layers) == store.reader.stats.bytes
    assert all((layer["waited_ms"] > 0) == (layer["bytes_read"] > 0) for layer in layers)
    now = client.get("/soli/experts").json()["layers"]
    assert [layer["layer"] for layer in now] == ["layers.1", "layers.2", "layers.3"]
    assert sum(len(layer["memory"]) for layer in now) == CAPACITY
    tiers = [client.get(f"/soli/experts/3/{expert}").json()["tier"] for expert in range(E)]
    assert [expert for expert, tier in enumerate(tiers) if tier == "memory"] == now[2]["memory"]
    stream = client.post("/v1/completions", json=BODY | {"stream": True}).text
    assert '"tier": "' in stream and '"waited_ms": ' in stream
    store.close()


@needs_kernels
def test_a_model_in_memory(client_of) -> None:
    client = client_of(text_model(resident_model("int8", mtp=False), tiny_tokenizer()))
    assert "paged" not in client.get("/soli/model").json()
    every = [*range(E)]
    assert [layer["memory"] for layer in client.get("/soli/experts").json()["layers"]] == [every] * 3
    assert "tier" not in client.get("/soli/experts/1/0").json()
    layers = traced_layers(client)
    assert not any({"waited_ms", "bytes_read", "pass_tokens"} & layer.keys() for layer in layers)
    assert not any("tier" in expert for layer in layers for expert in layer["selected"])
