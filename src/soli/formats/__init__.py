"""Weight formats: how one matrix is written in a file and read back.

`bf16` and `fp32` are plain casts. `fp8` (soli/formats/fp8.py) quantizes the linear weights to E4M3 with one scale for
each 128x128 block and keeps embedding, head, router and norms in bf16, as the official files do. `int8` and `int4`
(soli/formats/integer.py) quantize the linear weights with one scale per group of neighbours, the head always to
8 bits. soli/formats/quantized.py has the class and the codecs of all five.
"""

import torch

#: What a format does with the tensors that it does not quantize.
HIGH_PRECISION: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "fp32": torch.float32,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
