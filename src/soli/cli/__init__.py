"""The command line: `soli VERB ...`, one file per verb, imported only when that verb runs.

A verb is the function of that name in `soli/cli/VERB.py` (or, where it has verbs of its own, a Typer called `app`).
What a user can cause is a SoliError: one sentence on stderr and exit status 1; wrong usage exits with 2, an interrupt
with 130. SOLI_DEBUG=1 shows the traceback of any error.
"""

import errno
import importlib
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from soli import __version__
from soli.errors import SoliError
from soli.parallel import GRACE

VERBS = {
    "count": "Count parameters, bytes, cache and FLOPs of a model, or of a what-if.",
    "plan": "What a model takes, whether it runs here, and how fast, before it is downloaded.",
    "translate": "Translate between English and Chinese with the bundled model.",
    "generate": "Continue a prompt with the model in a folder.",
    "chat": "Talk with a chat-tuned model in the terminal.",
    "serve": "Serve a model: an OpenAI-compatible API, and a page that shows which experts are selected.",
    "routing": "Report which experts a text file selects, and which language they prefer.",
    "experts": "Record which experts tokens choose, and compare what a cache of them would bring.",
    "train": "Train a model from a recipe; a stopped run resumes.",
    "pull": "Download a model of the Hugging Face hub into its cache.",
    "models": "List downloaded models and remove them.",
    "runs": "List training runs and compare them.",
    "data": "Build a recipe's corpus, pack your own texts, inspect either.",
    "eval": "Score a model on held-out pairs and text.",
    "bench": "Measure a server under load: throughput and latency over arrival rates.",
    "convert": "Rewrite a model folder as bf16 or fp8.",
    "doctor": "Show what this machine has, its kernels, and how fast memory and disk are.",
    "export": "Make a model folder out of a training run.",
}


WRONG_USAGE = 2
# In the errors of torch, of CUDA, of mmap, of threads and of the dynamic linker.
NO_MEMORY = re.compile(
    r"can('t|not) allocate memory|out of memory|can't start new thread|failed to map segment", re.IGNORECASE
)


class Verbs(TyperGroup):
    """The verbs of VERBS. Help reads the table alone; a verb's module is imported when the verb is invoked."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {verb: TyperCommand(verb, short_help=line) for verb, line in VERBS.items()}

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        arguments = [*args]  # parsing empties the list
        ctx = super().make_context(info_name, args, parent, **extra)
        ctx.meta["soli.arguments"] = arguments
        return ctx

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if _rank() in (None, "0"):
                print("soli: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


class Subverbs(TyperGroup):
    """Verbs of a verb; their help has the whole first sentence of each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, command.get_short_help_str(limit=1000)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def load(verb: str) -> Any:
    """The command behind a verb, its module imported."""
    module = importlib.import_module(f"soli.cli.{verb}")
    holder = typer.Typer(rich_markup_mode=None)
    holder.callback()(lambda: None)
    if hasattr(module, "app"):
        holder.add_typer(module.app, name=verb, help=VERBS[verb], cls=Subverbs)
    else:
        holder.command(verb)(getattr(module, verb))
    return typer.main.get_command(holder).commands[verb]  # type: ignore[attr-defined]


app = typer.Typer(
    cls=Verbs,
    name="soli",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"soli {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_print_version),
) -> None:
    """The DeepSeek-V3 system as one small package: count it, train it, run it, and see which experts it selects."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def _sentence(error: Exception) -> str:
    """The message of an error that left a verb, in one line of at most 1,000 characters."""
    message = "".join(map(_printable, " ".join(_reason(error).split())))
    return message if len(message) <= 1000 else f"{message[:600]} ... {message[-300:]}"


def _printable(character: str) -> str:
    """A character, or its escape where a terminal might act on it: names in files come from anybody."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _reason(error: Exception) -> str:
    if isinstance(error, SoliError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("soli"):
        package = error.name.partition(".")[0].replace("_", "-")
        return f"this needs the package {package}; install it with: pip install {package}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"standard output, or a file, cannot be written ({error.strerror}): check where it leads"
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        size = re.search(r"allocate (\d+) bytes", str(error))
        needed = f" for {int(size[1]):,} bytes" if size else ""
        return f"there is no memory left{needed}; soli doctor shows how much is available"
    return f"unexpected {type(error).__name__}: {error} (SOLI_DEBUG=1 shows where)"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A note of Soli in one line, without the place in its source; any other warning as Python writes it."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"soli: {message}\n"
    return _python_format(message, category, filename, lineno, line)


_python_format = warnings.formatwarning


def _rank() -> str | None:
    """Of this process among several that torchrun started."""
    return None if os.environ.get("WORLD_SIZE", "1") == "1" else os.environ.get("RANK")


def main(argv: list[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return its exit status."""
    warnings.formatwarning = _format_warning
    rank = _rank()
    shows_usage = rank in (None, "0")  # once for all ranks
    try:
        status = app(argv, prog_name="soli", standalone_mode=shows_usage)
        return status if isinstance(status, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if not shows_usage and "soli.parallel.ranks" not in sys.modules:
            # They are not connected yet: what all report, the first does before the agent ends the others.
            time.sleep(GRACE)
        if not shows_usage and getattr(error, "exit_code", None) == WRONG_USAGE:
            return WRONG_USAGE
        if os.environ.get("SOLI_DEBUG"):
            raise
        sentence = _sentence(error)
        if rank is not None and not sentence.startswith("rank "):
            sentence = f"rank {rank}: {sentence}"
        print(f"soli: {sentence}", file=sys.stderr)
        return 1
