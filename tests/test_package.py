"""What is installed: the wheel holds recipes and the bundled model, and `import soli` finds the package anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import soli

ROOT = Path(soli.__file__).parents[2]


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints, without the PYTHONPATH that these tests may run under."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=cwd, env=environment).stdout


@pytest.fixture(scope="module")
def files():
    """The files of the repository, as git knows them."""
    return [Path(name) for name in run("git", "-C", ROOT, "ls-files").splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, files):
    """A folder `soli` with the repository's files, as `git clone` makes one."""
    folder = tmp_path_factory.mktemp("work") / "soli"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture
def venv(tmp_path):
    """The Python of an empty virtual environment."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *arguments: object) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", *arguments)


def imported_from(python: Path, folder: Path) -> Path:
    """Where `import soli`, in that folder, finds the package; its torch-free names must work."""
    script = "import soli; print(soli.__file__); soli.preset('nano'); assert soli.__version__"
    return Path(run(python, "-c", script, cwd=folder).strip())


@pytest.mark.slow
def test_an_editable_install_is_a_path_file_that_works_beside_the_clone(clone, venv, tmp_path):
    install(venv, "--editable", clone)
    site_packages = next((tmp_path / "venv" / "lib").glob("*/site-packages"))
    path_files = [file.read_text().strip() for file in site_packages.glob("*soli*.pth")]
    assert path_files == [str(clone / "src")]
    for folder in (clone.parent, clone, tmp_path):
        assert imported_from(venv, folder) == clone / "src" / "soli" / "__init__.py"


@pytest.mark.slow
def test_the_wheel_holds_every_module_recipe_and_model_file_and_nothing_else(clone, venv, tmp_path, files):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, clone)
    path = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to("src")) for file in files if file.parts[0] == "src"}
    install(venv, path)
    for folder in (clone.parent, tmp_path):
        assert imported_from(venv, folder).is_relative_to(tmp_path / "venv")


def test_the_lazy_names_are_the_objects_of_their_modules():
    from soli.checkpoint import load_model, save_model
    from soli.config import ModelConfig, preset
    from soli.errors import SoliError

    objects = (soli.load_model, soli.save_model, soli.ModelConfig, soli.preset, soli.SoliError)
    assert objects == (load_model, save_model, ModelConfig, preset, SoliError)
    assert set(soli.__all__) <= set(dir(soli))
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        _ = soli.lode_model


def test_the_last_release_of_the_changelog_is_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    releases = [line.split()[1] for line in lines if line.startswith("## ") and line != "## Unreleased"]
    assert releases[0] == soli.__version__
