"""The whole notebook, executed in FAST mode in a clone; and what is committed beside it."""

import ast
import base64
import copy
import json
import math
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from bounds import FALSE_ALARM
from calibrate import bound_from_above, judgement
from execute import APART, RESULTS, last_cells, publish, set_fast
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ONCE = "monotonic", "seconds", "load_checkpoint", "show_completed", "gibbs_chains"  # other times, or slow


def changed_files(folder):
    """Of a clone, as git sees them; the notebook itself and the link to the data aside."""
    said = subprocess.run(["git", "status", "--porcelain"], cwd=folder, check=True, capture_output=True, text=True)
    return [line for line in said.stdout.splitlines() if not line.endswith(("PixelCNN.ipynb", "data"))]


@pytest.fixture(scope="module")
def executed(root, mnist, tmp_path_factory):
    """(executed notebook, its clone): FAST, most cells twice, and at the end what a published run has there."""
    folder = tmp_path_factory.mktemp("run") / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{root}", folder], check=True)
    (folder / "PixelCNN.ipynb").write_bytes((root / "PixelCNN.ipynb").read_bytes())  # as it is here
    (folder / "data").symlink_to(root / "data")
    notebook = nbformat.read(folder / "PixelCNN.ipynb", as_version=4)
    set_fast(notebook)
    cells = []
    for cell in notebook.cells:
        twice = cell.cell_type == "code" and not any(word in cell.source for word in ONCE)
        cells += [copy.deepcopy(cell) for _ in range(1 + twice)]
    notebook.cells = cells + last_cells()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    return notebook, folder


def said_by(cell):
    """What a cell printed, and its tables as text."""
    return "".join(o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "")
                   for o in cell.outputs)


def pictures_of(notebook):
    """Outputs with a picture."""
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]


@pytest.mark.slow
def test_running_a_cell_again_gives_the_same_result(executed):
    """It would see what accumulates, and randomness without a seed."""
    pairs = [(first, again) for first, again in zip(executed[0].cells, executed[0].cells[1:])
             if first.cell_type == "code" and first.source == again.source]
    assert [first.source for first, again in pairs if said_by(first) != said_by(again)] == []
    assert sum(len(said_by(first)) > 0 for first, _ in pairs) >= 10


@pytest.mark.slow
def test_a_run_makes_its_pictures_its_first_screen_its_results_and_its_networks(executed, root, nb):
    """It would see a name in execute.py or hero.py that the notebook no longer has, and a picture of the README that
    no run makes."""
    run = executed[1] / "run"
    assert sum("whole notebook:" in said_by(cell) for cell in executed[0].cells if cell.cell_type == "code") == 1
    wanted = re.findall(r"\(figures/([\w.]+\.png)\)", (root / "README.md").read_text())
    assert wanted and all((run / name).stat().st_size > 1000 for name in wanted)
    hero = (run / "hero.txt").read_text()
    assert base64.b64decode(hero).startswith(b"\x89PNG") and len(hero) < 120_000
    assert nb.load_checkpoint(run / "fast" / "small.pt", "cpu").history[-1]["images"] == 512
    fast = json.loads((run / "results.json").read_text())
    assert set(fast) == {"device", "weights", "results"} and [*fast["results"]] == [name for name, *_ in RESULTS]
    found = {name: entry["value"] for name, entry in fast["results"].items()}
    assert all(math.isfinite(value) for value in found.values())
    assert found["tiny_total_variation_weights"] < 0.1 < found["tiny_total_variation_forward_gibbs"]


@pytest.mark.slow
def test_figures_have_alt_text_also_as_html(executed):
    """It would see a picture without a description, on GitHub, in Colab or in Jupyter."""
    pictures = pictures_of(executed[0])
    assert len(pictures) >= 20 and all(o.metadata["image/png"]["alt"] for o in pictures)
    page, _ = HTMLExporter().from_notebook_node(executed[0])
    alts = set(re.findall(r'<img [^>]*alt="([^"]+)"', page))
    assert len(alts) >= 20 and "No description has been provided for this image" not in alts


@pytest.mark.slow
def test_a_run_changes_no_released_file(executed):
    assert not changed_files(executed[1])
    (executed[1] / "README.md").write_text("")  # the control: a change is seen
    assert changed_files(executed[1]) == [" M README.md"]


def test_a_folder_that_cannot_be_made_is_said_before_training(nb, cells):
    """It would see a training whose weights go where no Drive is mounted."""
    (source,) = [s for s in ("".join(cell["source"]) for cell in cells) if s.startswith("WEIGHTS = ")]
    with pytest.raises(ValueError, match="SAVE_DIR: .*no/drive/here"):
        exec(source, {**vars(nb), "FAST": False, "SAVE_DIR": "no/drive/here"})


def test_a_whole_run_is_published(tmp_path):
    """Its pictures and results in place of the old ones, its hero in the first cell; what was found apart is taken over
    where the weights are the same. It would see old pictures that stay, and results of other weights."""
    made, figures, apart = tmp_path / "run", tmp_path / "figures", tmp_path / "apart.json"
    made.mkdir(), figures.mkdir()
    (figures / "old.png").write_bytes(b"old")
    (made / "new.png").write_bytes(b"new")
    (made / "results.json").write_text(json.dumps(dict(weights={"small.pt": "1", "leaky.pt": "2"}, results={"a": 1})))
    (made / "hero.txt").write_text("bmV3")
    for weights, wanted in (("1", {"a": 1, "b": 2}), ("0", {"a": 1})):
        apart.write_text(json.dumps(dict(weights={"small.pt": weights}, results={"b": 2})))
        cell = nbformat.v4.new_markdown_cell("![alt](data:image/png;base64,b2xk) text")
        publish(made, figures, cell, apart)
        assert sorted(path.name for path in figures.iterdir()) == ["new.png", "results.json"]
        assert json.loads((figures / "results.json").read_text())["results"] == wanted
        assert cell.source == "![alt](data:image/png;base64,bmV3) text"


# What is committed ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def released(root):
    """The notebook with its outputs."""
    return nbformat.read(root / "PixelCNN.ipynb", as_version=4)


@pytest.fixture(scope="module")
def results(root):
    return json.loads((root / "figures" / "results.json").read_text())


def test_the_notebook_is_a_whole_clean_run(released):
    """It would see cells run out of order or not at all, errors, a path of the machine, FAST left on, and pictures
    without alt text."""
    code = [cell for cell in released.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert len(pictures_of(released)) >= 20
    assert all(o.metadata["image/png"]["alt"] for o in pictures_of(released))
    text = re.sub(r'[A-Za-z0-9+/=\\n]{400,}', "", nbformat.writes(released))  # without pictures
    assert not re.findall(r"/(?:home|root|tmp|work|Users|mnt|usr)/\S*", text)
    assert "FAST = False" in text and "class Walk:" in text  # the control: source was not cut away


def test_the_first_cell_shows_a_picture(released):
    """Small enough to be shown, with an alt text."""
    (found,) = re.findall(r"!\[([^\]]+)\]\(data:image/png;base64,([^)]*)\)", released.cells[0].source)
    assert len(found[0]) > 40 and len(found[1]) <= 120_000
    assert base64.b64decode(found[1]).startswith(b"\x89PNG")


def test_the_requirements_are_what_is_imported(root, cells):
    """It would see an import that a fresh environment lacks; pillow comes with matplotlib, IPython with jupyter."""
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    brought = dict(PIL="matplotlib", IPython="jupyter")
    required = re.findall(r"^\w+", (root / "requirements.txt").read_text(), flags=re.M)
    assert {brought.get(name, name) for name in names - sys.stdlib_module_names} == set(required)


@pytest.mark.parametrize("where", ["README.md", "the notebook"])
def test_every_marked_number_is_in_the_results(root, cells, results, where):
    """A figure is written as `value<!-- name -->`, with as many digits as it likes. It would see a number of another
    run, and a mark without a number."""
    text = ((root / where).read_text() if where == "README.md" else
            "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))
    marked = re.findall(r"(\S*)<!-- (\w+?)(_stderr)? -->", text)
    assert len(marked) >= (10 if where == "README.md" else 0)
    for shown, name, stderr in marked:
        value = results["results"][name]["stderr" if stderr else "value"]
        shown = re.search(r"[\d,.]*$", shown)[0]
        digits = len(shown.split(".")[1]) if "." in shown else 0
        assert f"{value:,.{digits}f}" == shown, f"{name}: {where} says {shown or 'nothing'}, results.json {value}"


def test_the_released_run_keeps_its_promises(root, nb, results):
    """The results are of these weights, and complete; the model beats its bar with no more parameters than UVA's; 20
    minutes on two cores; of hidden centres, where the truth stands among the answers' draws is uniform (named before:
    no P below 0.05), 0.8 of the intervals reach the bound, and the median error of log Z is 0.3 nats at most."""
    apart = json.loads(APART.read_text())
    assert results["weights"] == {name: nb.sha256_of(root / "checkpoints" / name) for name in results["weights"]}
    assert apart["weights"].items() <= results["weights"].items()
    assert set(results["results"]) == {name for name, *_ in RESULTS} | set(apart["results"])
    assert all(set(entry) == {"value", "stderr", "n", "how"} for entry in results["results"].values())
    value = {name: entry["value"] for name, entry in results["results"].items()}
    assert value["test_bits_per_dim"] <= 0.66 and results["results"]["test_bits_per_dim"]["n"] == 10_000
    assert value["parameters"] <= 852_160
    assert value["notebook_minutes"] <= 20
    assert results["results"]["calibration_centre_answered"]["n"] >= 40
    for by in ("log_p", "log_w"):
        assert value[f"calibration_centre_place_by_{by}_p"] >= 0.05
    assert value["calibration_centre_bound_reached_share"] >= 0.8
    assert value["calibration_centre_median_stderr_nats"] <= 0.3


@pytest.mark.parametrize("shift, uniform", [(0, True), (0.7, False)])
def test_the_judge_of_recorded_answers_tells_truths_from_others(shift, uniform):
    """Cases whose posterior is a standard normal and whose guide is wider. It would see places that are not uniform for
    draws of the posterior, or are for others (the control: truths that lie to one side), and a bound below log Z."""
    def case(number):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(501, generator=generator, dtype=torch.float64) * 1.5
        x[0] = x[0] / 1.5 + shift  # the truth
        log_w = math.log(1.5) - x**2 / 2 + (x / 1.5) ** 2 / 2  # p/g; log Z is 0
        return dict(status="converged", log_evidence=0.0, stderr=0.05, log_p=x[0].item(), log_w=log_w[0].item(),
                    found=dict(log_p=x[1:], log_w=log_w[1:]))

    cases = [case(number) for number in range(400)]
    found = judgement([*cases, dict(status="not converged")])
    assert found["answered"][::2] == (400, 401) and abs(found["widest_gap_nats"][0]) < 0.2
    assert (found["place_by_log_p_p"][0] > FALSE_ALARM) == uniform
    assert abs(torch.tensor([bound_from_above(case) for case in cases]).mean()) < 0.01
