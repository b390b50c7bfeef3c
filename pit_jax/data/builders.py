"""The synthetic data set on disk, as a TFDS builder that needs no TensorFlow.

Rows are written once, as array_record, with the TFDS metadata beside them, and read back by random access through
`builder.as_data_source`. So the data set has the layout that any TFDS tool knows, and a run that resumes reads the rows
it read before, whatever the generator's code has become meanwhile. This is the one module of the package that imports
`tensorflow_datasets`.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from pit_jax.data import synthetic
from pit_jax.types import PreferenceExample, Requirement

SPLITS = ("sft", "rm", "rl", "selection", "test", "pretrain")
_TEXTS = ("prompt", "rejected", "chosen", "reflection")


class PitSynthetic(tfds.core.GeneratorBasedBuilder):
    """Rows (x, y_l, y_w, c) with their requirements, by `synthetic.make_splits` (PIT appendix D)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def __init__(self, *, splits: dict[str, Sequence[PreferenceExample]] | None = None, **kwargs):
        """Args: splits: rows to write, by split name; nothing is needed for reading. kwargs: of tfds builders."""
        self._rows = splits or {}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Made by hand: `dataset_info_from_configs` looks for metadata files beside an installed builder.
        features = {name: tfds.features.Text() for name in _TEXTS}
        features["requirements"] = tfds.features.Text(doc="JSON list of [kind, value]")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts with several requirements, an answer that meets all of them and one that does not.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # rows are random already, and so they come back in the order of make_splits
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(rows) for name, rows in self._rows.items() if rows}

    def _generate_examples(self, rows):
        for i, row in enumerate(rows):
            requirements = json.dumps([[r.kind, r.value] for r in row.requirements])
            yield i, {**{name: getattr(row, name) for name in _TEXTS}, "requirements": requirements}


class Source(Sequence):
    """Rows of one split on disk, by random access."""

    def __init__(self, data_source):
        """Args: data_source: of `tfds`."""
        self._data_source = data_source

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):  # the end of iteration, for Sequence
            raise IndexError(f"row {i} of {len(self)}")
        record = self._data_source[int(i) % len(self)]
        texts = {name: record[name].decode("utf-8") for name in _TEXTS}  # Text comes back as bytes
        requirements = tuple(Requirement(kind, value) for kind, value in json.loads(record["requirements"]))
        return PreferenceExample(**texts, requirements=requirements)


def write_synthetic(
    data_dir: str | Path,
    *,
    seed: int,
    size: int,
    num_selection: int = 128,
    num_test: int = 640,
    num_pretrain: int = 0,
    failure_weights: dict[str, float] | None = None,
) -> Path:
    """Generates the synthetic data set and writes it as array_record.

    Args:
      data_dir: a TFDS data directory; the data set goes to pit_synthetic/<version> below it.
      seed: of the rows.
      size: rows over the three folds.
      num_selection: see `synthetic.make_splits`.
      num_test: see `synthetic.make_splits`.
      num_pretrain: see `synthetic.make_splits`; 0 writes no such split.
      failure_weights: see `synthetic.generate`.

    Returns:
      The folder of the data set.

    Raises:
      ValueError: where the folder already holds a data set; it could be one of another seed or size.
    """
    folder = _folder(data_dir)
    if folder.exists():
        raise ValueError(f"{folder} already holds a data set: remove it or name another data_dir")
    splits = synthetic.make_splits(seed, size, num_selection, num_test, num_pretrain, failure_weights)
    builder = PitSynthetic(splits=splits, data_dir=str(data_dir))
    tfds.disable_progress_bar()  # a dozen bars for a few seconds
    with contextlib.redirect_stdout(io.StringIO()):  # "downloaded", where nothing is
        builder.download_and_prepare()
    return Path(builder.data_path)


def source(data_dir: str | Path, split: str) -> Source:
    """Random access to one split.

    Args:
      data_dir: what `write_synthetic` was given.
      split: one of SPLITS.

    Raises:
      ValueError: where nothing is written there, or not this split.
    """
    if not _folder(data_dir).exists():
        raise ValueError(f"no synthetic data in {data_dir}: run pit_jax.data.builders.write_synthetic first")
    builder = PitSynthetic(data_dir=str(data_dir))
    if split not in builder.info.splits:
        raise ValueError(f"no split {split!r} in {data_dir}: use one of {sorted(builder.info.splits)}")
    return Source(builder.as_data_source(split=split))


def read(data_dir: str | Path, split: str) -> list[PreferenceExample]:
    """All rows of one split, in the order in which they are stored.

    Args:
      data_dir: what `write_synthetic` was given.
      split: one of SPLITS.

    Raises:
      ValueError: where nothing is written there, or not this split.
    """
    return list(source(data_dir, split))


def _folder(data_dir: str | Path) -> Path:
    return Path(data_dir) / PitSynthetic.name / str(PitSynthetic.VERSION)
