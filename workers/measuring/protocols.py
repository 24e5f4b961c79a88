"""Named measurement protocols: how long is measured, how often, and what it may cost. Standard library only.

Source: PuMer (arXiv 2305.17530) and ToMe (arXiv 2210.09461) measure throughput at the best batch size, peak memory at a
batch that both models take, latency at batch 1; interleaving and the A/A run are ours (docs/measurement.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "quick": {
        "window_s": 0.5,
        "latency_pairs": 30,
        "throughput_pairs": 8,
        "warmup": 3,
        "batch_start": 32,
        "batch_step": 32,
        "batch_max": 128,
        "noise_runs": 4,
        "remeasure": 4,
    },
    "standard": {
        "window_s": 30.0,
        "latency_pairs": 100,
        "throughput_pairs": 20,
        "warmup": 10,
        "batch_start": 32,
        "batch_step": 8,
        "batch_max": 1024,
        "noise_runs": 6,
        "remeasure": 16,
    },
    "thorough": {
        "window_s": 30.0,
        "latency_pairs": 100,
        "throughput_pairs": 20,
        "warmup": 10,
        "batch_start": 32,
        "batch_step": 8,
        "batch_max": 1024,
        "noise_runs": 10,
        "remeasure": 32,
    },
}
"""Name to settings. ``window_s``: seconds that each of the two models is timed for, at least ``latency_pairs`` or
``throughput_pairs`` pairs of it; ``warmup``: calls before; ``batch_*``: sizes tried for throughput; ``noise_runs``: A/A
measurements, each in a fresh process; ``remeasure``: most further measurements of a study's undecided frontier members."""

SEEDS: Mapping[str, tuple[int, ...]] = {"quick": (0,), "standard": (0,), "thorough": (0, 1, 2)}
"""Seeds of a study that names none; ``thorough`` needs at least three."""

CPU_RESOLUTION_BYTES = 4_000_000
"""How far a growth on a CPU may lie from the bytes of weights, images and activations where no kernel packs weights;
seen in :mod:`workers.measuring.peak_memory`."""

MIN_CPU_BYTES = 5 * CPU_RESOLUTION_BYTES
"""Smallest peak on a CPU that is told: below it the resolution is a large part of the number."""
