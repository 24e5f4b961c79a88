"""Importing transformers without what its own imports log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_registration() -> Iterator[None]:
    """Keeps quiet what torchao, which transformers imports, makes torch 2.15 log: that it registers types as before."""
    logger = logging.getLogger("torch.utils._pytree")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
