"""Run the notebook's cells on a pretended CUDA device: every cell executes for real, on the CPU's data, but tensors say
"cuda:0" and mixing them with CPU tensors is refused as CUDA would.

usage: python .ci/tools/gpu_drill/run_notebook.py [--bf16]  (FAST, with appendix B; minutes)
       python .ci/tools/gpu_drill/run_notebook.py --estimate  (half an hour on two cores)
--bf16: a card with native bfloat16 (A100, L4, H100); without it a T4, which trains in float16. Prints each cell with
its kernel launches, host-device synchronisations and bytes; exits 1 if a cell failed. What it cannot show: speed,
cuDNN's TF32, numerics of the kernels, torch.compile.
--estimate: what the default run, with its checkpoints, would take on a card, cell by cell. All cells run twice, with 4
particles a run in place of 128: on the CPU, where FLOPs are counted (those of `smc` thirty-two-fold), and on the
pretended card, where launches are: those hardly depend on the number of particles. Every completion takes two rounds.
A cell takes the longer of its arithmetic and its launches, at the rates of counts.py; kernels inside replayed graphs at
2 microseconds.
"""
import contextlib, io, json, linecache, os, re, subprocess, sys, tempfile, time, traceback, types
from pathlib import Path

ARITHMETIC = "--flops" in sys.argv  # the estimate's other process, without the pretended card
sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
if not ARITHMETIC:
    import cudasim, graphs
import IPython.display, torch
from definitions import ROOT, notebook_cells
from torch.utils.flop_counter import FlopCounterMode

FEW, USUAL = 4, 128
torch.set_num_threads(1)
os.environ["TQDM_DISABLE"] = "1"
IPython.display.display = lambda *_, **options: None


def execute(around, settings=""):
    """Run all cells in a folder of their own; around(number, heading, module, run) is called in place of each run()."""
    module, heading = types.ModuleType("__main__"), ""
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/data")  # a picture is saved beside MNIST
        for name in ("checkpoints", "data/MNIST"):
            os.symlink(ROOT / name, f"{folder}/{name}")
        os.chdir(folder)
        for number, cell in enumerate(notebook_cells()):
            source, name = "".join(cell["source"]), f"cell {number}"
            if cell["cell_type"] != "code":
                heading = ([heading] + re.findall(r"^##+ (.*)", source, re.M))[-1]
                continue
            if "parameters" in cell["metadata"].get("tags", []):
                source += f"\n{settings}"
            linecache.cache[name] = len(source), None, source.splitlines(True), name
            code = compile(source, name, "exec")
            around(number, heading, module, lambda: exec(code, vars(module)))
        os.chdir(ROOT)


def drill():
    """A line for each cell that launches something; whether one failed."""
    graphs.pretend("--bf16" in sys.argv)
    failed = []

    def around(number, heading, module, run):
        started, ops, syncs, sim.peak, said = time.time(), sim.ops.total(), sim.syncs.total(), sim.live, "ok"
        try:
            run()
        except Exception as error:
            said = f"FAILED {type(error).__name__}: {error}"[:300]
            failed.append(number)
            for frame in traceback.extract_tb(error.__traceback__):
                if "cell" in frame.filename:
                    print("   ", frame.filename, frame.lineno, frame.name, "|", frame.line)
        if sim.ops.total() > ops or said != "ok":
            print(f"cell {number}: {said}; {sim.ops.total() - ops:,} launches, {sim.syncs.total() - syncs:,} syncs, "
                  f"peak {sim.peak / 1e6:.1f} MB, {time.time() - started:.1f} s here", flush=True)

    with cudasim.Sim(memory=True) as sim:
        execute(around, "FAST = PROVE = True")
    print(f"{len(failed)} cells failed: {failed}; {len(sim.errors)} device mismatches; "
          f"{sim.ops['graph replay']:,} rows replayed", *sim.errors[:20], sep="\n  ")
    return bool(failed or sim.errors)


def with_few_particles(module, run):
    """Run a cell in silence; from its definition on every completion takes two rounds of few particles."""
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    if "Budget" in vars(module):
        module.Budget.__init__.__defaults__ = FEW, 8, 2
        module.doubts_about = lambda found: []
        module.hopeless = lambda *_: False


def flops_of_cells():
    """{cell: FLOPs} of the default run."""
    found, extra = {}, [0]

    def around(number, heading, module, run):
        extra[0] = 0
        with FlopCounterMode(display=False) as counter:
            with_few_particles(module, run)
        found[number] = counter.get_total_flops() + extra[0]
        if "smc" in vars(module) and not hasattr(module.smc, "plain"):
            plain = module.smc

            def counted(guide, images, n, *rest, **options):
                with FlopCounterMode(display=False) as counter:
                    result = plain(guide, images, n, *rest, **options)
                extra[0] += (USUAL // FEW - 1) * counter.get_total_flops() * (n in (FEW, FEW // 4))  # 8.7: a quarter
                return result

            counted.plain = module.smc = counted

    execute(around)
    return found


def launches_of_cells():
    """[(cell, heading, launches, views, kernels inside replayed graphs)] of the default run."""
    graphs.pretend(bf16=True)
    inside, replay, found = [0], graphs.CUDAGraph.replay, []

    def counted_replay(graph):
        inside[0] += graph.kernels
        return replay(graph)

    def around(number, heading, module, run):
        before, inside[0] = sim.ops.copy(), 0
        with_few_particles(module, run)
        found.append((number, heading, *cudasim.launches_and_views(sim.ops - before), inside[0]))
        print(*found[-1], file=sys.stderr, flush=True)

    graphs.CUDAGraph.replay = counted_replay
    with cudasim.Sim() as sim:
        execute(around)
    return found


def show(what, launches, views, inside, gflop, t4, a100):
    """A line of the table."""
    print(f"{what:<46}{launches:>12,}{views:>12,}{inside:>12,}{gflop:>10,.0f}{t4:>9.1f}{a100:>9.1f}", flush=True)


def estimate():
    """A line for each cell of more than half a second on a T4, and their sum."""
    other = subprocess.Popen([sys.executable, __file__, "--flops"], stdout=subprocess.PIPE, text=True)
    cells, totals = launches_of_cells(), []
    flops = {int(number): found for number, found in json.loads(other.communicate()[0]).items()}
    print(f"{'cell':<46}{'launches':>12}{'views':>12}{'in graphs':>12}{'GFLOP':>10}{'T4, s':>9}{'A100, s':>9}")
    for number, heading, launches, views, inside in cells:
        seconds = cudasim.seconds(launches, views + inside, flops[number])
        totals.append([launches, views, inside, flops[number] / 1e9, *seconds.values()])
        if seconds["T4"] > 0.5:
            show(f"{number:>3} {heading[:41]}", *totals[-1])
    show("all", *map(sum, zip(*totals)))


if __name__ == "__main__":
    if ARITHMETIC:
        print(json.dumps(flops_of_cells()))
    else:
        sys.exit(estimate() if "--estimate" in sys.argv else drill())
