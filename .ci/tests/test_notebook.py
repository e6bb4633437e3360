"""The whole notebook, executed in FAST mode in a clone; what is committed; what a reader is told to copy."""

import ast
import base64
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from calibrate import binned, case_of, digests, judgement, limit
from conftest import FALSE_ALARM, MANY
from definitions import ROOT, notebook_cells
from execute import APART, RESULTS, WIDGET
from nbconvert import HTMLExporter
from PIL import Image

README = (ROOT / "README.md").read_text()
SOURCES = {kind: ["".join(cell["source"]) for cell in notebook_cells() if cell["cell_type"] == kind]
           for kind in ("code", "markdown")}
RELEASED = json.loads((ROOT / "figures" / "results.json").read_text())
HERO = r"!\[([^\]]+)\]\(data:image/png;base64,([^)]*)\)"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "Colab"])
def test_a_run_makes_what_is_published_and_changes_nothing_else(mnist, tmp_path, where):
    """It would see a cell that fails, here or with Colab's packages, a name in execute.py or hero.py that the notebook
    no longer has, a picture of the README that no run makes, a progress bar that stays, and a released file that
    changes. (The control: those that a published run replaces are seen.)"""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", folder], check=True)
    shutil.copy(ROOT / "PixelCNN.ipynb", folder)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "figures" / "old.png").touch()
    old = (folder / "PixelCNN.ipynb").read_text()
    python = Path(sys.executable)
    if where == "Colab":  # an environment with the versions that .ci/colab.txt names (torch aside)
        python = ROOT / ".venv-colab" / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / ".ci" / "colab.txt"], check=True)
    command = [python, ROOT / ".ci" / "tools" / "execute.py", "--fast", "--publish", "--in", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    changed = subprocess.check_output(["git", "status", "--porcelain"], cwd=folder, text=True).split()[1::2]
    assert {"PixelCNN.ipynb", "figures/results.json"} <= set(changed)
    assert all(name in ("PixelCNN.ipynb", "data") or name.startswith("figures/") for name in changed)
    wanted = re.findall(r"\(figures/([\w.]+\.png)\)", README)
    assert wanted and all((folder / "figures" / name).stat().st_size > 1000 for name in wanted)
    assert not (folder / "figures" / "old.png").exists()
    new = (folder / "PixelCNN.ipynb").read_text()
    assert new.count("whole notebook:") >= 2 and re.search(HERO, new)[2] != re.search(HERO, old)[2]
    assert "widget" not in new and "100%|" not in new  # no progress bars
    assert new.count(".pt is missing: it is trained") == 2  # FAST loads no weights
    results = json.loads((folder / "figures" / "results.json").read_text())["results"]
    assert [*results] == [name for name, *_ in RESULTS] and all(math.isfinite(x["value"]) for x in results.values())
    weights, forward = (results[f"tiny_total_variation_{name}"]["value"] for name in ("weights", "forward_gibbs"))
    assert weights < 0.1 < forward


# What is committed ---------------------------------------------------------------------------------

def test_the_notebook_is_a_whole_clean_run():
    """As committed, whatever a reader's own run has printed since. It would see cells run out of order or not at all,
    errors, progress bars, a path of the machine, FAST left on, a picture without a description (of nbconvert's
    templates the classic one shows it), outputs of another run than results.json, no picture on the first screen."""
    committed = subprocess.check_output(["git", "show", "HEAD:PixelCNN.ipynb"], cwd=ROOT, text=True)
    notebook = nbformat.reads(committed, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 20 and all(o.metadata["image/png"]["alt"] for o in pictures)
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
    alts = set(re.findall(r'<img [^>]*alt="([^"]+)"', page))
    assert len(alts) >= 20 and "No description has been provided for this image" not in alts
    text = re.sub(r'[A-Za-z0-9+/=\\n]{400,}', "", nbformat.writes(notebook))  # without pictures
    assert WIDGET not in text and not re.findall(r"/(?:home|root|tmp|work|Users|mnt|usr)/\S*", text)
    assert "FAST = False" in text and "class Cache(" in text  # the control: source was not cut away
    value = {name: entry["value"] for name, entry in RELEASED["results"].items()}
    assert f"test set: {value['test_bits_per_dim']:.4f} ±" in text
    assert f"{value['parameters']:,.0f} parameters;" in text
    assert f"whole notebook: {value['notebook_minutes']:.1f} minutes" in text
    alt, picture = re.search(HERO, notebook.cells[0].source).groups()
    assert len(alt) > 40 and len(picture) <= 120_000 and base64.b64decode(picture).startswith(b"\x89PNG")


def test_the_requirements_are_what_is_imported():
    """It would see an import that a fresh environment lacks; pillow comes with matplotlib, IPython with jupyter."""
    names = set()
    for node in ast.walk(ast.parse("\n".join(SOURCES["code"]))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    brought = dict(PIL="matplotlib", IPython="jupyter")
    required = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert {brought.get(name, name) for name in names - sys.stdlib_module_names} == set(required)


def test_every_marked_number_is_in_the_results():
    """A figure is written as `value<!-- name -->`, with as many digits as it likes. It would see a number of another
    run, and a mark without a number."""
    text = "\n".join([README, *SOURCES["markdown"]])
    marked = re.findall(r"([\d,.]*)<!-- (\w+?)(_stderr)? -->", text)
    assert len(marked) >= 10
    for shown, name, stderr in marked:
        value = RELEASED["results"][name]["stderr" if stderr else "value"]
        digits = len(shown.split(".")[1]) if "." in shown else 0
        assert f"{value:,.{digits}f}" == shown, f"{name}: the text says {shown or 'nothing'}, results.json {value}"


def test_the_released_run_keeps_its_promises(tmp_path):
    """It would see results of other weights, and a model or a run that falls short: the bar in bits with at most UVA's
    parameters; 25 minutes. (The control: a file that differs in a byte is of other weights.)"""
    other = shutil.copytree(ROOT / "checkpoints", tmp_path / "other")
    (other / "guide.pt").open("ab").write(b"!")
    value = {name: entry["value"] for name, entry in RELEASED["results"].items()}
    apart = json.loads(APART.read_text())
    assert RELEASED["weights"] == digests() != digests(other)
    assert set(value) == {name for name, *_ in RESULTS} | set(apart["results"] if apart["weights"] == digests() else ())
    assert value["test_bits_per_dim"] <= 0.648 and RELEASED["results"]["test_bits_per_dim"]["n"] == 10_000
    assert value["parameters"] <= 852_160 and value["notebook_minutes"] <= 25


@pytest.mark.parametrize("shift, uniform", [(0, True), (0.7, False)])
def test_the_judge_of_recorded_cases_tells_truths_from_others(nb, shift, uniform):
    """Cases whose posterior is a standard normal and whose guide is twice as wide. It would see places that are not
    uniform for draws of the posterior, or are for others (the control: truths that lie to one side), a bound without
    the truth (the control; of four draws, so that it shows), intervals that reach it too seldom, or always, and a limit
    of k-hat that does not follow them."""
    cases, inverse = [], []
    for number in range(400):
        x = 2 * torch.randn(901, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        x[0] = x[0] / 2 + shift  # the truth
        log_w = math.log(2) - x**2 / 2 + (x / 2) ** 2 / 2  # p/g; log Z is 0
        found = nb.Weighted(x[1:501, None, None], log_w[1:501])
        case = partial(case_of, number, number, found, x[1:501], x[0].item(), log_w[0].item())
        cases.append(case(log_w[500:]))
        inverse.append([math.exp(-case(log_w[500:504])["bound"]), 1 / log_w[501:505].exp().mean().item()])
    bins = binned([*cases, dict(ess=3.0, k_hat=0.1)])
    assert [len(part) for part in bins.values()] == [400, 0, 0, 1]
    found = judgement(cases)
    assert found["cases"][0] == 400 and abs(found["widest_gap"][0]) < 0.5
    assert (found["quarters_p_p"][0] > FALSE_ALARM) == uniform
    place, error, *_ = found["mean_place_p"]
    assert (abs(place - 0.5) < MANY * error) == uniform
    assert abs(np.mean([case["bound"] for case in cases])) < 0.01
    mean, error = nb.mean_and_error(torch.tensor(inverse))
    off = (mean - 1).abs() / error
    assert off[1] > MANY and (off[0] < MANY or not uniform)
    own, both = (found[f"bound_reached_by_{name}"][0] for name in ("own", "both"))
    assert 0.7 < own < both and 0.9 < both < 1
    for raised, expected in ((0, 1), (0.5, 0.7)):
        tail = [case | dict(k_hat=0.9, bound=raised) for case in cases]
        assert limit(tail)["k_hat_limit"][0] == expected and limit(cases)["k_hat_limit"][0] == 0.7


# What a reader is told to copy ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """PixelCNN.py, made by the command that README and notebook print."""
    folder = tmp_path_factory.mktemp("script")
    shutil.copy(ROOT / "PixelCNN.ipynb", folder)
    printed = {re.search(r"^(?:\.venv/bin/)?jupyter (nbconvert --to script .*)$", text, flags=re.M)[1]
               for text in [README, *SOURCES["markdown"]] if "--to script" in text}
    (options,) = printed  # the same in both
    subprocess.run([sys.executable, "-m", "jupyter", *options.split()], cwd=folder, check=True, capture_output=True)
    return folder / "PixelCNN.py"


def program(texts, words, changes):
    """The Python in the text that begins after these words, with what makes it small in place of what is there."""
    (text,) = [text.partition(words)[2] for text in texts if words in text]
    found = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    for old, new in changes.items():
        assert found.count(old) == 1, old
        found = found.replace(old, new)
    return found


def run(source, folder, script):
    """What it prints, beside PixelCNN.py, data and checkpoints and nothing else."""
    shutil.copy(script, folder)
    for name in ("data", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", source], cwd=folder,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("where", ["README", "notebook"])
def test_the_script_runs(mnist, script, tmp_path, where):
    """With 32 draws; it saves four of them, ink dark. It would see a name that the notebook no longer has, a run cell
    among the definitions, and a need for a file that is not released."""
    source = program([README] if where == "README" else SOURCES["markdown"], "From a script", {"n=2048": "n=32"})
    said = r"\['(above -\d+\.\d|-\d+\.\d\d ± \d+\.\d\d)', '\d+\.\d of 32', '-?(inf|\d\.\d\d)', '(not )?converged'\]\n"
    assert re.fullmatch(said, run(source, tmp_path, script))
    saved = np.asarray(Image.open(tmp_path / "draws.png").convert("L"))
    assert saved.shape == (32, 122) and saved.min() == 0 and (saved == 255).mean() > 0.5
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "PixelCNN.py", "data", "checkpoints", "draws.png"}


def test_the_program_for_other_data_runs_in_small(mnist, script, tmp_path):
    """With a few steps of training; it trains both networks, scores, draws and completes. It would see a function that
    works at 28x28 pixels of 256 levels alone."""
    small = program(SOURCES["markdown"], "**Other data.**", {
        "load_mnist()[0]": "load_mnist()[0][-6000:]", "100_000, warmup=2_000, decay=25_000": "256, warmup=64, decay=64",
        "guide=guide)": "32, guide)"})
    said = run("import torch; torch.set_num_threads(1)\n" + small, tmp_path, script)
    assert float(re.search(r"bits a pixel ([\d.]+)", said)[1]) < 2.5 and "converged']" in said
    assert float(re.search(r"earlier pixels by ([\d.e-]+)", said)[1]) < 1e-9
    assert all((tmp_path / "other" / name).exists() for name in ("draws.png", "model.pt", "guide.pt"))
