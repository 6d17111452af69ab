"""`soli serve [MODEL]`: an OpenAI-compatible server, and the page that shows the routing live."""

import os
from typing import Annotated, Literal

import typer

from soli.cli._shared import options
from soli.cli._shared.ranks import join_first_rank, started_ranks
from soli.errors import SoliError

MIB = 2**20


def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")] = "nano",
    host: Annotated[str, typer.Option(help="The address to listen on; beyond this machine only with a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(help="What the model is called, by default as its folder; several are aliases.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Require this key; better set as SOLI_API_KEY, which other users cannot see.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host name that requests may use, beside localhost; * for any.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call (CORS), as https://example.org.")
    ] = None,
    cache_mib: Annotated[int, typer.Option(min=1, help="The most memory for the latent cache.")] = 1024,
    running: Annotated[int, typer.Option(min=1, max=1024, help="Requests answered at the same time.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 256,
    tokens_per_step: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass of the model.")] = 512,
    speculate: options.Speculate = False,
    body_mib: Annotated[float, typer.Option(min=0.001, help="The largest body accepted.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The longest prompt accepted.")] = 2**20,
    choices: Annotated[int, typer.Option(min=1, help="The most answers to one request (n).")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long an answer may take.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="After SIGTERM, how long answers may continue.")] = 30.0,
    chat_template: options.ChatTemplate = None,
    tool_parser: options.ToolParser = None,
    reasoning_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="none leaves <think> reasoning </think> in the content of answers; names of other servers "
            "(deepseek_r1, kimi_k2, glm45) are as auto.",
        ),
    ] = "auto",
    generation_config: Annotated[
        Literal["auto", "none", "vllm"],
        typer.Option(help="none (vLLM's name: vllm): without the sampling defaults of generation_config.json."),
    ] = "auto",
    open_page: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open",
            help="Open the page in a browser; by default from a terminal on a machine with a screen.",
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="What the log has: info is a line per answer, debug also the page's files and probes."),
    ] = "info",
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    forget: options.Forget = False,
    threads: options.Threads = None,
    processes: options.Processes = None,
) -> None:
    """Serve a model on this machine. The page is at http://127.0.0.1:8000/, the API at /v1."""
    join_first_rank(model, device, dtype, speculate, memory, threads)
    from soli.chat.parsers.families import family_by_name, splits_reasoning
    from soli.checkpoint import open_checkpoint
    from soli.engine.request import EngineLimits
    from soli.hub.cache import display_name
    from soli.serve.middleware import LOOPBACK, AccessRules
    from soli.serve.server import ChatSettings, on_desktop, run_server
    from soli.serve.service import ServiceLimits

    key = api_key or os.environ.get("SOLI_API_KEY") or None
    if host not in LOOPBACK and key is None:
        raise SoliError(
            f"listening on {host} admits other machines: set SOLI_API_KEY to a key of your own, or use 127.0.0.1"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise SoliError("the API key may have only printable ASCII characters, without spaces: choose another")
    if name and not all(name):
        raise SoliError("--name is empty: give the model a name, or leave it out")
    if tool_parser is not None:
        family_by_name(tool_parser)
    if started_ranks(ctx, model, processes):
        return
    folder = open_checkpoint(model).folder
    options.use_threads(threads)
    options.forget_usage(model, forget)
    hosts = (*LOOPBACK, host, *(allow_host or ()))
    run_server(
        model,
        name or [display_name(model, folder)],
        host,
        port,
        engine=EngineLimits(
            cache_bytes=cache_mib * MIB,
            max_running=running,
            max_waiting=waiting,
            tokens_per_step=tokens_per_step,
            speculate=speculate,
        ),
        service=ServiceLimits(prompt_tokens, choices, seconds),
        rules=AccessRules(hosts, key, int(body_mib * MIB), origins=tuple(allow_origin or ())),
        drain_seconds=drain_seconds,
        device=device,
        dtype=dtype,
        memory=options.memory_bytes(memory),
        chat=ChatSettings(
            template=chat_template,
            tool_parser=tool_parser,
            reasoning=splits_reasoning(reasoning_parser),
            generation_config=generation_config == "auto",
        ),
        open_page=(host in LOOPBACK and on_desktop()) if open_page is None else open_page,
        log_level=log_level,
    )
