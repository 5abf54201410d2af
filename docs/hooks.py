"""Hook of the documentation site: add Mermaid from node_modules, so that diagrams need no other host."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

MERMAID = Path(__file__).parent.parent / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the script of Mermaid to the files of the site.

    Args:
        files: The files that MkDocs found.
        config: The configuration of the site.

    Returns:
        The same files and javascripts/mermaid.min.js.

    Raises:
        FileNotFoundError: Mermaid is not installed; `make site` installs it.
    """
    if not MERMAID.exists():
        raise FileNotFoundError(f"{MERMAID} is missing; run `make site`, which installs it")
    files.append(File.generated(config, "javascripts/mermaid.min.js", abs_src_path=str(MERMAID)))
    return files
