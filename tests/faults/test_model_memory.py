"""A model that does not fit in memory is rejected before a weight is read; what is stored as needed is not copied."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soli import cli, machine
from soli.checkpoint import Checkpoint, load_model, memory
from soli.checkpoint.load import BUNDLED
from soli.checkpoint.name_map import slots
from soli.checkpoint.shard import Shard, encode_header
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from soli.mapped_files import mapped_file
from soli.model.moe import RoutedExperts
from tests.checkpoint.folders import full_config, saved

GB = 10**9


@pytest.fixture
def available(monkeypatch):
    """Sets how many bytes the machine has available."""
    return lambda size: monkeypatch.setattr(memory, "available_memory", lambda: size)


@pytest.fixture
def no_weight_is_read(monkeypatch) -> None:
    for method in ("tensor", "read", "parameter"):
        monkeypatch.setattr(Shard, method, lambda self, name: pytest.fail(f"{name} was read"))


def stored_bytes(folder: Path) -> int:
    entries = Checkpoint(folder, mtp=False).entries.items()
    return sum(e.end - e.start for name, e in entries if not name.startswith("model.layers.2."))


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("format", "dtype", "options"),
    [
        ("bf16", None, {}),
        ("bf16", torch.float32, {}),
        ("fp32", None, {"in_place": True}),
        ("fp8", None, {}),
        ("fp8", torch.bfloat16, {"quantized": False}),
        ("int4", None, {}),
    ],
)
def test_a_model_that_does_not_fit_is_rejected_with_its_bytes_before_it_is_read(
    format, dtype, options, tmp_path, available
) -> None:
    folder = saved(tmp_path / "m", format=format)
    available(1000)
    with pytest.raises(SoliError) as error:
        load_model(folder, dtype=dtype, mtp=False, **options)
    message = str(error.value)
    needed = int(re.search(r"needs ([\d,]+) bytes", message)[1].replace(",", ""))
    assert str(folder) in message and "1,000 bytes (0.0 GB) are available" in message
    assert stored_bytes(folder) * 0.9 < needed < stored_bytes(folder) * 9


def test_what_is_needed_is_what_is_allocated(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    checkpoint = Checkpoint(folder, mtp=False)
    model = load_model(folder, mtp=False)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    cpu = torch.device("cpu")
    assert memory.Storage(torch.bfloat16, cpu, True, False).bytes_of(checkpoint) == (size, 0)
    assert memory.Storage(torch.bfloat16, cpu, True, True).bytes_of(checkpoint) == (0, size)
    biases = sum(t.nbytes for name, t in model.state_dict().items() if name.endswith("bias"))
    assert memory.Storage(torch.float32, cpu, True, True).bytes_of(checkpoint) == (2 * (size - biases), biases)


def test_what_fits_is_named(tmp_path, available) -> None:
    folder = saved(tmp_path / "m")
    size = stored_bytes(folder)
    available(size)
    load_model(folder, mtp=False)
    with pytest.raises(SoliError, match=rf"--dtype bfloat16 needs {size:,} bytes .*--dtype as-is needs {size:,} bytes"):
        load_model(folder, dtype=torch.float32, mtp=False)
    available(size - 1)
    with pytest.raises(SoliError, match=r"--dtype as-is needs 0 bytes .*from the disk.*--to int8 .*--to int4 makes"):
        load_model(folder, mtp=False)
    load_model(folder, mtp=False, quantized=True, in_place=True)


def test_fp8_stays_fp8_where_only_that_fits(tmp_path, available) -> None:
    folder = saved(tmp_path / "m", format="fp8")
    as_stored = sum(memory.Storage(torch.bfloat16, torch.device("cpu"), True, False).bytes_of(Checkpoint(folder)))
    available(as_stored)
    with pytest.warns(UserWarning, match=rf"stay FP8, in {as_stored:,} bytes .* needs .* bytes .* are available"):
        model = load_model(folder)
    assert has_quantized_experts(model)
    available(as_stored - 1)
    with pytest.raises(SoliError, match="as-is"):
        load_model(folder)
    available(10 * GB)
    assert not has_quantized_experts(load_model(folder))


def has_quantized_experts(model: torch.nn.Module) -> bool:
    return any(module.quantized is not None for module in model.modules() if isinstance(module, RoutedExperts))


def test_a_model_larger_than_this_machine_is_one_sentence_of_the_command(tmp_path) -> None:
    """Its weights are a hole in a file."""
    config = full_config(
        hidden_size=2**13, moe_intermediate_size=2**18, n_routed_experts=256, num_nextn_predict_layers=0
    )
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "torch_dtype": "bfloat16"}))
    specs = [(slot.name, "BF16", slot.shape) for slot in slots(config)]
    head, _, size = encode_header(specs)
    assert size > 1000 * GB
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(head)
        stream.truncate(size)
    command = [sys.executable, "-m", "soli", "generate", str(folder), "Hello"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result
    parameters = sum(math.prod(shape) for _, _, shape in specs)
    assert re.search(r"needs ([\d,]+) bytes", result.stderr)[1].replace(",", "") >= str(2 * parameters)
    assert "--dtype as-is" in result.stderr


COMMAND = """
import sys
from soli.checkpoint import memory
from soli.cli import main
memory.available_memory = lambda: {available}
sys.exit(main(["generate", "nano", "Good morning", "--max-new-tokens", "2", *sys.argv[1:]]))
"""


def test_the_command_keeps_fp8_and_says_so_in_one_line() -> None:
    nano, cpu = Checkpoint(BUNDLED / "nano", mtp=False), torch.device("cpu")
    fp8 = sum(memory.Storage(torch.float32, cpu, True, True).bytes_of(nano))
    assert fp8 < sum(memory.Storage(torch.float32, cpu, False, True).bytes_of(nano)) - 10_000_000
    command = [sys.executable, "-c", COMMAND.format(available=fp8)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result
    (note,) = (line for line in result.stderr.splitlines() if "FP8" in line)
    assert note.startswith("soli: ") and f"stay FP8, in {fp8:,} bytes" in note and "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError(), ""),
        (RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 1234 bytes"), " for 1,234 bytes"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
        (RuntimeError("can't start new thread"), ""),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), ""),
    ],
)
def test_memory_that_ends_is_one_sentence(error, size, monkeypatch, capsys) -> None:
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main(["generate"]) == 1
    assert capsys.readouterr().err == f"soli: there is no memory left{size}; soli doctor shows how much is available\n"


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_weights_that_need_no_other_dtype_are_used_where_they_are(format, tmp_path) -> None:
    folder = saved(tmp_path / "m", format=format)
    model, copied = load_model(folder, in_place=True), load_model(folder)
    experts = [module.quantized for module in model.modules() if isinstance(module, RoutedExperts)]
    tensors = [weight.values for e in experts if e for part in (e.gates, e.ups, e.downs) for weight in part]
    assert tensors
    for tensor in (*tensors, *model.state_dict().values()):
        assert mapped_file(tensor.data_ptr()) == str(folder / "model.safetensors")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), copied(ids))
        before = (folder / "model.safetensors").read_bytes()
        model.embed_tokens.weight.add_(1)  # in this process alone
    assert (folder / "model.safetensors").read_bytes() == before
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def test_the_bundled_model_as_it_is_stored_copies_nothing() -> None:
    model = open_text_model("nano", dtype="as-is").model
    assert all(mapped_file(tensor.data_ptr()) for tensor in model.state_dict().values())


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def system(tmp_path, monkeypatch) -> Path:
    """A machine with 8 GB available, without cgroups."""
    for name, value in (("CGROUPS", "cgroup"), ("OWN_CGROUPS", "own"), ("MEMORY_INFO", "meminfo")):
        monkeypatch.setattr(machine, name, tmp_path / value)
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (machine.resource.RLIM_INFINITY,) * 2)
    return tmp_path


def test_available_memory_is_the_systems(system) -> None:
    assert machine.available_memory() == 8_000_000 * 1024
    (system / "meminfo").unlink()
    assert machine.available_memory() == machine.memory_bytes()


@pytest.mark.parametrize("mount", ["cgroup", "cgroup/unified"])
def test_available_memory_within_a_cgroup_of_version_2(mount, system) -> None:
    (system / "own").write_text("1:cpu:/a\n0::/a/b\n")
    write(system / mount / "a" / "b", memory__max="max", memory__high="max", memory__current="123")
    assert machine.available_memory() == 8_000_000 * 1024
    used = {"memory__current": str(3 * GB), "memory__stat": f"anon 1\nactive_file {GB}\ninactive_file {GB}"}
    write(system / mount / "a", memory__max=str(4 * GB), **used)
    assert machine.available_memory() == 3 * GB and machine.memory_bytes() == 4 * GB
    write(system / mount / "a" / "b", memory__high=str(2 * GB), **used)
    assert machine.available_memory() == GB
    write(system / mount / "a" / "b", memory__current=str(9 * GB))
    assert machine.available_memory() == 0


@pytest.mark.parametrize("folder", ["cgroup/memory/a/b", "cgroup/memory"], ids=["own folder", "container's root"])
def test_available_memory_within_a_cgroup_of_version_1(folder, system) -> None:
    (system / "own").write_text("4:memory:/a/b\n0::/\n")
    write(
        system / folder,
        memory__limit_in_bytes=str(2 * GB),
        memory__usage_in_bytes=str(GB),
        memory__stat=f"active_file 1\ntotal_active_file {GB // 4}\ntotal_inactive_file {GB // 4}",
    )
    assert machine.available_memory() == 2 * GB - GB // 2
    write(system / folder, memory__limit_in_bytes=str(2**63 - 4096))
    assert machine.available_memory() == 8_000_000 * 1024


def test_available_memory_within_an_address_space_limit(system, monkeypatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (2**50, 2**50))
    assert machine.available_memory() == 8_000_000 * 1024
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (10, 10))
    assert machine.available_memory() == 0


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux")
def test_available_memory_of_this_machine() -> None:
    assert 0 < machine.available_memory() <= machine.memory_bytes()
