"""Puts the picture of the first screen into cell 0: completions of question G and forward Gibbs draws, cut out of
figures/question_g.png, with their verdicts; below them the questions A to G as small grids.

usage: python .ci/tools/hero.py [--rows 0,1,2]
"""
import argparse
import base64
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from definitions import ROOT, definitions, notebook_cells

KNOWN, UNKNOWN = "#404040", "#cddff0"  # what is asked: the notebook's THIRD
NOTES = "exact", "draws, averaged", "exact", "sampler + E", "exact", "exact draws", "sampler"


def cut_out(nb, statuses):
    """The pictures of figures/question_g.png, [rows][columns], arrays: it is laid out anew to see where they stand."""
    labels = [f"test image {number}\n{status}" for number, status in enumerate(statuses)]
    blank = [[np.zeros((28, 28))] * len(nb.BESIDE_WRONG)] * len(labels)
    figure = nb.draw_images(blank, labels, nb.BESIDE_WRONG, scale=0.8)
    figure.savefig(io.BytesIO())
    picture = np.asarray(Image.open(ROOT / "figures" / "question_g.png").convert("RGB"))
    boxes = np.array([axis.get_position().extents for axis in figure.axes])
    plt.close(figure)
    height, width = picture.shape[:2]
    sides = np.round(boxes * [width, height, width, height]).astype(int)
    found = [picture[height - top + 1 : height - bottom - 1, left + 1 : right - 1]
             for left, bottom, right, top in sides]
    columns = len(nb.BESIDE_WRONG)
    return [found[k : k + columns] for k in range(0, len(found), columns)]


def question_grids(asked_colour):
    """Small pictures of A to G: what is known, asked and unknown."""
    place, centre = np.arange(784).reshape(28, 28), 14 * 28 + 14
    known = [place < 0, place < 0, place < centre, place > centre, place != centre, place < 392, place >= 392]
    asked = [place == 0, *[place == centre] * 4, place >= 392, place < 392]
    for k, a in zip(known, asked):
        if a.sum() == 1:  # large enough to be seen
            row, column = np.argwhere(a)[0]
            a = np.zeros_like(a)
            a[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (UNKNOWN, KNOWN, asked_colour)]
        yield np.array(colours, dtype=np.uint8)[np.where(a, 2, k)]


def draw(nb, rows, statuses):
    """The hero as PNG bytes. rows: pictures of digits, as cut_out has them."""
    figure = plt.figure(figsize=(8.6, 1.3 + 0.8 * len(rows)), layout="none")
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[0.8 * len(rows), 1.15], hspace=0.2, left=0.01, right=0.99,
                                      top=0.93, bottom=0.08)
    grid = top.subgridspec(len(rows), 11, width_ratios=[1, 0.75] + [1] * 4 + [0.35] + [1] * 3 + [0.01], hspace=0.08)
    for line, (pictures, status) in enumerate(zip(rows, statuses)):
        for column, picture in zip((0, 2, 3, 4, 5, 7, 8, 9), (pictures[1], *pictures[2:6], *pictures[8:])):
            axis = figure.add_subplot(grid[line, column])
            axis.imshow(picture)
            axis.axis("off")
            if line == 0 and column in (0, 3, 8):
                text, colour = {0: ("known", "k"), 3: ("       completed by this notebook", nb.ACCENT),
                                8: ("by the usual “Gibbs”", nb.THIRD)}[column]
                axis.set_title(text, fontsize=10, color=colour, loc="left" if column < 8 else "center")
            if column == 0:
                axis.text(1.08, 0.5, status.replace("not converged", "refused"), transform=axis.transAxes,
                          fontsize=7, va="center")
    grid = bottom.subgridspec(1, 7, wspace=0.5)
    for cell, letter, note, picture in zip(range(7), "ABCDEFG", NOTES, question_grids(nb.THIRD)):
        axis = figure.add_subplot(grid[cell])
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.set_title(letter, fontsize=9, pad=2)
        axis.set_xlabel(note, fontsize=7.5, labelpad=2)
    figure.text(0.5, 0.005, "dark: known      orange: asked      blue: not known", ha="center", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    plt.close(figure)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return small.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="0,1,2", help="which of the three digits")
    chosen = [int(row) for row in parser.parse_args().rows.split(",")]
    path, nb = ROOT / "PixelCNN.ipynb", definitions()
    shown = [text for cell in notebook_cells() for output in cell.get("outputs", [])
             if "question G," in (text := "".join(output.get("data", {}).get("text/plain", "")))]
    statuses = re.findall(r"test image \d+ +((?:not )?converged|exact)", shown[0])
    pictures = cut_out(nb, statuses)
    png = draw(nb, [pictures[k] for k in chosen], [statuses[k] for k in chosen])
    book = json.loads(path.read_text())
    book["cells"][0]["source"] = re.sub(r"base64,[A-Za-z0-9+/=]+", lambda _: "base64," + base64.b64encode(png).decode(),
                                        "".join(book["cells"][0]["source"])).splitlines(keepends=True)
    nb.save_atomically((json.dumps(book, indent=1, ensure_ascii=False) + "\n").encode(), path)
    print(f"{len(png) * 4 // 3:,} characters")


if __name__ == "__main__":
    main()
