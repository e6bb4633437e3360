"""What users' machines do: kill, fill up, corrupt, starve, repeat. Each fault is made for real where it can be."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from definitions import train_until
from hypothesis import given, settings
from hypothesis import strategies as st

forks = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 3, (100, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def in_a_process(function, *arguments):
    """Start function(*arguments) in a fork with one thread (OpenMP's threads do not survive a fork)."""
    def run():
        torch.set_num_threads(1)
        function(*arguments)
    process = forks.Process(target=run)
    process.start()
    return process


def weights_of(nb, path):
    return nb.load_checkpoint(path, "cpu").state_dict()


# Kills and full disks ---------------------------------------------------------------------------

def test_training_killed_at_random_moments_ends_as_if_never_stopped(nb, config, images, tmp_path):
    """20 SIGKILLs; the state is written at every step, so that many fall into a write."""
    def run(folder):
        nb.train(config, images, images[:20], path=folder / "model.pt", device="cpu", save_seconds=0)

    config, begun = replace(config, images_seen=3200), time.monotonic()
    calm = in_a_process(run, tmp_path / "calm")
    calm.join(120)
    whole, rng, kills, begun = time.monotonic() - begun, random.Random(0), 0, time.monotonic()
    while kills < 20:
        process = in_a_process(run, tmp_path / "killed")
        process.join(rng.uniform(0, whole / 5))
        if not process.is_alive():
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert time.monotonic() - begun < 120
    assert kills >= 3, "it ended before it was killed: the test tested nothing"
    last = in_a_process(run, tmp_path / "killed")
    last.join(120)
    a, b = (weights_of(nb, tmp_path / name / "model.pt") for name in ("calm", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = nb.train(replace(config, seed=1), images, images[:20], path=tmp_path / "other.pt", device="cpu")[0]
    assert not all(torch.equal(a[key], value) for key, value in other.state_dict().items())


def test_a_kill_between_the_checkpoint_and_its_hash_is_mended(nb, config, images, tmp_path):
    path = tmp_path / "model.pt"
    train_until(nb, 39, config, images, images[:20], path=path, device="cpu")
    path.write_bytes(b"renamed into place, but its hash was not written")
    model, history = nb.load_or_train(config, images, images[:20], path=path, device="cpu")
    assert history[-1]["images"] == 640
    assert all(torch.equal(v, weights_of(nb, path)[k]) for k, v in model.state_dict().items())


def test_a_full_disk_leaves_the_old_file_and_says_so(nb, tmp_path):
    """A real limit on the size of files, in a process of its own; met by torch.save and by a plain write."""
    path, kinds = tmp_path / "file.pt", dict(saved={"a": torch.zeros(100_000)}, plain=bytes(100_000))
    nb.save_atomically({"a": 1}, path)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for kind, contents in kinds.items():
            try:
                nb.save_atomically(contents, path)
            except (OSError, RuntimeError) as error:
                (tmp_path / kind).write_text(str(error))

    process = in_a_process(write)
    process.join(60)
    assert process.exitcode == 0 and all((tmp_path / kind).read_text() for kind in kinds)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"file.pt", *kinds}


# Checkpoints ------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_an_error_and_no_random_model(nb, config, images, tmp_path):
    path = tmp_path / "model.pt"
    nb.train(config, images, images[:20], path=path, device="cpu")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="model.pt: SHA-256"):
        nb.load_or_train(config, images, images[:20], path=path, device="cpu")


@pytest.mark.parametrize("change", [dict(channels=0), dict(levels=1), dict(height=2.5), dict(dilations=(1, 0)),
                                    dict(first_mask="C"), dict(batch_size=-1), dict(width=None)])
def test_an_impossible_config_is_refused_by_name(config, change):
    with pytest.raises(ValueError, match=f"config: .*{next(iter(change))}"):
        replace(config, **change)


def test_ten_thousand_mutated_checkpoints(nb, config, tmp_path):
    """Loaded or refused by ValueError, never anything else. Their hashes are made right, to get past them."""
    path = tmp_path / "model.pt"
    small = replace(config, height=2, width=2, channels=2, bottleneck=2, dilations=(1,), context=1)
    nb.save_checkpoint(nb.PixelCNN(small), [], path)
    good = path.read_bytes()

    def fuzz(seed):
        folder, rng = tmp_path / f"{seed}", random.Random(seed)
        folder.mkdir()
        victim, counts = folder / "model.pt", {"loaded": 0, "refused": 0}
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        for _ in range(5000):
            data = bytearray(good)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(len(data))
                how = rng.randrange(4)
                if how == 0:
                    data[at] ^= 1 << rng.randrange(8)
                elif how == 1:
                    data[at] = rng.randrange(256)
                elif how == 2:
                    del data[at : at + rng.randrange(1, 40)]
                else:
                    data[at:at] = data[rng.randrange(len(data)):][: rng.randrange(1, 40)]
            victim.write_bytes(data)
            (folder / "SHA256SUMS").write_text(f"{nb.sha256_of(victim)}  model.pt\n")
            try:
                nb.load_checkpoint(victim, "cpu")
                counts["loaded"] += 1
            except ValueError:
                counts["refused"] += 1
        (tmp_path / f"{seed}.json").write_text(json.dumps(counts))

    workers = [in_a_process(fuzz, seed) for seed in (0, 1)]
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0, "a crash, an undeclared error, or a hang"
    counts = [json.loads((tmp_path / f"{seed}.json").read_text()) for seed in (0, 1)]
    assert sum(sum(c.values()) for c in counts) == 10_000 and all(min(c.values()) > 0 for c in counts)


# Data -------------------------------------------------------------------------------------------

def test_ten_thousand_mutated_data_files(nb, root, mnist, tmp_path):
    """Every change of a data file is seen."""
    name = "t10k-labels-idx1-ubyte"
    good = (root / "data" / "MNIST" / "raw" / name).read_bytes()
    rng = random.Random(0)
    (tmp_path / name).write_bytes(good)
    assert name not in nb.unsound_files(tmp_path)
    for _ in range(10_000):
        data = bytearray(good)
        at = rng.randrange(len(data))
        if rng.random() < 0.8:
            data[at] ^= rng.randrange(1, 256)
        else:
            del data[at:]
        (tmp_path / name).write_bytes(data)
        assert name in nb.unsound_files(tmp_path)


def test_a_changed_pickle_is_refused_before_it_is_read(nb, monkeypatch):
    """Odd bytes can crash numpy's own reader, so none may reach it: a thousand mutations, and a payload."""
    def read(*_, **__):
        raise AssertionError("bytes that are not the known ones were unpickled")

    monkeypatch.setattr(nb.pickle, "loads", read)
    arrays, rng = [np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(3)], random.Random(0)
    packed = gzip.compress(pickle.dumps(arrays))
    for _ in range(1000):
        data = bytearray(packed)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with pytest.raises(ValueError, match="mnist.pkl.gz: SHA-256 is [0-9a-f]{64}, expected"):
            nb.unpickled(bytes(data))


def test_two_notebooks_that_download_at_once(nb, root, mnist, tmp_path, monkeypatch):
    """Threads in place of processes: a timeout that belongs to the process would be restored to the other's."""
    monkeypatch.setattr(nb, "impatient_network", contextlib.nullcontext)

    def source(folder):
        (folder / "MNIST" / "raw").mkdir(parents=True)
        for path in (root / "data" / "MNIST" / "raw").iterdir():
            shutil.copy(path, folder / "MNIST" / "raw" / path.name)
            time.sleep(0.05)

    threads = [threading.Thread(target=nb.fetch_mnist, args=(tmp_path, (source,))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nb.unsound_files(tmp_path / "MNIST" / "raw") == []
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 4


def test_a_folder_that_cannot_be_written_is_named(nb):
    def source(folder):
        raise AssertionError("asked although nothing can be written")

    with pytest.raises(RuntimeError, match="Put the uncompressed files into /proc/none.*'/proc/none'"):
        nb.fetch_mnist("/proc/none", sources=(source,))


def test_a_silent_network_ends_within_a_minute(nb, tmp_path):
    """A server that accepts and never answers: the checkpoint will be trained, and MNIST's next source is asked."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        said = nb.fetch_checkpoint(tmp_path / "mine" / "model.pt", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "could not be fetched" in said and "timed out" in said and "trained" in said
        assert time.monotonic() - begun < 30 and not (tmp_path / "mine").exists()
    with nb.impatient_network(3):
        assert socket.getdefaulttimeout() == 3
    assert socket.getdefaulttimeout() is None


# Properties of any model and any mask -------------------------------------------------------------

sizes = st.integers(1, 5)


@settings(max_examples=25, deadline=None)
@given(height=sizes, width=sizes, levels=st.integers(2, 6), channels=sizes, context=sizes, seed=st.integers(0, 99),
       dilations=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_any_small_model_survives_a_checkpoint_and_draws_what_it_scores(
        nb, tmp_path_factory, height, width, levels, channels, context, seed, dilations):
    torch.manual_seed(seed)
    model = nb.PixelCNN(nb.Config(height=height, width=width, levels=levels, embedding=3, channels=channels,
                                  bottleneck=2, dilations=tuple(dilations), context=context)).eval()
    path = tmp_path_factory.mktemp("any") / "model.pt"
    nb.save_checkpoint(model, [{"images": 1}], path)
    again = nb.load_checkpoint(path, "cpu")
    assert again.config == model.config and again.history == [{"images": 1}]
    draws = nb.sample(again, 3, seed=seed)
    assert torch.equal(draws, nb.sample(model, 3, seed=seed))
    assert draws.shape == (3, height, width) and int(draws.max()) < levels
    assert nb.leaked_difference(again, draws) < 1e-14  # odd sizes are added up in another order
    double = again.double()
    assert (nb.cached_logits(double, draws) - double(draws)).abs().max() < 1e-10


def gaps_to_the_table(nb, tiny, table):
    """How far log Z is from the table's for 74 masks, all pixels and none among them, in standard errors."""
    gaps = []
    for number in range(0, 512, 7):
        known = torch.tensor([number >> k & 1 for k in range(9)]).view(3, 3) == 1
        image = nb.sample(tiny, 1, seed=number)[0]
        completion = nb.complete(tiny, image, known, 5, nb.Budget(50, rounds=1), seed=number)
        assert (completion.draws[:, known] == image[known]).all() and completion.draws.shape == (5, 3, 3)
        found, stderr = completion.diagnostics.get("found"), completion.log_evidence_stderr
        if stderr is None:  # refused
            stderr = found.log_evidence()[1]
        gaps.append(abs(completion.log_evidence - nb.exact_posterior(*table, image, known)[2]) / (stderr + 1e-9))
    return torch.tensor(gaps)


def test_any_mask_is_completed_and_its_evidence_is_that_of_the_table(nb, tiny, table, monkeypatch):
    """Detects an error of 7 standard errors in any one of 74 masks. The control: looks whose resampling is not divided
    out."""
    assert gaps_to_the_table(nb, tiny, table).max() < 7
    monkeypatch.setattr(nb.Particles, "look", nb.look_that_forgets)
    assert (gaps_to_the_table(nb, tiny, table) > 7).sum() > 10


# Bad evidence and bad arguments -------------------------------------------------------------------

@pytest.mark.parametrize("known", [torch.arange(9).view(3, 3) < 4, torch.arange(9).view(3, 3) > 4])
def test_improbable_evidence_is_flagged(nb, known):
    """Level 2 made very improbable: known pixels of that level are no image of this model. Its own draw is."""
    model = nb.tiny_model()
    model.head.bias.data += torch.tensor([0.0, 0.0, -20.0])
    image, always = torch.full((3, 3), 2, dtype=torch.uint8), ["a guide would do better"] * bool(known[-1, -1])
    bad = nb.complete(model, image, known, 2, nb.Budget(20, 4, 1))
    assert bad.remarks == ["off-model", *always] and bad.log_evidence < -40
    assert (bad.log_evidence_stderr is None) == (bad.status == "not converged")
    good = nb.complete(model, nb.sample(model, 1, seed=1)[0], known, 2, nb.Budget(100, 8, 1))
    assert good.remarks == always and 0 < good.effective_draws <= 2


@pytest.mark.parametrize("known", [torch.arange(9).view(3, 3) < 4, torch.arange(9).view(3, 3) > 4,
                                   torch.arange(9).view(3, 3) > 7])
def test_impossible_evidence_is_an_error_and_in_a_batch_a_remark(nb, known):
    """Level 2 made impossible. The others of a batch are answered as they are beside a possible one."""
    model, budget = nb.tiny_model(), nb.Budget(20, 4, 1)
    model.head.bias.data[2] = -math.inf
    image, good = torch.full((3, 3), 2, dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.complete(model, image, known, 2, budget)
    first, bad, last = nb.complete(model, torch.stack([good, image, good]), known, 2, budget)
    assert bad.log_evidence == -math.inf and "impossible evidence" in bad.remarks and bad.status != "converged"
    for one, other in zip((first, last), nb.complete(model, torch.stack([good] * 3), known, 2, budget)[::2]):
        assert one.remarks == other.remarks and "impossible evidence" not in one.remarks
        assert torch.equal(one.draws, other.draws) and one.log_evidence == other.log_evidence > -math.inf


def test_impossible_evidence_is_an_error_for_question_e(nb):
    model = nb.tiny_model()
    model.head.bias.data[2] = -math.inf
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.conditional_given_rest(model, torch.full((3, 3), 2, dtype=torch.uint8), (1, 1))


def test_runs_whose_particles_are_all_impossible_count_as_nothing(nb, monkeypatch):
    """Level 2 impossible, and a guide that draws it all the same: some runs of one particle have log Z-hat = -inf, and
    the mean over all is Z within 5 standard errors of 2,000 runs. The control: without those runs it is not."""
    model = nb.tiny_model()
    model.head.bias.data[2] = -math.inf
    monkeypatch.setattr(nb.Guide, "combine", lambda guide, logits: logits.clamp(min=0))
    image, known, images = torch.zeros(3, 3, dtype=torch.uint8), torch.arange(9).view(3, 3) > 4, nb.all_images(model)
    log_evidence = nb.exact_posterior(images, nb.log_prob(model, images, 4096), image, known)[2]
    guide = nb.Guide(model).told(image[None], known[None])[torch.zeros(2000, dtype=torch.long)]
    ratios = (nb.smc(guide, image.expand(2000, -1, -1), 1, [*range(2000)]).log_z - log_evidence).exp()
    nothing = ratios == 0
    assert 20 < nothing.sum() < 1980

    def z(x):
        return (x.mean() - 1) / (x.std() / len(x) ** 0.5)

    assert abs(z(ratios)) < 5 < z(ratios[~nothing]), (z(ratios), z(ratios[~nothing]), ratios.std())


# Memory, seeds, threads ---------------------------------------------------------------------------

def test_a_batch_too_large_for_the_gpu_is_halved_with_the_same_draws(nb, tiny, monkeypatch):
    calm, real = nb.sample(tiny, 30, seed=4), nb.FastNetwork

    class Starved(real):
        def new_cache(self, n=1):
            if n > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().new_cache(n)

    monkeypatch.setattr(nb, "FastNetwork", Starved)
    with pytest.warns(UserWarning, match="sample: no GPU memory for 30 at once; going on in batches of 15"):
        assert torch.equal(nb.sample(tiny, 30, seed=4), calm)

    def never(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="test_a_batch.*: no GPU memory even for one"):
        list(nb.in_batches(never, 4, 4))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("where", ["new_cache", "start_row", "rows"])
def test_runs_too_many_for_the_gpu_are_halved_with_the_same_draws(nb, tiny, evidence, monkeypatch, where, learned):
    """Memory that ends before the first row, while drawing, or while known pixels are read. The control: other seeds
    give other draws."""
    known, images = torch.arange(9).view(1, 3, 3) > 4, evidence[[0, 1, 2, 3, 4, 0, 1]]
    network = nb.GuideNetwork.starting_from(tiny, (1, 2)) if learned else None
    limit, real = 2 if where == "new_cache" else 2 * 6 * nb.COPIES, nb.FastNetwork

    def runs(seed, present=None):
        return nb.smc(nb.Guide(tiny, network).told(images, known), images, 6, [*range(seed, seed + 7)], present)

    calm = [runs(1), runs(1, images)]
    starved = type("Starved", (real,), {})

    def short(self, *arguments, **named):
        if (arguments[0] if where == "new_cache" else len(arguments[0])) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return getattr(real, where)(self, *arguments, **named)

    setattr(starved, where, short)
    monkeypatch.setattr(nb, "FastNetwork", starved)
    for whole, present in zip(calm, (None, images)):
        with pytest.warns(UserWarning, match="smc: no GPU memory for .* at once; going on in batches of [13]$"):
            parts = runs(1, present)
        assert torch.equal(parts.draws, whole.draws) and torch.equal(parts.line, whole.line)
        assert (parts.log_w - whole.log_w).abs().max() < 1e-12
    limit = 7 * 6 * nb.COPIES
    assert not torch.equal(runs(9).draws, calm[0].draws)
    limit = 0
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="smc: no GPU memory even for one"):
        runs(1)


def busy():
    while True:
        pass


def test_a_busy_machine_slows_small_operations_fourfold_at_most(nb, tiny, evidence):
    """True Gibbs sampling of the 3x3 model beside a process on each core: 1.2 times as long on two
    cores when this was written, and on all threads 4.3 times."""
    known = torch.arange(9).view(3, 3) > 2

    def seconds():
        started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        for _ in range(40):
            nb.gibbs_sweep(tiny, evidence[0], known, generator)
        return time.perf_counter() - started

    seconds()
    alone, others = seconds(), [multiprocessing.get_context("fork").Process(target=busy, daemon=True)
                                for _ in range(os.cpu_count() or 1)]
    for process in others:
        process.start()
    try:
        beside = seconds()
    finally:
        for process in others:
            process.kill()
            process.join()
    assert beside < 4 * alone, (alone, beside)


def test_one_seed_one_result(nb, tiny):
    image, known = nb.sample(tiny, 1, seed=1)[0], torch.arange(9).view(3, 3) > 3
    budget = nb.Budget(20, 4, 1)
    first, again, other = (nb.complete(tiny, image, known, 6, budget, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.draws, again.draws) and first.log_evidence == again.log_evidence
    assert first.log_evidence != other.log_evidence


@pytest.mark.parametrize("n", [1, 64])
def test_drawing_leaves_the_number_of_threads_as_it_was(nb, tiny, n):
    """Rows are drawn on as many as are fast; also where it ends by an error."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        nb.sample(tiny, n)
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), nb.threads_for(n):
            assert torch.get_num_threads() == (3 if n == 64 else 1)
            for _ in nb.at_best_pace(range(9)):
                1 / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_threads_change_rounding_only(nb):
    torch.manual_seed(0)
    model = nb.PixelCNN(nb.Config()).eval()
    images = torch.randint(0, 256, (4, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    threads, answers = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        answers.append(nb.log_prob(model, images))
    torch.set_num_threads(threads)
    assert (answers[0] - answers[1]).abs().max() < 0.01  # nats, of some 4,000


def test_a_loss_that_explodes_stops_the_run_and_names_step_and_rate(nb, config, images, tmp_path):
    path = tmp_path / "model.pt"
    train_until(nb, 5, config, images, images[:20], path=path, device="cpu")
    state = path.with_suffix(".state").read_bytes()
    spoilt = torch.load(io.BytesIO(state), weights_only=True)
    spoilt["model"]["head.bias"] += torch.tensor([1e4, 0.0, 0.0])
    torch.save(spoilt, path.with_suffix(".state"))
    kept = path.with_suffix(".state").read_bytes()
    with pytest.raises(FloatingPointError, match=r"loss is .* nats, .* at step 5, learning rates \[.*state is kept"):
        nb.train(config, images, images[:20], path=path, device="cpu")
    assert path.with_suffix(".state").read_bytes() == kept and not path.exists()


# Only the notebook was opened ---------------------------------------------------------------------

@pytest.fixture
def server(nb, config, images, tmp_path):
    """(address, folder) of a web server over a repository with one checkpoint."""
    served = tmp_path / "served"
    nb.train(config, images, images[:20], path=served / "checkpoints" / "model.pt", device="cpu")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", served
        running.shutdown()


def test_a_checkpoint_is_fetched_with_its_hash(nb, server, tmp_path):
    path = tmp_path / "mine" / "model.pt"
    assert "trained" in nb.fetch_checkpoint(path, "") and not path.exists()
    assert nb.fetch_checkpoint(path, server[0] + "/").endswith("fetched")
    assert all(torch.equal(v, weights_of(nb, server[1] / "checkpoints" / "model.pt")[k])
               for k, v in weights_of(nb, path).items())
    before = path.read_bytes()
    assert nb.fetch_checkpoint(path, "http://127.0.0.1:9").endswith("here") and path.read_bytes() == before


@pytest.mark.parametrize("fault", ["nobody there", "no such file", "damaged", "no address"])
def test_a_fetch_that_fails_leaves_nothing_and_says_why(nb, server, tmp_path, fault):
    path, (address, served) = tmp_path / "mine" / "model.pt", server
    if fault == "no such file":
        (served / "checkpoints" / "model.pt").unlink()
    if fault == "damaged":
        (served / "checkpoints" / "model.pt").write_bytes(b"half of it")
    address = {"nobody there": "http://127.0.0.1:9", "no address": "somewhere"}.get(fault, address)
    assert "could not be fetched" in nb.fetch_checkpoint(path, address)
    assert not path.parent.exists()
