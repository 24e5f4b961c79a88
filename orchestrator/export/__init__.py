"""A trial's model in a folder of its own, its card, and its numbers again from nothing."""
