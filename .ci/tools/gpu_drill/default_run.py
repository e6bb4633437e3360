"""What the default run of the notebook, with its checkpoints, would take on a card: estimated cell by cell.

usage, from the project's root: python .ci/tools/gpu_drill/default_run.py  (half an hour on one core)
All cells run twice with default settings, but with 2 particles a run in place of 128: on the CPU, where FLOPs are
counted (those of `smc` sixty-four-fold), and on the pretended card, where launches are: those hardly depend on the number
of particles. Few particles pass no verdict, so every completion takes all the rounds that it may. A cell takes the
longer of its arithmetic and its launches, at the rates of counts.py; kernels inside replayed graphs at 2 microseconds.
"""
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch
from torch.utils.flop_counter import FlopCounterMode

os.environ["MPLBACKEND"], os.environ["TQDM_DISABLE"] = "agg", "1"
ROOT, FEW, USUAL = Path(__file__).resolve().parents[3], 2, 128
RATES = {"T4": 8.1e12 / 10, "A100": 19.5e12 / 3}  # float32
torch.set_num_threads(1)


def executed(around, few=lambda module: None):
    """Run all cells; around(number, heading, run): called for each in place of run()."""
    module, heading = types.ModuleType("__main__"), ""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("checkpoints", "data"):
            os.symlink(ROOT / name, f"{folder}/{name}")
        os.chdir(folder)
        for number, cell in enumerate(json.loads((ROOT / "PixelCNN.ipynb").read_text())["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                heading = ([heading] + re.findall(r"^##+ (.*)", source, re.M))[-1]
                continue
            code = compile(re.sub(r"^[%!].*", "", source, flags=re.M), f"cell {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()):  # what the cells print
                around(number, heading, lambda: exec(code, module.__dict__))
            if "class Budget" in source:
                module.Budget.__init__.__defaults__ = FEW, 8, 2
            few(module)
        os.chdir(ROOT)


def flops_of_cells():
    """{cell: FLOPs} of the default run."""
    found, extra = {}, [0]

    def around(number, heading, run):
        with FlopCounterMode(display=False) as counter:
            extra[0] = 0
            run()
        found[number] = counter.get_total_flops() + extra[0]

    def few(module):
        if "smc" in vars(module) and not hasattr(module.smc, "plain"):
            plain = module.smc

            def counted(guide, images, n, *rest, **options):
                with FlopCounterMode(display=False) as counter:
                    result = plain(guide, images, n, *rest, **options)
                extra[0] += (USUAL // FEW - 1) * counter.get_total_flops() * (n == FEW)
                return result

            counted.plain = module.smc = counted

    executed(around, few)
    return found


def main():
    flops, total = flops_of_cells(), dict.fromkeys(RATES, 0.0)
    import cudasim
    import graphs
    graphs.pretend("A100 (pretended)", True)
    # A T4's memory, for the few particles that there are.
    torch.cuda.mem_get_info = lambda *_: (15e9 * FEW / USUAL, 16e9)
    print(f"{'cell':<46}{'launches':>12}{'views':>12}{'in graphs':>12}{'GFLOP':>10}" + "".join(
        f"{card + ', s':>9}" for card in RATES))
    inside, replay = [0], torch.cuda.CUDAGraph.replay

    def counted_replay(graph):
        inside[0] += graph.kernels
        return replay(graph)

    torch.cuda.CUDAGraph.replay = counted_replay
    sums = [0, 0, 0, 0]
    with cudasim.Sim() as sim:
        def around(number, heading, run):
            before, started, inside[0] = sim.ops.copy(), time.monotonic(), 0
            run()
            ops = sim.ops - before
            views = sum(count for name, count in ops.items() if name in cudasim.VIEWS)
            launches = sum(ops.values()) - views
            waiting = 8e-6 * launches + 2e-6 * (views + inside[0])
            seconds = {card: max(waiting, flops[number] / rate) for card, rate in RATES.items()}
            for place, x in enumerate((launches, views, inside[0], flops[number])):
                sums[place] += x
            for card in RATES:
                total[card] += seconds[card]
            if seconds["T4"] > 0.5:
                print(f"{number:>3} {heading[:41]:<42}{launches:>12,}{views:>12,}{inside[0]:>12,}"
                      f"{flops[number] / 1e9:>10,.0f}" + "".join(f"{x:>9.1f}" for x in seconds.values())
                      + f"   ({time.monotonic() - started:.0f} s here)", file=sys.stderr, flush=True)

        executed(around)
    print(f"{'all':<46}{sums[0]:>12,}{sums[1]:>12,}{sums[2]:>12,}{sums[3] / 1e9:>10,.0f}" + "".join(
        f"{x:>9.0f}" for x in total.values()))


if __name__ == "__main__":
    main()
