"""The data set on disk gives back the rows that were written, without TensorFlow."""

import subprocess
import sys

import pytest

from pit_jax.data import builders, synthetic


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    path = builders.write_synthetic(folder, seed=3, size=90, num_selection=8, num_test=16, num_pretrain=12)
    assert path == folder / "pit_synthetic" / "1.0.0"
    return folder


def test_round_trip(data_dir):
    splits = synthetic.make_splits(3, 90, num_selection=8, num_test=16, num_pretrain=12)
    assert splits.keys() == set(builders.SPLITS)
    for name, rows in splits.items():
        assert builders.read(data_dir, name) == rows
    everything = "".join(row.chosen for rows in splits.values() for row in rows)
    assert '"' in everything and "\n" in everything


def test_it_is_stored_as_array_record(data_dir):
    names = [path.name for path in (data_dir / "pit_synthetic" / "1.0.0").iterdir()]
    assert sum(".array_record" in name for name in names) == len(builders.SPLITS)


def test_random_access(data_dir):
    source, rows = builders.source(data_dir, "rl"), builders.read(data_dir, "rl")
    assert len(source) == len(rows) == 30
    assert source[7] == rows[7] and source[-1] == rows[-1] and source[2:9:3] == rows[2:9:3]
    with pytest.raises(IndexError):
        source[30]


def test_errors_say_what_to_do(data_dir, tmp_path):
    with pytest.raises(ValueError, match="write_synthetic first"):
        builders.read(tmp_path, "sft")
    with pytest.raises(ValueError, match="use one of .*'sft'"):
        builders.read(data_dir, "dev")
    with pytest.raises(ValueError, match="already holds a data set"):
        builders.write_synthetic(data_dir, seed=3, size=90)


def test_no_pretrain_split_where_none_is_asked_for(tmp_path):
    builders.write_synthetic(tmp_path, seed=0, size=6, num_selection=2, num_test=2)
    with pytest.raises(ValueError, match="no split 'pretrain'"):
        builders.read(tmp_path, "pretrain")


def test_tensorflow_is_never_imported(data_dir):
    code = (
        "import sys; from pit_jax.data import builders; "
        f"print(len(builders.read({str(data_dir)!r}, 'test')), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16", "False"]
