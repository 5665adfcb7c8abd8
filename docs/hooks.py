"""What mkdocs loads beside its settings: how the tutorials are run, and where their links lead."""

import os
import re
from typing import Any

from jupyter_client.connect import ConnectionFileMixin

ConnectionFileMixin.transport.default_value = "ipc"  # no network port
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # progress bars need no widgets here
os.environ["TQDM_DISABLE"] = "1"  # how long a cell took is of the machine that made the page


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links of a tutorial from the sources of pages to the pages: mkdocs leaves those of notebooks."""
    if not page.file.src_uri.startswith("tutorials/"):
        return html
    return re.sub(r'(<a\s[^>]*href="(?![\w+]+:)[^"#]+)\.(?:md|py)(?=["#])', r"\1.html", html)
