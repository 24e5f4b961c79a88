"""Made-up inputs of a task's shapes, for what does not depend on their content: speed, memory, counts."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.inputs import Inputs
from workers.models.vision_language import TASKS
from workers.tasks import TaskInfo

SEED = 0


def make_inputs(info: TaskInfo, device: torch.device | str, batch: int) -> Tensor | Inputs:
    """Returns standard normal images (B, C, H, W) float32, as normalised data is, on ``device``.

    For vision-language tasks, :class:`Inputs` of them and of texts of the greatest length with random words and no padding,
    as PuMer's protocol has it (arXiv 2305.17530, section 5: 384 pixels, 32 tokens, by the settings of the study's data).
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (info.in_chans, info.image_size, info.image_size)
    if info.text is None:
        return torch.randn(batch, *shape, generator=generator).to(device)
    pictures = TASKS[info.task].images
    pixels = torch.randn(batch, *((pictures, *shape) if pictures > 1 else shape), generator=generator)
    first = min(info.text.pad_id + 1, info.text.vocab_size - 1)  # no padding among the words
    words = torch.randint(first, info.text.vocab_size, (batch, info.text.max_tokens), generator=generator)
    return Inputs({"pixel_values": pixels, "input_ids": words}).to(device)
