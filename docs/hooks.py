"""What mkdocs loads beside its settings: how the tutorials are run."""

import os

from jupyter_client.connect import ConnectionFileMixin

ConnectionFileMixin.transport.default_value = "ipc"  # no network port
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # progress bars need no widgets here
