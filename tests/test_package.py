"""What is installed: recipes and the model in the box travel in the wheel, and the version is said once."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import soli

ROOT = Path(soli.__file__).parents[2]


def run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_wheel_holds_every_module_recipe_and_model_file_and_nothing_else(tmp_path):
    files = [Path(name) for name in run("git", "-C", ROOT, "ls-files").splitlines()]
    for file in files:
        (tmp_path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "tree" / file)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to("src")) for file in files if file.parts[0] == "src"}


def test_the_lazy_names_are_what_they_say():
    from soli.checkpoint import load_model, save_model
    from soli.config import ModelConfig, preset
    from soli.errors import SoliError

    there = (soli.load_model, soli.save_model, soli.ModelConfig, soli.preset, soli.SoliError)
    assert there == (load_model, save_model, ModelConfig, preset, SoliError)
    assert set(soli.__all__) <= set(dir(soli))
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        _ = soli.lode_model
