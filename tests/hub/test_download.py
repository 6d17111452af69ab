"""Downloads against a stand-in of the hub: what is fetched, how it resumes, and every way in which it can fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from soli.errors import SoliError
from soli.hub.cache import find_folder, list_revisions, parse_id
from soli.hub.download import fetch, fetch_config
from soli.hub.pull_plan import check_disk, plan_pull, requested_model
from tests.hub.conftest import SHARDS, sharded_files
from tests.hub.stand_in import MAIN, Hub

ID = "org/model"


def pull(name: str = ID) -> Path:
    return fetch(plan_pull(requested_model(name)))


def test_it_fetches_what_soli_reads_and_nothing_else(hub: Hub, cache: Path) -> None:
    files = sharded_files()
    hub.add(ID, files)
    steps: list[tuple[int, int]] = []
    plan = plan_pull(requested_model(ID))
    folder = fetch(plan, lambda fetched, total: steps.append((fetched, total)))
    names = {"config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    names |= {"LICENSE", "additional_chat_templates/rag.jinja"}
    fetched = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert fetched == {*names, *SHARDS}
    assert all((folder / name).read_bytes() == files[name] for name in (*names, *SHARDS))
    assert not [call for call in hub.calls if any(one in call.path for one in (".bin", ".py", ".gguf", "original"))]
    assert steps[-1] == (plan.total_bytes, plan.total_bytes) and plan.remaining_bytes == plan.total_bytes
    assert folder == find_folder(ID) == cache / "models--org--model" / "snapshots" / MAIN
    assert (cache / "models--org--model" / "refs" / "main").read_text() == MAIN


def test_the_cache_is_that_of_hugging_face(hub: Hub, cache: Path) -> None:
    hub.add(ID, sharded_files())
    folder = pull()
    assert snapshot_download(ID, cache_dir=cache, local_files_only=True) == str(folder)
    [repo] = scan_cache_dir(cache).repos
    assert (repo.repo_id, len(next(iter(repo.revisions)).files)) == (ID, 9)
    hub.calls.clear()
    assert pull() == folder and not [call for call in hub.calls if "resolve" in call.path]


def test_what_others_downloaded_is_not_fetched_again(hub: Hub, cache: Path) -> None:
    hub.add(ID, sharded_files())
    snapshot_download(ID, cache_dir=cache, endpoint=hub.address, allow_patterns=[SHARDS[0]])
    pull()
    assert len(hub.downloads(SHARDS[0])) == 1


def test_a_transfer_that_is_cut_continues_with_range(hub: Hub) -> None:
    files = sharded_files()
    hub.add(ID, files)
    hub.faults.cuts[SHARDS[0]] = [400_000]
    folder = pull()
    first, second = hub.downloads(SHARDS[0])
    assert first.range is None and second.range == "bytes=393216-"
    assert (folder / SHARDS[0]).read_bytes() == files[SHARDS[0]]


def test_a_server_that_ignores_range_sends_it_whole(hub: Hub) -> None:
    files = sharded_files()
    hub.add(ID, files)
    hub.faults.cuts[SHARDS[0]] = [400_000]
    hub.faults.ignore_range = True
    assert (pull() / SHARDS[0]).read_bytes() == files[SHARDS[0]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers that are cut again and again fail without waiting."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("impatient")
def test_a_transfer_that_always_ends_early_resumes_at_the_next_call(hub: Hub) -> None:
    files = sharded_files()
    hub.add(ID, files)
    hub.faults.cuts[SHARDS[0]] = [400_000] + [0] * 6
    with pytest.raises(SoliError, match=f"{ID}: the transfer ended early: run soli pull again, which resumes it"):
        pull()
    for name in (ID, f"{ID}@{MAIN}"):
        with pytest.raises(SoliError, match=f"{name} is only partly downloaded, without .*: run soli pull {name}"):
            find_folder(name)
    assert plan_pull(requested_model(ID)).partial >= 393_216
    hub.faults.cuts.clear()
    hub.calls.clear()
    folder = pull()
    assert [call.range for call in hub.downloads(SHARDS[0])] == ["bytes=393216-"]
    assert (folder / SHARDS[0]).read_bytes() == files[SHARDS[0]]


def _hear_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would what the tests start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("interruption", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_pull_that_is_killed_or_interrupted_resumes(hub: Hub, cache: Path, interruption: signal.Signals) -> None:
    files = sharded_files(2_000_000)
    hub.add(ID, files)
    hub.faults.delay = 0.2
    command = [sys.executable, "-m", "soli", "pull", ID, "--yes"]
    with subprocess.Popen(
        command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_hear_interrupts
    ) as process:
        deadline = time.monotonic() + 60
        while len([file for file in cache.glob("*/blobs/*.incomplete") if file.stat().st_size > 2**18]) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(interruption)
    assert process.returncode == (130 if interruption == signal.SIGINT else -signal.SIGKILL)
    assert not list(cache.glob("*/snapshots/*/*.safetensors"))
    [cached] = list_revisions()
    assert not cached.complete and cached.refs == ()
    hub.faults.delay = 0
    hub.calls.clear()
    finished = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    folder = Path(finished.stdout.strip())
    ranges = [call.range for name in SHARDS for call in hub.downloads(name)]
    assert len(ranges) == 2 and all(one and int(one[6:-1]) >= 2**17 for one in ranges)
    assert all((folder / name).read_bytes() == files[name] for name in SHARDS)
    assert not list(cache.glob("*/blobs/*.incomplete")) and find_folder(ID) == folder


def test_an_update_leaves_the_old_commit_in_use_until_it_is_complete(hub: Hub) -> None:
    repository = hub.add(ID, sharded_files())
    old = pull()
    new_commit = "b" * 40
    repository.files[new_commit] = {**repository.files[MAIN], SHARDS[1]: b"new" * 1000}
    repository.refs["main"] = new_commit
    hub.faults.statuses[f"/storage/{ID}/{new_commit}/{SHARDS[1]}"] = 500
    plan = plan_pull(requested_model(ID))
    assert plan.remaining_bytes == 3000  # the other files are here, under the old commit
    with pytest.raises(SoliError, match="answers with status 500: try again later"):
        pull()
    assert find_folder(ID) == old
    hub.faults.statuses.clear()
    assert pull() == find_folder(ID) != old
    assert len(hub.downloads(SHARDS[0])) == 1


def test_revisions_are_kept_apart(hub: Hub) -> None:
    repository = hub.add(ID, sharded_files())
    repository.files["c" * 40] = {**repository.files[MAIN], "README.md": b"other"}
    repository.refs["v1.0"] = "c" * 40
    folder = pull(f"{ID}@v1.0")
    assert (folder / "README.md").read_bytes() == b"other" and find_folder(f"{ID}@v1.0") == folder
    assert find_folder(f"{ID}@{'c' * 40}") == folder
    with pytest.raises(SoliError, match=f"{ID} is not downloaded, but {ID}@v1.0: give that, or run soli pull {ID}"):
        find_folder(ID)
    assert fetch(plan_pull(requested_model(ID, "v1.0"))) == folder
    with pytest.raises(SoliError, match="names a revision, and --revision"):
        requested_model(f"{ID}@v1.0", "main")


def test_what_modelopt_says_of_the_weights_is_fetched(hub: Hub) -> None:
    hub.add(ID, sharded_files() | {"hf_quant_config.json": b"{}"})
    for folder in (fetch_config(ID), pull()):
        assert (folder / "hf_quant_config.json").read_bytes() == b"{}"


def test_only_the_configuration(hub: Hub) -> None:
    hub.add(ID, sharded_files())
    folder = fetch_config(ID)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors.index.json"}
    assert find_folder(ID, config_only=True) == folder
    with pytest.raises(SoliError, match="only partly downloaded, without model-00001"):
        find_folder(ID)


def test_a_new_configuration_does_not_hide_the_old_model(hub: Hub) -> None:
    repository = hub.add(ID, sharded_files())
    folder = pull()
    repository.files["b" * 40] = repository.files[MAIN]
    repository.refs["main"] = "b" * 40
    assert fetch_config(ID) != folder == find_folder(ID)


@pytest.mark.parametrize("no_tree", [False, True])
def test_sizes_come_from_elsewhere_where_the_list_has_none(hub: Hub, no_tree: bool) -> None:
    files = sharded_files()
    hub.add(ID, files)
    hub.faults.hide_sizes, hub.faults.no_tree = True, no_tree
    plan = plan_pull(requested_model(ID))
    assert plan.weight_bytes == sum(len(files[name]) for name in SHARDS)
    assert (fetch(plan) / SHARDS[1]).read_bytes() == files[SHARDS[1]]


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, sharded_files(), token="hf_secret")
    with pytest.raises(SoliError, match=f"is gated: accept its terms at {hub.address}/{ID}, and set HF_TOKEN"):
        pull()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.calls.clear()
    pull()
    at_storage = [call for call in hub.calls if call.path.startswith("/storage")]
    assert at_storage and not [call for call in at_storage if call.authorization]
    assert all(call.authorization == "Bearer hf_secret" for call in hub.calls if call not in at_storage)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "org/absent: http.* has no such model, or it is private: check the ID, or set HF_TOKEN"),
        (f"{ID}@v9", "has no revision 'v9'"),
        (f"{ID}@{'9' * 40}", "has no revision '9999"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, name: str, message: str) -> None:
    hub.add(ID, sharded_files())
    with pytest.raises(SoliError, match=message):
        pull(name)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "/a", "a/", "../a", "./a", "a/b.git", "a--b/c", "a/..", "ä/b", "a b/c", "x" * 97, "a/b\n"]
)
def test_what_is_no_id(name: str) -> None:
    assert parse_id(name) is None
    with pytest.raises(SoliError, match="is no ID of a model"):
        requested_model(name)


@pytest.mark.parametrize("revision", ["", "../main", "a//b", "/a", "a/../../b", "-x", "a b", "x" * 300])
def test_what_is_no_revision(revision: str) -> None:
    for arguments in ((ID, revision), (f"{ID}@{revision}",)):
        with pytest.raises(SoliError, match="give a branch, a tag or a commit"):
            requested_model(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "has no config.json, so it is no model that Soli reads"),
        (dict.fromkeys((*SHARDS, "model.safetensors.index.json")), "has no safetensors weights, and Soli opens no"),
        ({SHARDS[1]: None}, f"its model.safetensors.index.json names {SHARDS[1]}, which the repository does not have"),
        ({"model.safetensors.index.json": b"{"}, "model.safetensors.index.json"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "its weight_map names files"),
    ],
)
def test_repositories_that_are_no_model_cost_no_weights(
    hub: Hub, changes: dict[str, bytes | None], message: str
) -> None:
    files = {**sharded_files(), **changes}
    hub.add(ID, {name: content for name, content in files.items() if content is not None})
    with pytest.raises(SoliError, match=message):
        pull()
    assert not [call for call in hub.calls if call.path.startswith("/storage")]


def test_a_single_file_of_weights(hub: Hub) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 1000, "model.fp16.safetensors": b"y"}
    hub.add(ID, files)
    assert {file.name for file in pull().iterdir()} == {"config.json", "model.safetensors"}
    hub.add("org/none", {"config.json": b"{}", "README.md": b""})
    with pytest.raises(SoliError, match=r"has neither model\.safetensors nor"):
        pull("org/none")


def test_shards_are_those_of_the_index_whatever_their_names(hub: Hub) -> None:
    files = sharded_files()
    weight_map = {"a": "part-a.safetensors", "b": "part-b.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for shard, name in zip(SHARDS, weight_map.values(), strict=True):
        files[name] = files.pop(shard)
    hub.add(ID, {**files, "consolidated.safetensors": b"again"})
    folder = pull()
    assert {file.name for file in folder.glob("*.safetensors")} == set(weight_map.values())
    hub.add("org/both", {**sharded_files(), "model.safetensors": b"again", "other-1-of-1.safetensors": b"again"})
    assert {file.name for file in pull("org/both").glob("*.safetensors")} == set(SHARDS)


def test_a_list_that_lies_about_a_size(hub: Hub) -> None:
    hub.add(ID, sharded_files())
    hub.faults.sizes[SHARDS[0]] = 10
    with pytest.raises(SoliError, match=f"{SHARDS[0]} has 10 bytes by the hub's list and 600,000 by its answer"):
        pull()
    with pytest.raises(SoliError, match="only partly downloaded"):
        find_folder(ID)


def test_a_file_that_arrives_damaged(hub: Hub, cache: Path) -> None:
    hub.add(ID, sharded_files())
    hub.faults.damage.add(SHARDS[0])
    with pytest.raises(SoliError, match=f"{SHARDS[0]} arrived damaged, by its SHA-256, and was removed"):
        pull()
    assert not list_revisions()[0].complete and not list(cache.glob(f"*/snapshots/*/{SHARDS[0]}"))
    hub.faults.damage.clear()
    pull()


def test_a_full_disk_is_noticed_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, sharded_files())
    plan = plan_pull(requested_model(ID))
    monkeypatch.setattr("soli.hub.pull_plan.free_disk_bytes", lambda: 1_000_000)
    for action in (check_disk, fetch):
        with pytest.raises(SoliError, match=r"1\.2 MB remain to be downloaded, but the disk of .* has 1\.0 MB free"):
            action(plan)
    assert not hub.downloads(SHARDS[0])


def test_a_disk_that_fills_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, sharded_files())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SoliError, match="the disk is full: make space and run soli pull again"):
        pull()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no such model, or it is private"),
        (403, "refuses it with status 403"),
        (429, "too many requests"),
        (503, "status 503"),
    ],
)
def test_statuses(hub: Hub, status: int, message: str) -> None:
    hub.faults.statuses[f"/api/models/{ID}/revision/main"] = status
    with pytest.raises(SoliError, match=message):
        pull()


def test_a_server_that_is_no_hub(hub: Hub) -> None:
    hub.faults.statuses[f"/api/models/{ID}/revision/main"] = 200
    with pytest.raises(SoliError, match="does not answer as a Hugging Face hub"):
        pull()


def test_offline_and_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, sharded_files())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SoliError, match="HF_HUB_OFFLINE is set, so nothing is downloaded: unset it"):
        pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SoliError, match=r"127\.0\.0\.1:9 cannot be reached .*: check the network, or HF_ENDPOINT"):
        pull()


def test_names_from_a_hostile_hub_leave_no_folder(hub: Hub, cache: Path) -> None:
    hostile = ("../../../evil.json", "..\\tokenizer.json", "additional_chat_templates/../x.jinja", "../x.jinja")
    files = sharded_files() | dict.fromkeys(hostile, b"x")
    repository = hub.add(ID, files)
    pull()
    assert not [file for name in ("evil.json", "x.jinja", "*\\*") for file in cache.parent.rglob(name)]
    repository.files["../../x"] = files
    repository.refs["main"] = "../../x"
    with pytest.raises(SoliError, match="names no commit for it"):
        pull()


def test_an_index_of_the_cache_that_is_damaged_is_a_sentence(hub: Hub) -> None:
    hub.add(ID, sharded_files())
    index = (pull() / "model.safetensors.index.json").resolve()
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(SoliError, match="has no JSON object weight_map"):
        find_folder(ID)
