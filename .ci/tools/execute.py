"""Run the notebook top to bottom and say, cell by cell, where it is and how long it took; nbconvert is silent.

usage: python .ci/tools/execute.py [--fast] [--publish] [--in FOLDER]
FOLDER (default: here) holds PixelCNN.ipynb; after every section it gets the outputs but for progress bars, its settings
as they were.
--publish: the released run, from an empty run/. When it has ended, its pictures and the RESULTS below, with what
calibrate.py found apart for the same weights, replace those of figures/, and the picture of the first screen is drawn
anew (hero.py).
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
WIDGET = "application/vnd.jupyter.widget-view+json"

# Name, what it is, its standard error, n, and how it came about; but for the last expressions in the notebook's names.
RESULTS = [
    ("test_bits_per_dim", "test_bits.mean()", "mean_and_error(test_bits)[1]", "len(test_bits)",
     "released checkpoint, exact log-likelihood in float32, stderr over images"),
    ("test_nats_per_image", "test_nats.mean()", "mean_and_error(test_nats)[1]", "len(test_nats)", "the same"),
    ("parameters", "parameter_count", None, "1", "counted"),
    ("epochs", "model.history[-1]['images'] / 55_000", None, "1", "images seen over images in the training set"),
    ("smallest_bits_per_pixel", "smallest_bits", None, "len(coarse_validation)",
     "smallest model, 14x14 pixels of four levels"),
    ("small_bits_per_pixel", "small_bits", None, "len(coarse_validation)", "small version, the same images"),
    ("leaky_smallest_invalid_bits_per_pixel", "leaky_bits", None, "len(coarse_validation)",
     "smallest model with mask B in the first layer: not a likelihood"),
    ("causality_largest_leak_logit", "trained_leak", None, "14 * 28",
     "each pixel of the upper half of a test image changed, float64, all outputs at it or before it"),
    ("sample_bits_per_dim", "sample_bits.mean()", "mean_and_error(sample_bits)[1]", "len(sample_bits)",
     "the model's own draws"),
    ("sampler_speedup_vs_naive_batch64", "784 / passes[64]", None, "64",
     "wall clock, better of two; the naive loop: one pass in the fastest parts, times 784"),
    ("sampler_speedup_vs_naive_batch256", "784 / passes[256]", None, "256", "the same"),
    ("sampler_times_one_pass_batch256", "passes[256]", None, "256", "wall clock, better of two"),
    ("question_a_probability_of_0", "first_pixel_marginal[0]", None, "1", "exact, one softmax"),
    ("question_b_probability_of_ink", "1 - centre_marginal[0]", "centre_error[0]", "len(centre_terms)",
     "mean over the model's draws of p(x_i | x_<i)"),
    ("tiny_total_variation_forward_gibbs", "gibbs_distance['forward Gibbs']", None, "len(tiny_forward)",
     "forward Gibbs against enumeration, 3x3 model"),
    ("tiny_total_variation_weights", "tiny_weighted_distance", None, "len(tiny_found.log_w)",
     "weighted draws of the model alone against enumeration, 3x3 model"),
    ("completions_converged_of_6", "[found.status for found in answers.values()].count('converged')", None,
     "len(answers)", "three tops of test digits, three other masks"),
    ("notebook_minutes", "(time.monotonic() - run_started) / 60", None, "1", "this run, checkpoints loaded"),
]

RESULTS_CELL = f"""import json
(RUN / "results.json").write_text(json.dumps(dict(
    device=where if device.type == "cuda" else f"CPU, {{torch.get_num_threads()}} threads",
    weights={{file: hashlib.sha256((WEIGHTS / file).read_bytes()).hexdigest() for file in ("pixelcnn.pt", "guide.pt")}},
    results={{name: dict(value=float(eval(value)), stderr=stderr and float(eval(stderr)), n=eval(n), how=how)
             for name, value, stderr, n, how in {RESULTS!r}}})))"""


def last_cells():
    """What a published run has at its end: the results, and the picture of the first screen."""
    return [nbformat.v4.new_code_cell(source) for source in (RESULTS_CELL, (TOOLS / "hero.py").read_text())]


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


def set_fast(notebook, fast=True):
    """Set FAST in the cell with the settings."""
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source, found = re.subn(r"^FAST = \w+", f"FAST = {fast}", settings.source, flags=re.M)
    assert found == 1, "FAST is not among the settings"


def publish(made, figures, first_cell):
    """Put the pictures and results of a whole run in place of those in `figures`, and its hero into the first cell."""
    results = json.loads((made / "results.json").read_text())
    apart = json.loads(APART.read_text())
    if apart["weights"] == results["weights"]:
        results["results"] |= apart["results"]
    else:
        print(f"{APART.name} is of other weights, and left out")
    hero = (made / "hero.txt").read_text()
    first_cell.source, found = re.subn(r"base64,[A-Za-z0-9+/=]+", lambda _: f"base64,{hero}", first_cell.source)
    assert found == 1, "the first cell has no picture"
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir()
    for path in made.glob("*.png"):
        shutil.copy(path, figures)
    (figures / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small networks and few images")
    parser.add_argument("--publish", action="store_true", help="the released run")
    parser.add_argument("--in", dest="folder", default=".")
    options = parser.parse_args()
    folder = Path(options.folder)
    if options.fast and folder.resolve() == TOOLS.parents[1]:
        parser.error("--fast would overwrite the released outputs; name a copy by --in")
    notebook = nbformat.read(folder / "PixelCNN.ipynb", as_version=4)
    count = len(notebook.cells)
    if options.fast:
        set_fast(notebook)
    if options.publish:
        shutil.rmtree(folder / "run", ignore_errors=True)
        notebook.cells += last_cells()
    client = Telling(notebook, record_timing=False, store_widget_state=False,
                     resources={"metadata": {"path": str(folder.resolve())}})

    def keep():
        kept = copy.deepcopy(notebook)
        kept.cells = kept.cells[:count]
        kept.metadata.pop("widgets", None)  # of an earlier run; GitHub does not show a notebook that has them
        for cell in kept.cells:
            if "outputs" in cell:  # a bar says nothing when it is done (and in a notebook tqdm ignores TQDM_DISABLE)
                cell.outputs = [x for x in cell.outputs if WIDGET not in x.get("data", {})]
        if options.fast:
            set_fast(kept, False)
        temporary = folder / "PixelCNN.tmp"  # an interrupted write loses nothing
        nbformat.write(kept, temporary)
        temporary.replace(folder / "PixelCNN.ipynb")

    client.begun, client.section, client.keep = time.monotonic(), "", keep
    try:
        client.execute()
        if options.publish:
            publish(folder / "run", folder / "figures", notebook.cells[0])
    finally:
        keep()


if __name__ == "__main__":
    main()
