"""The command line: `statecache generate`, `chat`, `inspect`."""

from statecache.cli.app import main

__all__ = ["main"]
