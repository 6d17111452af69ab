"""Every reader of Soli on damaged files: one sentence, at once and in little memory, or an ordinary answer.

Valid folders (model, sharded model, run, data, `datasets`, recipe, trace) are damaged one place at a time: each field
of each JSON or TOML document takes each of a fixed list of hostile values, and each file is replaced by what is no such
file. The verbs that read the document run in this process. The quick suite takes a seeded sample, the slow one all.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from soli.analysis.trace import read_trace
from soli.checkpoint import save_model
from soli.cli import main
from soli.errors import SoliError
from tests.train.toy import RECIPE, tiny_model, write_data

SECONDS = 3.0  # of the processor, for one command
HANGING = 90.0  # seconds by the clock: a machine that computes much else gives little of its processors
MEMORY = 3 << 30  # bytes of address space that one command may add: libraries, thread stacks, and little else
SAMPLE = 6  # damages of each document in the quick suite

# Python values, and literals as text where Python's writer cannot write them.
VALUES: dict[str, str] = {
    name: json.dumps(value)
    for name, value in {
        "null": None,
        "true": True,
        "false": False,
        "-1": -1,
        "0": 0,
        "1": 1,
        "10**9": 10**9,
        "10**18": 10**18,
        "10**40": 10**40,
        "1.5": 1.5,
        "-0.5": -0.5,
        "1e-300": 1e-300,
        "1e30": 1e30,
        "1e308": 1e308,
        "empty text": "",
        "text": "x",
        "path": "../x",
        "NUL": "a\0b",
        "control": "\x1b[2J\r\n",
        "surrogate": "\ud800",
        "long text": "x" * 100_000,
        "empty list": [],
        "empty object": {},
        "list of list": [[]],
        "list of numbers": [1, 2, 3],
        "list of mixed": [1, "a", None, {}, [1.5]],
        "list of floats": [1.0],
        "object": {"a": {"b": []}},
        "list of objects": [{"a": 1}, {"content": 1}],
        "nested": [[[[[[[[[[1]]]]]]]]]],
    }.items()
}
VALUES |= {
    "1e400": "1e400",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "400 digits": "1" * 400,
    "5000 digits": "9" * 5000,
    "deep": "[" * 3000 + "]" * 3000,
    "very deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
}

# Legal values with which training takes as long as it takes.
LONG = ("model.hidden_size = removed", "schedule.batch_sequences = 10**9", "schedule.batch_sequences = 10**18")

Damage = Callable[[Path], None]  # of a file, in place


def _nothing(file: Path) -> None:
    pass


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2 << 30)


def _replaced_by(make: Damage) -> Damage:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


FILES: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b"") and None,
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "BOM": lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()) and None,
    "UTF-16": lambda file: file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-16")) and None,
    "not UTF-8": lambda file: file.write_bytes(file.read_bytes().replace(b"e", b"\xff", 3)) and None,
    "NUL": lambda file: file.write_bytes(b"\0" + file.read_bytes()) and None,
    "random bytes": lambda file: file.write_bytes(random.Random(0).randbytes(3000)) and None,
    "list": lambda file: file.write_text("[]") and None,
    "number": lambda file: file.write_text("1") and None,
    "null": lambda file: file.write_text("null") and None,
    "text": lambda file: file.write_text('"x"') and None,
    "object": lambda file: file.write_text("{}") and None,
    "twice": lambda file: file.write_bytes(2 * file.read_bytes()) and None,
    "deep": lambda file: file.write_text("[" * 1_000_000) and None,
    "many lists": lambda file: file.write_text("[" + "[]," * 9_000_000 + "[]]") and None,
    "gigabytes": _sparse,
    "FIFO": _replaced_by(os.mkfifo),
    "directory": _replaced_by(Path.mkdir),
    "endless device": _replaced_by(lambda file: file.symlink_to("/dev/zero")),
    "link to itself": _replaced_by(lambda file: file.symlink_to(file.name)),
}


@dataclass(frozen=True)
class Document:
    """A file of one of the valid folders, and the commands that read it; `{}` in them is the damaged copy's folder.

    `lines`: which line of it, of JSON lines, has the damage.
    """

    folder: str
    file: str
    commands: tuple[tuple[str, ...], ...]
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.folder}/{self.file}" + ("" if self.line is None else f", line {self.line}")


GENERATE = ("generate", "{}", "0123", "--max-new-tokens", "2")
CONVERT = ("convert", "{}", "{}/converted", "--to", "bf16")
LIST = ("runs", "list", "{}")
COMPARE = ("runs", "compare", "{}", "{}/../other")
EXPORT = ("export", "{}", "{}/exported", "--format", "bf16")
RESUME = ("train", "{}/recipe.toml", "--out", "{}")
INSPECT = ("data", "inspect", "{}")
DRY_RUN = ("train", "{}", "--dry-run", "--no-measure")
TRAIN_HERE = ("train", "{}/../recipe.toml", "--out", "{}/out", "--set", "data.folder={}")
TRAIN_BRIEFLY = ("train", "{}", "--out", "{}/out", "--set", "run.max_minutes=0.0001")
PACK = ("data", "pack", "{}/text.txt", "--lines", "--heldout-every", "5", "--tokenizer", "{}", "--out", "{}/out")
CHAT = ("chat", "{}", "--max-new-tokens", "2")

DOCUMENTS = (
    Document("model", "config.json", (("count", "{}"), ("count", "{}", "--json", "--mtp"), GENERATE, CONVERT)),
    Document("model", "generation_config.json", (GENERATE,)),
    Document("model", "tokenizer_config.json", (GENERATE, CHAT)),
    Document("model", "tokenizer.json", (GENERATE, PACK)),
    Document("model", "chat_template.jinja", (CHAT,)),
    Document("model", "model.safetensors", (GENERATE, CONVERT)),
    Document("sharded", "model.safetensors.index.json", (GENERATE, CONVERT)),
    Document("quantized", "config.json", (GENERATE, CONVERT)),
    Document("run", "recipe.resolved.json", (LIST, RESUME)),
    Document("run", "metrics.jsonl", (LIST, COMPARE, RESUME), line=2),
    Document("run", "metrics.jsonl", (LIST, COMPARE, RESUME), line=-1),
    Document("run", "checkpoints/step-00000013/state.json", (EXPORT, RESUME)),
    Document("run", "checkpoints/step-00000013/config.json", (EXPORT, RESUME)),
    Document("run", "checkpoints/step-00000013/model.safetensors", (EXPORT, RESUME)),
    Document("run", "checkpoints/step-00000013/optimizer.safetensors", (EXPORT, RESUME)),
    Document("data", "meta.json", (INSPECT, TRAIN_HERE)),
    Document("data", "heldout.tsv", (INSPECT,)),
    Document("data", "tokenizer.json", (INSPECT,)),
    Document("dataset", "state.json", (("data", "pack", "{}", "--tokenizer", "{}/../data", "--out", "{}/../out"),)),
    Document("recipe", "recipe.toml", (DRY_RUN, TRAIN_BRIEFLY)),
    Document("trace", "trace.json", (("read_trace", "{}/trace.json"),)),
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The valid folders."""
    root = tmp_path_factory.mktemp("valid")
    data = write_data(root / "data")
    meta = json.loads((data / "meta.json").read_text())
    row = {"toy": {"tokens": meta["train_tokens"], "documents": 200}}
    meta |= {"sources": row, "valid_sources": row, "seed": 1, "fim_rate": 0.0}
    (data / "meta.json").write_text(json.dumps(meta))
    _write_models(root)
    recipe = {**RECIPE, "data": {"folder": str(data)}, "extension": [EXTENSION]}
    for name in ("recipe", "run", "other"):
        (root / name).mkdir()
        (root / name / "recipe.toml").write_text(_toml(recipe))
    (root / "recipe.toml").write_text(_toml(recipe))
    for name in ("run", "other"):
        assert main(["train", str(root / name / "recipe.toml"), "--out", str(root / name)]) == 0
    (root / "trace").mkdir()
    trace = json.loads((Path(__file__).parents[1] / "fixtures/v0_1/trace.json").read_text(encoding="utf-8"))
    (root / "trace/trace.json").write_text(json.dumps(trace | {"experts": trace["experts"][:2]}))
    _write_dataset(root / "dataset")
    return root


EXTENSION = {"sequence_length": 24, "batch_sequences": 2, "learning_rate": 1e-3, "steps": 1}


def _write_models(root: Path) -> None:
    for name, options in (("model", {}), ("sharded", {"shard_bytes": 20_000}), ("quantized", {"format": "int8"})):
        folder = root / name
        save_model(tiny_model(moe_intermediate_size=32), folder, tokenizer_from=root / "data", **options)
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"add_bos_token": True, "bos_token": {"content": "<|bos|>"}}
        config["chat_template"] = [{"name": "default", "template": "{{ messages[0].content }}"}]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "text.txt").write_text("".join(f"{n}\n" for n in range(1000)))
    (root / "model/chat_template.jinja").write_text("{{ messages[0].content }}")


def _write_dataset(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    folder.mkdir()
    table = pyarrow.table({"text": [f"{n} and {n + 1}" for n in range(1000)]})
    with ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_split": None}))


def _toml(recipe: dict[str, Any]) -> str:
    """A recipe as TOML with inline tables; JSON's scalars and lists are TOML's."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{name} = {text(item)}" for name, item in value.items()) + "}"
        return "[" + ", ".join(map(text, value)) + "]" if isinstance(value, list) else json.dumps(value)

    return "".join(f"{name} = {text(table)}\n" for name, table in recipe.items())


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a document has values: every field, of a list the first and the last item, of a large object three."""
    if place:
        yield place
    if isinstance(value, dict):
        names = list(value)
        for name in names if len(names) <= 60 else (names[0], names[len(names) // 2], names[-1]):
            yield from _places(value[name], (*place, name))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else ():
            yield from _places(value[index], (*place, index))


MARK = "@@damage@@"


def _edit(
    value: Any,
    place: tuple[Any, ...],
    pack: Callable[[str], bytes],
    dump: Callable[[Any], str],
    literal: str,
    file: Path,
) -> None:
    """Write a document with `literal` at a place; without the field where `literal` is empty."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for part in place[:-1]:
        holder = holder[part]
    if literal:
        holder[place[-1]] = MARK
    else:
        del holder[place[-1]]
    file.write_bytes(pack(dump(copy).replace(json.dumps(MARK), literal)))


def _read(document: Document, file: Path) -> tuple[Any, Callable[[str], bytes]]:
    """A document's JSON value, and how its text is put back into the file's bytes."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")

        def pack(text: str) -> bytes:
            header = text.encode("utf-8", "surrogatepass")
            return len(header).to_bytes(8, "little") + header + data[8 + length :]

        return json.loads(data[8 : 8 + length]), pack
    if file.suffix == ".toml":
        import tomllib

        return tomllib.loads(data.decode()), str.encode
    if document.line is not None:
        lines = data.decode().splitlines()

        def join(text: str) -> bytes:
            edited = list(lines)
            edited[document.line] = text
            return "".join(line + "\n" for line in edited).encode()

        return json.loads(lines[document.line]), join
    return json.loads(data), str.encode


def _damages(document: Document, valid: Path) -> Iterator[tuple[str, Damage]]:
    """Every damage of a document by name."""
    file = valid / document.folder / document.file
    for name, damage in FILES.items():
        yield name, damage
    if file.suffix in (".jinja", ".tsv"):
        return
    value, pack = _read(document, file)
    dump = _toml if file.suffix == ".toml" else json.dumps
    for place in _places(value):
        where = ".".join(map(str, place))
        for name, literal in {**VALUES, "removed": ""}.items():
            yield f"{where} = {name}", partial(_edit, value, place, pack, dump, literal)
        if isinstance(place[-1], str) and file.suffix != ".toml":
            yield f"{where} twice", partial(_edit, value, place, pack, dump, f"0, {json.dumps(place[-1])}: 0")


def _run(command: tuple[str, ...], folder: Path) -> int:
    arguments = [part.replace("{}", str(folder)) for part in command]
    if arguments[0] != "read_trace":
        return main(arguments)
    try:
        read_trace(arguments[1])
    except SoliError as error:
        import sys

        print(f"soli: {error}", file=sys.stderr)
        return 1
    return 0


class _TooLongError(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def _expire(*_: object) -> None:
    raise _TooLongError


def _fault(command: tuple[str, ...], folder: Path, capsys: Any, statuses: tuple[int, ...] = (0, 1)) -> str | None:
    """What is wrong with the answer of a command; None where nothing is."""
    capsys.readouterr()
    start = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGING)
    try:
        status = _run(command, folder)
    except _TooLongError:
        return f"takes longer than {HANGING:.0f} seconds"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time() - start
    captured = capsys.readouterr()
    sentences = [line for line in captured.err.splitlines() if line.startswith("soli: ")]
    if seconds > SECONDS:
        return f"takes {seconds:.1f} s, status {status}, {captured.err[-200:]}"
    if status not in statuses:
        return f"status {status}: {captured.err[-300:]}"
    if re.search(r"unexpected \w+: |Traceback", captured.err + captured.out):
        return captured.err[-300:]
    if status == 1 and (len(sentences) != 1 or not captured.err.endswith(sentences[0] + "\n")):
        return f"not one sentence: {captured.err[-300:]!r}"
    if "\x1b[2J" in captured.err:
        return "control characters of a file reach the terminal"
    return None


@pytest.fixture(autouse=True)
def _limits(valid: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command may wait, nor take memory: libraries are loaded by now."""
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"0123\n"), encoding="utf-8"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, _expire)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGALRM, handler)


def _check(document: Document, damages: list[tuple[str, Damage]], valid: Path, work: Path, capsys: Any) -> None:
    faults = []
    for name, damage in damages:
        for command in document.commands:
            if command is TRAIN_BRIEFLY and name in LONG:
                continue
            root = work / "case"
            shutil.rmtree(root, ignore_errors=True)
            for folder in {document.folder, *(("other",) if document.folder == "run" else ())}:
                shutil.copytree(valid / folder, root / folder)
            for shared in ("data", "recipe.toml"):
                if shared != document.folder:
                    (root / shared).symlink_to(valid / shared)
            damage(root / document.folder / document.file)
            statuses = (0,) if damage is _nothing else (0, 1)
            fault = _fault(command, root / document.folder, capsys, statuses)
            if fault is not None:
                faults.append(f"{name}: {command[0]}: {fault}")
    assert not faults, f"{len(faults)} of {len(damages)} damages of {document}:\n" + "\n".join(faults)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_valid_folders_are_read(document: Document, valid: Path, tmp_path: Path, capsys: Any) -> None:
    _check(document, [("nothing", _nothing)], valid, tmp_path, capsys)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_a_sample_of_damages(document: Document, valid: Path, tmp_path: Path, capsys: Any) -> None:
    damages = list(_damages(document, valid))
    _check(document, random.Random(str(document)).sample(damages, min(SAMPLE, len(damages))), valid, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_damage(document: Document, valid: Path, tmp_path: Path, capsys: Any) -> None:
    _check(document, list(_damages(document, valid)), valid, tmp_path, capsys)
