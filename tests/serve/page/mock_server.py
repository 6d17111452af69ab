"""A stand-in for `soli serve` with the standard library alone: the page's own files, and streams replayed from traces.

The recorded traces are outputs of an earlier bundled model with the field names of Soli 0.1, which the page still
reads; any would do. Another is recorded by `soli translate "TEXT" --experts --json` and
`soli generate nano "The river" --experts --json`. The large one is synthetic (giant.py). Every request is recorded in
`requests`, so that a test can check what the page sent, and that it sent nothing elsewhere.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from soli.serve.app import page_files

RECORDINGS = Path(__file__).parent / "recordings"
# The page starts with other sentences than the recorded ones, which have more instructive routes.
RECORDED_EXAMPLES = """
export const EXAMPLES = {
  translate: ['You can use this knife to cut wood.', '你可以用这把刀切木头。'],
  complete: ['The river'], chat: ['What is an expert?'],
};
export const SECOND = { translate: '你可以用这把刀切木头。', complete: 'The city', chat: 'What is a layer?' };
"""
NANO = {
    "name": "nano",
    "layers": [f"layers.{n}" for n in range(1, 5)],
    "experts": 32,
    "chosen": 4,
    "groups": 4,
    "kept_groups": 2,
    "total": 18_000_000,
    "activated": 7_000_000,
    "modes": ["translate", "complete"],
    "context": 512,
}


@dataclass
class Piece:
    """What the model reads and writes for one text: the tokens as the API sends them."""

    text: str
    tokens: list[dict[str, Any]]
    reasoning: str = ""  # before the answer


def recorded() -> list[Piece]:
    """The recordings, by their prompt."""
    recordings = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDINGS.glob("*.json"))]
    return [Piece(trace.get("source") or trace["prompt"], trace["experts"]) for trace in recordings]


def paged(piece: Piece) -> Piece:
    """The same of a model that reads experts from disk: by its number, an expert was on disk, being read, or in
    memory when it was needed."""
    prompt_tokens = sum(token["part"] == "prompt" for token in piece.tokens)

    def layer_with_tiers(layer: dict[str, Any], pass_tokens: int) -> dict[str, Any]:
        name = name_in(layer, "selected")
        selected = [one | {"tier": ("disk", "reading", "memory")[min(2, one["expert"] % 5)]} for one in layer[name]]
        misses = sum(one["tier"] != "memory" for one in selected)
        cost = {"waited_ms": 1.2 * misses, "bytes_read": 600_000 * misses, "pass_tokens": pass_tokens}
        return layer | {name: selected} | cost

    tokens = []
    for token in piece.tokens:
        pass_tokens = prompt_tokens if token["part"] == "prompt" else 1
        tokens.append(token | {"layers": [layer_with_tiers(layer, pass_tokens) for layer in token["layers"]]})
    return Piece(piece.text, tokens, piece.reasoning)


@dataclass
class MockServer:
    """Serves on a free loopback port while used as a context. `pace`: seconds between the tokens of an answer."""

    model: dict[str, Any] = field(default_factory=lambda: NANO)
    pieces: list[Piece] = field(default_factory=recorded)
    key: str | None = None
    loading: int = 0  # how many requests for the model fail before it is loaded
    pace: float = 0.0
    fail_after: int | None = None  # answer tokens after which a stream breaks off with an error
    break_after: int | None = None  # answer tokens after which the connection breaks
    stall: float = 0.0  # seconds before the first event of a stream, and before /health answers
    gone: bool = False  # every connection is closed without an answer
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    dropped: int = 0  # streams that the page closed early

    def __enter__(self) -> "MockServer":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"mock": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path, in order."""
        return [body for _, request_path, body in self.requests if request_path == path]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        text = body.get("text") or body.get("prompt") or body["messages"][-1]["content"]
        piece = next((piece for piece in self.pieces if piece.text == text), self.pieces[0])
        time.sleep(self.stall)
        tokens = [without_masked(token, body["soli"]["masked_experts"]) for token in piece.tokens]
        prompt = [token for token in tokens if token["part"] == "prompt"]
        answer = [token for token in tokens if token["part"] == "answer"]
        yield json.dumps({"choices": [_choice(path, "")], "soli": {"tokens": prompt}})
        if piece.reasoning:
            yield json.dumps({"choices": [{"index": 0, "delta": {"reasoning_content": piece.reasoning}}]})
        for number, token in enumerate(answer):
            if number == self.break_after:
                raise ConnectionResetError
            if number == self.fail_after:
                yield json.dumps({"error": {"message": "the step failed"}})
                return
            time.sleep(self.pace)
            yield json.dumps({"choices": [_choice(path, token["text"])], "soli": {"tokens": [token]}})
        yield "[DONE]"

    def turn_paged(self, capacity: int = 40) -> None:
        """Serve as if the model were larger than memory."""
        self.model = self.model | {"paged": {"capacity": capacity}}
        self.pieces = [paged(piece) for piece in self.pieces]

    def tiers(self) -> dict[str, Any]:
        """Of each layer the experts 2, 5, 8, ... are in memory, and expert 1 is being read."""
        experts = [*range(2, self.model["experts"], 3)]
        return {"layers": [{"layer": name, "memory": experts, "reading": [1]} for name in self.model["layers"]]}

    def expert(self, layer: int, expert: int) -> dict[str, Any]:
        name = f"layers.{layer}"
        tokens: list[str] = []
        tokens_read = sum(len(piece.tokens) for piece in self.pieces)
        for piece in self.pieces:
            for token in piece.tokens:
                layer_trace = next(trace for trace in token["layers"] if trace["layer"] == name)
                players = layer_trace[name_in(layer_trace, "selected")]
                tokens += [token["text"] for player in players if player["expert"] == expert]
        kinds = dict.fromkeys(("chinese", "english", "digits", "punctuation", "other"), 0)
        for token_text in tokens:
            kinds[_kind(token_text)] += 1
        tier = {"tier": "memory" if expert % 3 == 2 else "disk"} if "paged" in self.model else {}
        return tier | {
            "layer": name,
            "expert": expert,
            "selected": len(tokens),
            "tokens_read": tokens_read,
            "tokens": [],
            "kinds": kinds,
        }


def without_masked(token: dict[str, Any], pairs: list[list[int]]) -> dict[str, Any]:
    """The token with the pairs (layer number, expert) masked: the runner-up takes the place."""
    masked = {(f"layers.{layer}", expert) for layer, expert in pairs}
    return token | {"layers": [_layer_without(layer, masked) for layer in token["layers"]]}


def name_in(layer: dict[str, Any], name: str) -> str:
    """The name of a field in this trace of a layer: today's, or that of Soli 0.1 in recordings."""
    return name if name in layer else {"selected": "players", "runner_ups": "near_misses"}[name]


def _layer_without(layer: dict[str, Any], masked: set[tuple[str, int]]) -> dict[str, Any]:
    selected_name, runner_ups_name = name_in(layer, "selected"), name_in(layer, "runner_ups")
    selected, runner_ups = layer[selected_name], layer[runner_ups_name]
    remaining = [expert for expert in selected if (layer["layer"], expert["expert"]) not in masked]
    masked_count = len(selected) - len(remaining)
    if not masked_count:
        return layer
    promoted = [
        {name: runner_up[name] for name in ("expert", "affinity", "biased")} | {"weight": 0.4}
        for runner_up in runner_ups[:masked_count]
    ]
    return layer | {selected_name: remaining + promoted, runner_ups_name: runner_ups[masked_count:]}


def _choice(path: str, text: str) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": text}} if "chat" in path else {"index": 0, "text": text}


def _kind(text: str) -> str:
    text = text.strip()
    if any("\u4e00" <= character <= "\u9fff" for character in text):
        return "chinese"
    if text.isdigit():
        return "digits"
    if text.isascii() and text.isalpha():
        return "english"
    return "punctuation" if text and not any(character.isalnum() for character in text) else "other"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A browser that disconnects is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    mock: MockServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self._is_gone():
            return
        self.mock.requests.append(("GET", self.path, None))
        file = page_files().get(path)
        if file is not None:
            content = RECORDED_EXAMPLES.encode() if path == "/static/examples.js" else file.content
            self._send(200, content, file.headers)
        elif path == "/health":
            time.sleep(self.mock.stall)
            self._json(503 if self.mock.loading else 200, {"status": "loading" if self.mock.loading else "ready"})
        elif not self._allowed():
            self._json(401, {"error": {"message": "an API key is required"}})
        elif self.mock.loading > 0:
            self.mock.loading -= 1
            self._json(503, {"error": {"message": "the model is still being loaded"}})
        elif path == "/soli/model":
            self._json(200, self.mock.model)
        elif path == "/soli/experts":
            self._json(200, self.mock.tiers())
        elif path.startswith("/soli/experts/"):
            self._json(200, self.mock.expert(*map(int, path.split("/")[3:5])))
        else:
            self._json(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_gone():
            return
        self.mock.requests.append(("POST", self.path, body))
        if not self._allowed():
            self._json(401, {"error": {"message": "an API key is required"}})
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for data in self.mock.stream(self.path, body):
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.mock.dropped += 1

    def _is_gone(self) -> bool:
        self.close_connection = self.close_connection or self.mock.gone
        return self.mock.gone

    def _allowed(self) -> bool:
        return self.mock.key is None or self.headers.get("Authorization") == f"Bearer {self.mock.key}"

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
