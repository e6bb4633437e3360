"""The whole notebook, executed in FAST mode; and what is committed beside it."""

import copy
import json
import os
import re
import shutil

import nbformat
import pytest
from execute import switch_on
from nbclient import NotebookClient
from nbconvert import HTMLExporter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(root, mnist, tmp_path_factory):
    """(executed notebook, its working folder): FAST and PROVE, no checkpoint, so it trains; each cell run twice."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(root / "data", folder / "data")
    notebook = nbformat.read(root / "PixelCNN.ipynb", as_version=4)
    switch_on(notebook, "FAST", "PROVE")
    notebook.cells = [copy.deepcopy(c) for c in notebook.cells for _ in range(1 + (c.cell_type == "code"))]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    return notebook, folder


def said_by(cell):
    """What a cell printed, and its tables as text."""
    return "".join(o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "")
                   for o in cell.outputs)


def printed(notebook):
    return "".join(said_by(cell) for cell in notebook.cells if cell.cell_type == "code")


def test_running_a_cell_again_gives_the_same_result(executed):
    """Nothing accumulates. Left out: cells that print times, and those that train first and load then."""
    cells, compared, changed = executed[0].cells, 0, []
    for first, again in zip(cells, cells[1:]):
        if first.cell_type == "code" and first.source == again.source:
            said = [said_by(cell) for cell in (first, again)]
            if not any(word in first.source for word in ("monotonic", "seconds", "load_or_train")):
                compared += len(said[0]) > 0
                if said[0] != said[1]:
                    changed.append((first.source, *said))
    assert not changed and compared >= 10


def test_it_runs_top_to_bottom_and_says_what_it_should(executed):
    notebook, _ = executed
    text = printed(notebook)
    for phrase in ("test NLL:", "(mask A in the first layer)", "question G", "|z| of E[Z-hat / Z] = 1",
                   "whole notebook:"):
        assert phrase in text
    assert "FAILED" not in text and "NOT CAUGHT" not in text


def test_every_picture_of_the_readme_is_written(executed, root):
    _, folder = executed
    wanted = re.findall(r"\(figures/([\w.]+)\)", (root / "README.md").read_text())
    assert wanted and all((folder / "run" / name).stat().st_size > 1000 for name in wanted)


def test_results_are_complete_and_well_formed(executed, root):
    _, folder = executed
    fast = json.loads((folder / "run" / "results.json").read_text())
    saved = json.loads((root / "figures" / "results.json").read_text())
    assert set(saved) == set(fast)
    for entry in fast.values():
        assert set(entry) == {"value", "stderr", "unit", "n", "how", "device", "weights"}
    assert fast["tiny_total_variation_smc"]["value"] < 0.1 < fast["tiny_total_variation_forward_gibbs"]["value"]


def test_a_run_in_small_publishes_nothing(executed, root):
    _, folder = executed
    assert not (folder / "figures").exists()


def test_what_is_not_a_whole_run_leaves_the_released_files(nb, tmp_path):
    """And a whole one drops what other weights gave, and keeps appendix B's of its own."""
    made, folder, start = tmp_path / "run", tmp_path / "figures", 1e9
    made.mkdir(), folder.mkdir()

    def results(weights, *names):
        return {name: dict(value=1.0, weights=weights) for name in names}

    def released():
        return json.loads((folder / "results.json").read_text())

    (made / "old.png").write_bytes(b"old"), (made / "new.png").write_bytes(b"new")
    os.utime(made / "old.png", (start - 1, start - 1))
    main_line = "test_bits", "notebook_minutes"
    assert "published" in nb.publish(results("a", *main_line, "rank"), start, made, folder)
    assert [path.name for path in folder.glob("*.png")] == ["new.png"]
    before = released()
    for part in (main_line[:1], main_line[1:]):  # interrupted; only the last cells
        assert "stays as it was: this run did not make" in nb.publish(results("b", *part), start, made, folder)
        assert released() == before
    nb.publish(results("a", *main_line), start, made, folder)
    assert "rank" in released()
    nb.publish(results("b", *main_line), start, made, folder)
    assert set(released()) == set(main_line)


def test_checkpoints_are_written_and_loaded_again(executed, nb):
    _, folder = executed
    assert nb.load_checkpoint(folder / "checkpoints" / "fast_small.pt", "cpu").config.images_seen == 512


def test_figures_have_alt_text_also_as_html(executed):
    notebook, _ = executed
    pictures = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs
                if "image/png" in o.get("data", {}) and o.output_type == "display_data" and "alt" in str(o.metadata)]
    assert len(pictures) >= 20
    page, _ = HTMLExporter().from_notebook_node(notebook)
    alts = set(re.findall(r'<img [^>]*alt="([^"]+)"', page))
    assert len(alts) >= 20 and "No description has been provided for this image" not in alts


@pytest.mark.parametrize("where", ["README.md", "the notebook's first cell"])
def test_every_marked_number_is_in_the_results(root, cells, where):
    """A figure is written as `value<!-- name -->`, with as many digits as it likes."""
    results = json.loads((root / "figures" / "results.json").read_text())
    text = (root / where).read_text() if where == "README.md" else "".join(cells[0]["source"])
    marked = re.findall(r"([\d,.]+)<!-- (\w+?)(_stderr)? -->", text)
    assert len(marked) >= 10
    for shown, name, stderr in marked:
        value = results[name]["stderr" if stderr else "value"]
        digits = len(shown.split(".")[1]) if "." in shown else 0
        assert f"{value:,.{digits}f}" == shown, f"{name}: {where} says {shown}, results.json {value}"


def test_the_released_model_beats_its_bar(root):
    results = json.loads((root / "figures" / "results.json").read_text())
    assert results["test_bits_per_dim"]["value"] <= 0.66
    assert results["test_bits_per_dim"]["n"] == 10_000
    assert results["parameters"]["value"] <= 852_160


def test_the_saved_run_took_no_longer_than_promised(root):
    """On two cores 20 minutes, and an hour more with appendix B."""
    results = json.loads((root / "figures" / "results.json").read_text())
    assert results["notebook_minutes"]["value"] <= 20
    if "notebook_minutes_proved" in results:
        assert results["notebook_minutes_proved"]["value"] - results["notebook_minutes"]["value"] <= 90
