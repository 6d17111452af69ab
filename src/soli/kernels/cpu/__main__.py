"""Compile the kernels: `python -m soli.kernels.cpu`."""

import torch  # noqa: F401  (loads its OpenMP runtime)

from soli.kernels.cpu.build import BuildError, build

try:
    print(f"soli: CPU kernels in {build()}")
except BuildError as error:
    print(f"soli: no CPU kernels, torch's own products will be used, because {error}")
