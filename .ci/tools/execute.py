"""Run the notebook top to bottom and say, cell by cell, where it is and how long it took; nbconvert is silent.

usage: python .ci/tools/execute.py [--fast] [--prove] [--publish] [--in FOLDER] [--timeout SECONDS]
FOLDER (default: here) holds PixelCNN.ipynb; after every section it gets the outputs, its settings as they were.
--publish: the released run. With PROVE, from an empty run/; when it has ended, its pictures and results replace those of
figures/, with what calibrate.py found apart for the same weights, and the picture of the first screen is drawn anew
(hero.py).
"""
import argparse
import copy
import json
import re
import shutil
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOOLS = Path(__file__).resolve().parent
APART = TOOLS / "record" / "apart.json"


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


def publish(made, figures, first_cell, apart=APART):
    """Put the pictures and results of a whole run in place of those in `figures`, and its hero into the first cell."""
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir()
    for path in [*made.glob("*.png"), *made.glob("*.gif")]:
        shutil.copy(path, figures)
    results = json.loads((made / "results.json").read_text())
    if apart.exists():
        found = json.loads(apart.read_text())
        if found["weights"].items() <= results["weights"].items():
            results["results"] |= found["results"]
    (figures / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    hero = (made / "hero.txt").read_text()
    first_cell.source, found = re.subn(r"base64,[A-Za-z0-9+/=]+", lambda _: f"base64,{hero}", first_cell.source)
    assert found == 1, "the first cell has no picture"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small networks and few images")
    parser.add_argument("--prove", action="store_true", help="with appendix B")
    parser.add_argument("--publish", action="store_true", help="the released run")
    parser.add_argument("--in", dest="folder", default=".")
    parser.add_argument("--timeout", type=int, help="seconds that a cell may take")
    options = parser.parse_args()
    folder = Path(options.folder)
    notebook = nbformat.read(folder / "PixelCNN.ipynb", as_version=4)
    settings, before = switch_on(notebook, *["FAST"] * options.fast, *["PROVE"] * (options.prove or options.publish))
    cells = notebook.cells
    if options.publish:
        shutil.rmtree(folder / "run", ignore_errors=True)
        notebook.cells = [*cells, nbformat.v4.new_code_cell((TOOLS / "hero.py").read_text())]
    client = Telling(notebook, timeout=options.timeout, resources={"metadata": {"path": str(folder.resolve())}})

    def keep():
        kept = copy.copy(notebook)
        kept.cells = cells
        changed, settings.source = settings.source, before
        nbformat.write(kept, folder / "PixelCNN.ipynb")
        settings.source = changed

    client.begun, client.section, client.keep = time.monotonic(), "", keep
    try:
        client.execute()
        if options.publish:
            publish(folder / "run", folder / "figures", cells[0])
    finally:
        keep()


if __name__ == "__main__":
    main()
