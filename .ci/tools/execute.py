"""Run the notebook top to bottom and say, cell by cell, where it is and how long it took; nbconvert is silent.

usage: python .ci/tools/execute.py [--fast] [--prove] [--in FOLDER] [--timeout SECONDS]
FOLDER (default: here) holds PixelCNN.ipynb; it gets the outputs, with the settings as they were, after every section.
"""
import argparse
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


class Telling(NotebookClient):
    """Prints each cell's section, what it took and the minutes so far; keeps the outputs section by section."""

    async def async_execute_cell(self, cell, cell_index, **options):
        heading = re.search(r"^##+ (.*)", cell.source, re.M) if cell.cell_type == "markdown" else None
        if heading:
            self.section = heading[1]
            self.keep()
        started = time.monotonic()
        try:
            return await super().async_execute_cell(cell, cell_index, **options)
        finally:
            took = time.monotonic() - started
            if took > 1:
                minutes = (time.monotonic() - self.begun) / 60
                print(f"{minutes:6.1f} min  cell {cell_index}, {self.section}: {took:.0f} s", flush=True)


def switch_on(notebook, *names):
    """Set FAST or PROVE to True: (the cell with the settings, its source as it was)."""
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    before = settings.source
    for name in names:
        settings.source, found = re.subn(f"^{name} = False", f"{name} = True", settings.source, flags=re.M)
        assert found == 1, f"{name} = False is not among the settings"
    return settings, before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small networks and few images")
    parser.add_argument("--prove", action="store_true", help="with appendix B")
    parser.add_argument("--in", dest="folder", default=".")
    parser.add_argument("--timeout", type=int, help="seconds that a cell may take")
    options = parser.parse_args()
    path = Path(options.folder) / "PixelCNN.ipynb"
    notebook = nbformat.read(path, as_version=4)
    settings, before = switch_on(notebook, *["FAST"] * options.fast, *["PROVE"] * options.prove)
    client = Telling(notebook, timeout=options.timeout, resources={"metadata": {"path": str(path.parent.resolve())}})

    def keep():
        changed, settings.source = settings.source, before
        nbformat.write(notebook, path)
        settings.source = changed

    client.begun, client.section, client.keep = time.monotonic(), "", keep
    try:
        client.execute()
    finally:
        keep()


if __name__ == "__main__":
    main()
