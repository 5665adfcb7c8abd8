"""The command line: arguments -> models and images -> pictures, tables, pages and exit codes."""

from lrpfx.command.main import main

__all__ = ["main"]
