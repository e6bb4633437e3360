"""The picture of the first screen: completions of question G beside forward Gibbs, below them the questions as grids.
It is the last cell of a run that is published (execute.py), and writes run/hero.txt, base64 of a PNG."""
import base64, io
KNOWN, UNKNOWN = "#404040", "#cddff0"  # what is asked: ORANGE
NOTES = "exact", "draws, averaged", "exact", "weights + E", "exact", "exact draws", "weighted draws"


def question_grids():
    """Small pictures of A to G: what is known, asked and unknown."""
    place, centre = np.arange(784).reshape(28, 28), 14 * 28 + 14
    known = [place < 0, place < 0, place < centre, place > centre, place != centre, place < 392, place >= 392]
    asked = [place == 0, *[place == centre] * 4, place >= 392, place < 392]
    for k, a in zip(known, asked):
        if a.sum() == 1:  # large enough to be seen
            row, column = np.argwhere(a)[0]
            a[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (UNKNOWN, KNOWN, ORANGE)]
        yield np.array(colours, dtype=np.uint8)[np.where(a, 2, k)]


tops = [name for name in cases if name.startswith("top of")]
figure = plt.figure(figsize=(8.6, 1.3 + 0.8 * len(tops)), layout="none")
top, bottom = figure.add_gridspec(2, 1, height_ratios=[0.8 * len(tops), 1.15], hspace=0.2, left=0.01, right=0.99,
                                  top=0.93, bottom=0.08)
grid = top.subgridspec(len(tops), 10, width_ratios=[1, 0.75] + [1] * 4 + [0.35] + [1] * 3, hspace=0.08)
titles = {0: ("known", "k"), 3: ("       completed by this notebook", BLUE), 8: ("by forward Gibbs", ORANGE)}
for line, name in enumerate(tops):
    (image, *_), found = cases[name], answers[name]
    verdict = found.status.replace("not converged", "refused")
    _, *shown = completed(image, bottom_known, found.pick(4, 100), verdict == "refused")
    shown += [tinted(x, bottom_known) for x in sample(model, 3, image=image, known=bottom_known, seed=513)]
    for column, picture in zip((0, 2, 3, 4, 5, 7, 8, 9), shown):
        axis = figure.add_subplot(grid[line, column])
        axis.imshow(picture)
        axis.axis("off")
        if line == 0 and column in titles:
            text, colour = titles[column]
            axis.set_title(text, fontsize=10, color=colour, loc="left" if column < 8 else "center")
        if column == 0:
            axis.text(1.08, 0.5, verdict, transform=axis.transAxes, fontsize=7, va="center")
grid = bottom.subgridspec(1, 7, wspace=0.5)
for cell, (letter, note, picture) in enumerate(zip("ABCDEFG", NOTES, question_grids())):
    axis = figure.add_subplot(grid[cell])
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.set_title(letter, fontsize=9, pad=2)
    axis.set_xlabel(note, fontsize=7.5, labelpad=2)
figure.text(0.5, 0.005, "dark: known      orange: asked      blue: not known", ha="center", fontsize=8)
picture, packed = io.BytesIO(), io.BytesIO()
figure.savefig(picture, dpi=130)
Image.open(picture).convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
(RUN / "hero.txt").write_bytes(base64.b64encode(packed.getvalue()))
