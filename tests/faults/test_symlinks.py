"""Conversion and export read no file outside of a model folder through a symlink, and write through none."""

import os
import shutil
from pathlib import Path

import pytest

from soli.checkpoint import load_model, save_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.load import BUNDLED
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.data.pack import Input, PackConfig, pack_inputs
from soli.data.readers import InputLayout
from soli.errors import SoliError
from tests.checkpoint.folders import full_model, saved

TO_FP8 = Target("fp8")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = saved(tmp_path / "models" / "m")
    for name in ("tokenizer.json", "README.md"):
        (folder / name).write_text("{}")
    return folder


def move(file: Path, target: Path, relative: bool = False) -> None:
    """Move a file and leave a symlink."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(os.path.relpath(target, file.parent) if relative else target)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_symlink_out_of_the_folder_is_rejected_by_name(name, relative, folder, tmp_path) -> None:
    move(folder / name, tmp_path / "secret", relative)
    with pytest.raises(SoliError, match=rf"{folder / name}: is a symlink out of its folder, to {tmp_path}/secret"):
        convert_checkpoint(folder, tmp_path / "out", TO_FP8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "secret"]


TARGETS = {
    "beside the folder": "../secret",
    "another folder's blobs": "../blobs/secret",
    "a folder whose name begins alike": "../m2/secret",
    "a folder and out again": "../m/../secret",
    "a device": "/dev/zero",
    "this process": "/proc/self/environ",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_where_a_symlink_may_not_lead(target, folder, tmp_path) -> None:
    for name in ("secret", "blobs/secret", "m2/secret"):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        (folder.parent / name).write_text("secret")
    (folder / "NOTICE").symlink_to(target)
    with pytest.raises(SoliError, match=rf"{folder}/NOTICE: is a symlink out of its folder"):
        convert_checkpoint(folder, tmp_path / "out", TO_FP8)


@pytest.mark.parametrize("target", ["gone", "README.md/x", "LICENSE"])
def test_a_symlink_to_nothing_is_rejected_by_name(target, folder, tmp_path) -> None:
    (folder / "LICENSE").symlink_to(target)
    with pytest.raises(SoliError, match=rf"{folder}/LICENSE: is a symlink to .*which is not a file"):
        convert_checkpoint(folder, tmp_path / "out", TO_FP8)


def test_a_chain_of_symlinks_is_followed_to_its_end(folder, tmp_path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "inner").symlink_to("../../secret")
    (folder / "LICENSE").symlink_to("inner")
    with pytest.raises(SoliError, match=r"LICENSE: is a symlink out of its folder"):
        convert_checkpoint(folder, tmp_path / "out", TO_FP8)


def test_symlinks_within_the_folder_are_copied_as_files(folder, tmp_path) -> None:
    for name in FILES:
        move(folder / name, folder / "files" / name, relative=True)
    link = tmp_path / "link"
    link.symlink_to(folder)  # the folder itself may be named by one
    convert_checkpoint(link, tmp_path / "out", TO_FP8)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "README.md").read_text().startswith("{}\n")


def hub_cache(folder: Path, cache: Path) -> Path:
    """The model as Hugging Face's cache stores it."""
    snapshot = cache / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate(FILES):
        shutil.copyfile(folder / name, blobs / f"hash{number}")
        (snapshot / name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def test_the_symlinks_of_a_hub_cache_work(folder, tmp_path) -> None:
    snapshot = hub_cache(folder, tmp_path / "hub")
    convert_checkpoint(snapshot, tmp_path / "out", TO_FP8)
    convert_checkpoint(folder, tmp_path / "expected", TO_FP8)
    for file in (tmp_path / "expected").iterdir():
        copy = tmp_path / "out" / file.name
        content = file.read_bytes().replace(f"| source | {folder.name} |".encode(), b"| source | org/name |")
        assert not copy.is_symlink() and copy.read_bytes() == content
    (tmp_path / "mine").symlink_to(snapshot)
    convert_checkpoint(tmp_path / "mine", tmp_path / "out2", TO_FP8)


def test_a_blob_of_another_model_of_the_cache_is_rejected(folder, tmp_path) -> None:
    snapshot = hub_cache(folder, tmp_path / "hub")
    other = tmp_path / "hub" / "models--org--other" / "blobs" / "hash"
    other.parent.mkdir(parents=True)
    other.write_text("secret")
    (snapshot / "LICENSE").symlink_to("../../../models--org--other/blobs/hash")
    with pytest.raises(SoliError, match=r"LICENSE: is a symlink out of its folder"):
        convert_checkpoint(snapshot, tmp_path / "out", TO_FP8)


def test_a_tokenizer_is_not_copied_from_outside(folder, tmp_path) -> None:
    move(folder / "tokenizer.json", tmp_path / "secret")
    with pytest.raises(SoliError, match=r"tokenizer.json: is a symlink out of its folder"):
        save_model(full_model(), tmp_path / "out", tokenizer_from=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_packing_takes_no_tokenizer_from_outside(name, tmp_path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / "nano" / file, tokenizer / file)
    (tmp_path / "texts.txt").write_text("".join(f"Text number {i}.\n" for i in range(300)))
    config = PackConfig((Input(tmp_path / "texts.txt"),), InputLayout(("text",), True, None), heldout_every=2)

    def pack(out: str) -> None:
        pack_inputs(config, tokenizer, tmp_path / out, lambda name, event: None, lambda line: None)

    pack("out")
    move(tokenizer / name, tmp_path / "secret")
    with pytest.raises(SoliError, match=rf"{name}: is a symlink out of its folder"):
        pack("other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("target", ["elsewhere", "gone"])
def test_nothing_is_written_through_a_symlink(target, folder, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    for write in (
        lambda out: convert_checkpoint(folder, out, TO_FP8),
        lambda out: save_model(full_model(), out),
    ):
        with pytest.raises(SoliError, match=r"out: is a symlink; give the name of a new folder"):
            write(tmp_path / "out")
    assert not [*(tmp_path / "elsewhere").iterdir()] and not (tmp_path / "gone").exists()


def test_a_symlink_in_place_of_the_hidden_folder_is_not_followed(folder, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f".out.partial-{os.getpid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SoliError, match="out: cannot be written"):
        convert_checkpoint(folder, tmp_path / "out", TO_FP8)
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_loading_for_use_follows_what_its_owner_linked(folder, tmp_path) -> None:
    move(folder / "model.safetensors", tmp_path / "shared" / "model.safetensors")
    assert load_model(folder)


def _directory(path: Path) -> None:
    path.mkdir()


def _gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 << 30)


@pytest.mark.parametrize("name", ["chat_template.jinja", "modeling.py", "tokenizer.model", "extra.json"])
@pytest.mark.parametrize("make", [os.mkfifo, _directory, _gigabytes])
def test_what_cannot_be_copied_is_rejected_by_name_and_at_once(make, name, folder, tmp_path, capsys) -> None:
    """Left out of the copy it would be missed later; a sparse file would fill the disk."""
    make(folder / name)
    assert main(["convert", str(folder), str(tmp_path / "converted"), "--to", "bf16"]) == 1
    error = capsys.readouterr().err
    assert str(folder / name) in error and error.count("\n") == 1 and "unexpected" not in error
    assert not (tmp_path / "converted").exists()


def test_templates_in_a_folder_of_their_own_are_copied_and_lead_nowhere_else(folder, tmp_path) -> None:
    (folder / "tokenizer").mkdir()  # not meant as the file of that name
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("a template")
    convert_checkpoint(folder, tmp_path / "out", TO_FP8)
    assert (tmp_path / "out" / "additional_chat_templates" / "default.jinja").read_text() == "a template"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jinja").write_text("a key")
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "secret")
    with pytest.raises(SoliError, match=r"additional_chat_templates/key\.jinja: is a symlink out of its folder"):
        convert_checkpoint(folder, tmp_path / "other", TO_FP8)
