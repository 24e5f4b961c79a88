"""A recipe as stages: their graph, what a trial works with, what each kind does, and the cache that makes each once."""
