"""Run the notebook's cells, FAST, on a pretended CUDA device: every cell executes for real, on the CPU's data,
but tensors say "cuda:0" and mixing them with CPU tensors is refused as CUDA would.

usage, from the project's root: .venv/bin/python .ci/tools/gpu_drill/run_notebook.py [--bf16] [--set 'NAME=VALUE' ...]
  --bf16   a card with native bfloat16 (A100, L4, H100); without it a T4, which trains in float16
Prints each run cell with its kernel launches, host-device synchronisations and bytes; exits 1 if a cell failed.
What it cannot show: speed, cuDNN's TF32, numerics of the kernels, torch.compile.
"""
import argparse, json, linecache, os, re, shutil, sys, tempfile, time, traceback, types
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cudasim, graphs, torch, IPython.display
p = argparse.ArgumentParser(); p.add_argument("--bf16", action="store_true"); p.add_argument("--set", nargs="*", default=[])
a = p.parse_args()
project, work = os.getcwd(), tempfile.mkdtemp(prefix="gpu_drill_")
shutil.copy("PixelCNN.ipynb", work)
os.mkdir(os.path.join(work, "data"))  # a picture is saved beside MNIST
if os.path.isdir("data/MNIST"): os.symlink(os.path.join(project, "data/MNIST"), os.path.join(work, "data/MNIST"))
os.chdir(work); os.environ["MPLBACKEND"] = "agg"; torch.set_num_threads(1)
graphs.pretend("A100 (pretended)" if a.bf16 else "Tesla T4 (pretended)", a.bf16)
IPython.display.display = lambda *x, **k: None
cells = [c for c in json.load(open("PixelCNN.ipynb"))["cells"]]
module = types.ModuleType("__main__")
sim, failed = cudasim.Sim(memory=True), []
with sim:
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code": continue
        tags = cell["metadata"].get("tags", [])
        source = "\n".join("" if re.match(r"[%!]", l) else l for l in "".join(cell["source"]).splitlines())
        if "parameters" in tags: source += "\nFAST = PROVE = True\n" + "\n".join(a.set)
        name = f"cell {number}"; linecache.cache[name] = (len(source), None, [l + "\n" for l in source.splitlines()], name)
        started, ops, syncs, sim.peak, said = time.time(), sum(sim.ops.values()), sum(sim.syncs.values()), sim.live, "ok"
        try: exec(compile(source, name, "exec"), module.__dict__)
        except Exception as error:
            said = f"FAILED {type(error).__name__}: {error}"[:300]; failed.append(number)
            for f in traceback.extract_tb(error.__traceback__):
                if "cell" in f.filename: print("   ", f.filename, f.lineno, f.name, "|", f.line)
        if "define" not in tags or said != "ok":
            print(f"{name}: {said}; {sum(sim.ops.values()) - ops:,} launches, {sum(sim.syncs.values()) - syncs:,} syncs, "
                  f"peak {sim.peak / 1e6:.1f} MB, {time.time() - started:.1f} s here", flush=True)
print(f"{len(failed)} cells failed: {failed}; {len(sim.errors)} device mismatches; {sim.ops['graph replay']:,} rows replayed")
for error in sim.errors[:20]: print("  ", *error)
shutil.rmtree(work, ignore_errors=True); sys.exit(bool(failed or sim.errors))
