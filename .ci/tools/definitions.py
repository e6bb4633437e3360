"""The notebook's `define` cells, all of them and nothing else, as one module. They are the first to import torch."""

import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("MPLBACKEND", "agg")


def notebook_cells():
    return json.loads((ROOT / "PixelCNN.ipynb").read_text())["cells"]


def definitions():
    nb = types.ModuleType("pixelcnn_notebook")
    sys.modules[nb.__name__] = nb
    for number, cell in enumerate(notebook_cells()):
        if "define" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"PixelCNN.ipynb cell {number}", "exec"), nb.__dict__)
    return nb
