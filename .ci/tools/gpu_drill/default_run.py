"""What the default run of the notebook, with its checkpoints, would take on a card: estimated cell by cell.

usage, from the project's root: python .ci/tools/gpu_drill/default_run.py  (half an hour on two cores)
All cells run twice with default settings, but with 2 particles a run in place of 128: on the CPU, where FLOPs are
counted (those of `smc` sixty-four-fold), and on the pretended card, where launches are: those hardly depend on the
number of particles. Every completion takes two rounds. A cell takes the longer of its arithmetic and its launches, at the
rates of counts.py; kernels inside replayed graphs at 2 microseconds.
"""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ARITHMETIC = "--flops" in sys.argv  # the other process, without the pretended card
sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
if not ARITHMETIC:
    import cudasim
    import graphs
import torch
from definitions import ROOT, notebook_cells
from torch.utils.flop_counter import FlopCounterMode

os.environ["MPLBACKEND"], os.environ["TQDM_DISABLE"] = "agg", "1"
FEW, USUAL = 2, 128
RATES = {"T4": 8.1e12 / 10, "A100": 19.5e12 / 3}  # float32
torch.set_num_threads(1)


def executed(around, after=lambda module: None):
    """Run all cells; around(number, heading, run): called for each in place of run(); after(module): after each."""
    module, heading = types.ModuleType("__main__"), ""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("checkpoints", "data"):
            os.symlink(ROOT / name, f"{folder}/{name}")
        os.chdir(folder)
        for number, cell in enumerate(notebook_cells()):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                heading = ([heading] + re.findall(r"^##+ (.*)", source, re.M))[-1]
                continue
            code = compile(re.sub(r"^[%!].*", "", source, flags=re.M), f"cell {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()):  # what the cells print
                around(number, heading, lambda: exec(code, module.__dict__))
            if "class Budget" in source:
                module.Budget.__init__.__defaults__ = FEW, 8, 2
                module.doubts_about = lambda found: ["as if"] * (found.rounds < 2)
                module.hopeless = lambda *_: False
            after(module)
        os.chdir(ROOT)


def flops_of_cells():
    """{cell: FLOPs} of the default run."""
    found, extra = {}, [0]

    def around(number, heading, run):
        with FlopCounterMode(display=False) as counter:
            extra[0] = 0
            run()
        found[number] = counter.get_total_flops() + extra[0]

    def after(module):
        if "smc" in vars(module) and not hasattr(module.smc, "plain"):
            plain = module.smc

            def counted(guide, images, n, *rest, **options):
                with FlopCounterMode(display=False) as counter:
                    result = plain(guide, images, n, *rest, **options)
                extra[0] += (USUAL // FEW - 1) * counter.get_total_flops() * (n == FEW)
                return result

            counted.plain = module.smc = counted

    executed(around, after)
    return found


def launches_of_cells():
    """[(cell, heading, launches, views, kernels inside replayed graphs)] of the default run."""
    graphs.pretend("A100 (pretended)", True)
    inside, replay, found = [0], torch.cuda.CUDAGraph.replay, []

    def counted_replay(graph):
        inside[0] += graph.kernels
        return replay(graph)

    torch.cuda.CUDAGraph.replay = counted_replay
    with cudasim.Sim() as sim:
        def around(number, heading, run):
            before, inside[0] = sim.ops.copy(), 0
            run()
            ops = sim.ops - before
            views = sum(count for name, count in ops.items() if name in cudasim.VIEWS)
            found.append((number, heading, sum(ops.values()) - views, views, inside[0]))
            print(*found[-1], file=sys.stderr, flush=True)

        executed(around)
    return found


def main():
    other = subprocess.Popen([sys.executable, __file__, "--flops"], stdout=subprocess.PIPE, text=True)
    launches = launches_of_cells()
    flops = {int(number): found for number, found in json.loads(other.communicate()[0]).items()}
    print(f"{'cell':<46}{'launches':>12}{'views':>12}{'in graphs':>12}{'GFLOP':>10}" + "".join(
        f"{card + ', s':>9}" for card in RATES))
    totals = []
    for number, heading, *counts in launches:
        waiting = 8e-6 * counts[0] + 2e-6 * sum(counts[1:])
        seconds = [max(waiting, flops[number] / rate) for rate in RATES.values()]
        totals.append([*counts, flops[number] / 1e9, *seconds])
        if seconds[0] > 0.5:
            show(f"{number:>3} {heading[:41]}", totals[-1])
    show("all", map(sum, zip(*totals)))


def show(what, numbers):
    """A line of the table."""
    *counts, gflop, t4, a100 = numbers
    print(f"{what:<46}" + "".join(f"{x:>12,}" for x in counts) + f"{gflop:>10,.0f}{t4:>9.1f}{a100:>9.1f}", flush=True)


if __name__ == "__main__":
    print(json.dumps(flops_of_cells())) if ARITHMETIC else main()
