"""A hook of mkdocs: pages link to plots and records in ``bench/results``, outside of ``docs/``, so these come along.

On disk a page of ``docs/`` links to ``../bench/results/...``, which a code host follows too. The site has a copy of
that folder at its root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = "bench/results"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    for path in sorted((ROOT / RESULTS).rglob("*.*")):
        files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are from a folder that stands beside ``bench``."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../{RESULTS}/", f"]({up}{RESULTS}/")
