"""What all tests share: no deadlines on property tests, and GPU tests only where there is a GPU."""

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


@pytest.fixture(autouse=True)
def _pipes_are_wide(monkeypatch):
    """Test runners set COLUMNS for their workers; what is printed must not depend on who runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)
