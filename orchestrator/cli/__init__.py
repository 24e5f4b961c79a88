"""The command line, one command a file; :func:`main` is the entry point of ``vitpareto``."""

import sys

try:
    from orchestrator.cli.app import app, main
except KeyboardInterrupt:  # in the tenths of a second before a command can say so itself
    print("vitpareto: interrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["app", "main"]
