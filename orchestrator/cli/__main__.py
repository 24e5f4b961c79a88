"""``python -m orchestrator.cli``: the command where it is not on the path."""

from orchestrator.cli import main

main()
