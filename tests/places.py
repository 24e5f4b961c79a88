"""Where tests find things: the root of the checkout, and data that not every checkout has beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]

DATA = ROOT.parent / "shared" / "data"
"""Real images and statements; absent in most checkouts, so that what needs them says so and is skipped."""
