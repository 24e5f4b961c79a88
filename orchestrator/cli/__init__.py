"""The command line, one command a file; :func:`main` is the entry point of ``vitpareto``."""

from orchestrator.cli.app import app, main

__all__ = ["app", "main"]
