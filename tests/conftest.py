"""What all tests share: no deadlines on property tests, GPU tests only where there is a GPU, a cache folder of their
own."""

import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("soli", deadline=None)  # the machine may be busy; a slow example is no failure
settings.load_profile("soli")


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that tests remember, such as which experts were used, is in the user's cache folder; what is there of
    this machine, its compiled kernels and measured rates, is taken along."""
    from soli.kernels.cpu import build, native

    cache, own = build.cache_folder(), tmp_path_factory.mktemp("cache")
    library = native.library_or_reason()
    if isinstance(library, native.Library) and library.path.is_relative_to(cache):
        shutil.copytree(library.path.parent, own / "kernels" / library.path.parent.name)
    if (cache / "machine.json").is_file():
        shutil.copy(cache / "machine.json", own)
    before = os.environ.get("SOLI_CACHE")
    os.environ["SOLI_CACHE"] = str(own)
    yield
    del os.environ["SOLI_CACHE"]
    if before is not None:
        os.environ["SOLI_CACHE"] = before


@pytest.fixture(autouse=True)
def _pipes_are_wide(monkeypatch):
    """Test runners set COLUMNS for their workers; what is printed must not depend on who runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)
