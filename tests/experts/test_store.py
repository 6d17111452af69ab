"""The expert store: the same bits as with all experts in memory, whatever fits; errors name file and tensor."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soli.checkpoint import open_checkpoint
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.engine.runner import FusedRunner
from soli.errors import SoliError
from soli.experts.load import load_paged_model
from soli.experts.paged import MISSING
from soli.experts.policy import POLICIES
from soli.experts.reading import Reader, Settings, _File, split
from soli.experts.sources import ALIGNMENT, Read, sources_of
from soli.experts.store import PRESENT, ExpertStore
from soli.kernels import Dispatch
from soli.kernels.cpu.paged_pass import PagedPass
from soli.model.layers import set_backend
from tests.checkpoint.folders import edit_tensors
from tests.experts.folders import (
    FORMATS,
    LAYERS,
    E,
    K,
    answers,
    fail_next_read,
    mixture_folder,
    requests,
    resident_model,
)
from tests.kernels.weights import needs_kernels

PROMPTS = (1, 60)


@needs_kernels
@pytest.mark.parametrize("runner", ["fused", "eager"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_are_those_of_the_resident_model(format, runner) -> None:
    prompts = requests(PROMPTS, new_tokens=6)
    expected = answers(resident_model(format), prompts, runner)
    for capacity in (K, E) if runner == "eager" else (K, K + 2, E, LAYERS * E):
        model, store = load_paged_model(mixture_folder(format), capacity, poison=True)
        assert answers(model, prompts, runner) == expected
        assert (store.stats.evictions == 0) == (capacity == LAYERS * E)
        assert store.stats.misses > 0
        store.close()


@needs_kernels
@pytest.mark.parametrize("runner", ["fused", "eager"])
def test_a_selection_of_tokens_survives_a_pass_that_stops(runner) -> None:
    """Layers that share it may be on the other side of a stop."""
    kind = "glm with shared indexers"
    prompts = requests(PROMPTS, new_tokens=6)
    expected = answers(resident_model("fp8", kind=kind), prompts, runner)
    model, store = load_paged_model(mixture_folder("fp8", kind=kind), K, poison=True)
    assert answers(model, prompts, runner) == expected
    assert store.stats.misses > 0
    store.close()


@needs_kernels
@settings(max_examples=8)
@given(
    format=st.sampled_from(FORMATS),
    capacity=st.integers(K, LAYERS * E),
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    policy=st.sampled_from([*POLICIES]),
    prefetch=st.sampled_from(["auto", "on", "off"]),
    speculate=st.booleans(),
)
def test_the_bits_at_random_sizes(format, capacity, lengths, policy, prefetch, speculate) -> None:
    prompts = requests(lengths)
    expected = answers(resident_model(format), prompts, speculate=speculate)
    model, store = load_paged_model(mixture_folder(format), capacity, policy=policy, prefetch=prefetch, poison=True)
    assert answers(model, prompts, speculate=speculate) == expected
    assert store.capacity == capacity
    store.close()


def test_plain_torch_reads_experts_one_after_another() -> None:
    prompts = requests((5, 20))
    outputs = []
    for model in (resident_model("fp8"), load_paged_model(mixture_folder("fp8"), K, poison=True)[0]):
        set_backend(model, Dispatch("torch"))
        outputs.append(answers(model, prompts, "eager"))
    assert outputs[0] == outputs[1]


@needs_kernels
def test_experts_may_be_in_several_files() -> None:
    prompts = requests((20,))
    model, store = load_paged_model(mixture_folder("fp8", shard_bytes=20_000), K, poison=True)
    assert len(store.sources.files) > 3
    assert answers(model, prompts) == answers(resident_model("fp8"), prompts)
    store.close()


@needs_kernels
def test_a_pass_never_stops_when_all_experts_are_in_memory(monkeypatch) -> None:
    model, store = load_paged_model(mixture_folder("int8"), LAYERS * E)
    prompts = requests((40,))
    first = answers(model, prompts)
    monkeypatch.setattr(ExpertStore, "windows", lambda *_: pytest.fail("a pass stopped"))
    misses = store.stats.misses
    assert answers(model, prompts) == first
    assert store.stats.misses == misses
    store.close()


@needs_kernels
def test_each_expert_of_a_prompt_is_read_once() -> None:
    model, store = load_paged_model(mixture_folder("bf16"), 4, mtp=False)
    answers(model, requests((200,), new_tokens=1))
    assert store.stats.misses <= 3 * E
    assert store.stats.misses > 4 * 3  # more than fit at once
    store.close()


@needs_kernels
def test_a_prompt_does_not_take_the_place_of_other_layers_experts() -> None:
    layers = LAYERS - 1
    model, store = load_paged_model(mixture_folder("bf16"), layers * 12, mtp=False, prefetch="off")
    everything = range(E)
    assert [len(part) for part in store.windows(0, everything, wait=True)] == [6, 6, 4]
    assert [len(part) for part in store.windows(0, everything[:12], wait=True)] == [E]
    answers(model, requests((200,), new_tokens=1))
    in_memory = [sum(state != MISSING for state in store.layers[layer].states) for layer in range(layers)]
    assert sum(in_memory) == layers * 12 and max(in_memory) < E
    store.close()


@needs_kernels
@pytest.mark.parametrize("prefetch", ["auto", "off"])
@pytest.mark.parametrize("policy", [*POLICIES])
def test_a_prompt_keeps_what_it_will_use(policy, prefetch, monkeypatch) -> None:
    """Few of the experts in memory leave it before they are used: those that the first window takes the place of."""
    layers, window = LAYERS - 1, 4
    model, store = load_paged_model(
        mixture_folder("bf16"), layers * 2 * window, mtp=False, policy=policy, prefetch=prefetch
    )
    prompt = requests((200,), new_tokens=1)
    answers(model, prompt)
    before = {(layer, e) for layer in range(layers) for e in range(E) if store.layers[layer].states[e] == PRESENT}
    assert len(before) == store.capacity
    read = []
    original = store._read
    monkeypatch.setattr(store, "_read", lambda key, *rest: read.append(key) or original(key, *rest))
    answers(model, prompt)
    assert len(read) == len({*read}) and len(before.intersection(read)) <= 2 * window
    store.close()


@needs_kernels
@pytest.mark.parametrize(
    ("prefetch", "share", "ahead"), [("auto", 0.5, [8, 8]), ("auto", 1, [0, 0]), ("off", 0.5, [0, 0])]
)
def test_a_prompt_reads_the_next_layers_experts_ahead(prefetch, share, ahead, monkeypatch) -> None:
    """Where it chose more than `share` of this layer's: 8, a window twice."""
    model, store = load_paged_model(mixture_folder("bf16"), (LAYERS - 1) * 8, mtp=False, prefetch=prefetch)
    prompt = requests((200,), new_tokens=1)
    expected = answers(resident_model("bf16"), prompt)
    original, under_way = store.windows, []

    def windows(layer: int, *rest):
        if layer:
            under_way.append(sum(state != MISSING for state in store.layers[layer].states))
        return original(layer, *rest)

    monkeypatch.setattr(store, "windows", windows)
    monkeypatch.setattr("soli.experts.store.NEARLY_ALL", share)
    assert answers(model, prompt) == expected
    assert under_way == ahead
    store.close()


@needs_kernels
def test_waiting_for_the_disk_takes_no_threads_away(monkeypatch) -> None:
    """A pass that stops says nothing about how busy the cores are."""
    read, run, threads = _File.read, PagedPass.run, []

    def read_slowly(self, *arguments) -> None:
        time.sleep(0.002)
        read(self, *arguments)

    def run_and_note(self) -> None:
        run(self)
        threads.append(self._paging.threads)

    monkeypatch.setattr(_File, "read", read_slowly)
    monkeypatch.setattr(PagedPass, "run", run_and_note)
    model, store = load_paged_model(mixture_folder("bf16"), K, mtp=False)
    answers(model, requests((9, 70), 24))
    assert len(threads) > 20 and {*threads} == {torch.get_num_threads()}
    store.close()


def copy_of(format: str, folder: Path) -> Path:
    shutil.copytree(mixture_folder(format), folder)
    return folder / "model.safetensors"


@needs_kernels
@pytest.mark.parametrize("runner", ["fused", "eager"])
def test_a_file_that_shrinks_or_changes_ends_the_request_with_its_name(tmp_path, runner) -> None:
    file = copy_of("int8", tmp_path / "copy")
    for damage in (lambda: os.truncate(file, ALIGNMENT), lambda: os.utime(file, (1, 1))):
        file.unlink()
        shutil.copy(mixture_folder("int8") / "model.safetensors", file)
        model, store = load_paged_model(tmp_path / "copy", K, poison=True)
        expected = answers(model, requests((9,), 2), runner)
        damage()
        with pytest.raises(SoliError, match=f"{file}: (became shorter|changed)"):
            answers(model, requests((30,), 5), runner)
        store.close()
        assert expected


@needs_kernels
def test_after_an_error_the_expert_is_read_again(monkeypatch) -> None:
    model, store = load_paged_model(mixture_folder("fp8"), E, poison=True)
    prompts = requests((30,))
    fail_next_read(store, monkeypatch)
    with pytest.raises(SoliError):
        answers(model, prompts)
    assert answers(model, prompts) == answers(resident_model("fp8"), prompts)
    store.close()


def test_scales_that_are_not_positive_name_their_tensor(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy_of("fp8", tmp_path / "copy")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    store = ExpertStore(sources_of(open_checkpoint(tmp_path / "copy")), E)
    with pytest.raises(SoliError, match=rf"tensor {name}"):
        store.weights(0, 5)
    store.close()


@pytest.mark.parametrize(
    ("format", "suffix", "value", "words"),
    [
        ("pack-quantized", "scale", float("nan"), "a scale is not a finite number"),
        ("pack-quantized", "shape", 7, r"weight_shape is \(7, 7\), but config.json asks for \(32, 64\)"),
        ("modelopt NVFP4", "scale_2", float("inf"), "a scale is not a finite number"),
        ("float-quantized per channel, bf16 scales", "scale", 0, "not a finite positive number"),
        ("fp8 per tensor", "scale", -1, "not a finite positive number"),
        ("mxfp4-pack-quantized", "scale", 255, "a scale is not a finite number"),
        ("mxfp4-pack-quantized", "scale", 253, "so large that weights are not"),  # 6 times 2^126
        ("pack-quantized", "scale", 1e38, "so large that weights are not"),
        ("fp8 per tensor", "scale", 1e36, "so large that weights are not"),
    ],
)
def test_damaged_scales_of_other_programs_name_their_tensor(tmp_path, format, suffix, value, words) -> None:
    file = copy_of(format, tmp_path / "copy")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit_tensors(file, lambda tensors: tensors[f"{name}_{suffix}"].fill_(value))
    store = ExpertStore(sources_of(open_checkpoint(tmp_path / "copy")), E, poison=True)
    with pytest.raises(SoliError, match=rf"{file}: tensor {name}_scale: .*{words}"):
        store.weights(0, 5)
    assert store.weights(0, 4)[1].dequantize().isfinite().all()
    store.close()


def test_experts_in_float16_are_rejected_with_the_command_that_helps(tmp_path) -> None:
    file = copy_of("bf16", tmp_path / "copy")
    edit_tensors(file, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()
                                                       if ".experts." in name}))  # fmt: skip
    with pytest.raises(SoliError, match=rf"is F16; .*`soli convert {tmp_path / 'copy'} DST --to bf16 --pack` writes"):
        load_paged_model(tmp_path / "copy", K)
    convert_checkpoint(tmp_path / "copy", tmp_path / "pack", Target("bf16"), pack=True)
    load_paged_model(tmp_path / "pack", K)[1].close()


def test_too_few_slots_are_rejected() -> None:
    with pytest.raises(SoliError, match="3 experts"):
        load_paged_model(mixture_folder("bf16"), K - 1)


def test_a_reader_without_direct_io_reads_the_same(tmp_path) -> None:
    data = os.urandom(3 * ALIGNMENT + 100)
    (tmp_path / "file").write_bytes(data)
    for direct in (None, False):
        memory = bytearray(4 * ALIGNMENT) if direct is False else None
        if memory is None:
            import mmap

            memory = mmap.mmap(-1, 4 * ALIGNMENT)
        reader = Reader([tmp_path / "file"], Settings(direct=direct, block=ALIGNMENT))
        results: list[Exception | None] = []
        reads = [Read(0, ALIGNMENT, 3 * ALIGNMENT, 0, 2 * ALIGNMENT + 100)]
        reader.submit(reads, memoryview(memory), results.append)
        reader.close()
        assert results == [None]
        assert bytes(memory[: 2 * ALIGNMENT + 100]) == data[ALIGNMENT:]
        assert reader.stats.bytes == 3 * ALIGNMENT


def test_reads_are_split_into_blocks() -> None:
    pieces = split(Read(0, 0, 5 * ALIGNMENT, 0, 4 * ALIGNMENT + 7), 2 * ALIGNMENT)
    assert [(piece.start, piece.length, piece.needed) for piece in pieces] == [
        (0, 2 * ALIGNMENT, 2 * ALIGNMENT),
        (2 * ALIGNMENT, 2 * ALIGNMENT, 2 * ALIGNMENT),
        (4 * ALIGNMENT, ALIGNMENT, 7),
    ]


@needs_kernels
def test_another_pass_on_the_thread_cannot_be_continued() -> None:
    """What a stopped pass has computed is in the thread's scratch."""
    model, store = load_paged_model(mixture_folder("int8"), K)
    runner = FusedRunner(model)
    assert not all(state == PRESENT for state in store.layers[0].states)
    with torch.inference_mode():
        interrupted = store.layers[0].windows
        resident = resident_model("int8")

        def interrupt(*args, **options):
            answers(resident, requests((3,), 1))
            yield from interrupted(*args, **options)

        object.__setattr__(store.layers[0], "windows", interrupt)
        assert runner.name == "fused"
        with pytest.raises(SoliError, match="RuntimeError"):
            answers(model, requests((9,), 2))
    store.close()
