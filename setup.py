"""What pyproject.toml cannot say: `recipes/` stands at the root for readers and is installed as `soli/recipes`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["soli", "soli.*"]), "soli.recipes"],
    package_dir={"soli.recipes": "recipes"},
    package_data={
        "soli": ["py.typed", "models/**/*", "kernels/cpu/csrc/*", "serve/page/*"],
        "soli.recipes": ["**/*.toml", "**/*.md"],
    },
)
