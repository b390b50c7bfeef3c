"""Preference sets on disk, as TFDS builders that need no TensorFlow: the synthetic one, and two that are published.

Rows are written once, as array_record, with the TFDS metadata beside them, and read back by random access through
`builder.as_data_source`. So a data set has the layout that any TFDS tool knows, and a run that resumes reads the rows
it read before, whatever the generator's code has become meanwhile. This is the one module of the package that imports
`tensorflow_datasets`.
"""

import collections
import contextlib
import hashlib
import io
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from pit_jax.data import layouts, row_files, sources, synthetic
from pit_jax.data.sources import DataError
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
        description = "Prompts with several requirements, an answer that meets all of them and one that does not."
        return _dataset_info(self, description=description)

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(rows) for name, rows in self._rows.items() if rows}

    def _generate_examples(self, rows):
        yield from _examples(rows)


def _dataset_info(builder: tfds.core.GeneratorBasedBuilder, **fields) -> tfds.core.DatasetInfo:
    # Made by hand: `dataset_info_from_configs` looks for metadata files beside an installed builder.
    features = {name: tfds.features.Text() for name in _TEXTS}
    features["requirements"] = tfds.features.Text(doc="JSON list of [kind, value]")
    return tfds.core.DatasetInfo(
        builder=builder,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # rows come back in the order of make_splits, or of the published files
        **fields,
    )


def _examples(rows: Sequence[PreferenceExample]) -> Iterator[tuple[int, dict[str, str]]]:
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
    return _prepare(PitSynthetic(splits=splits, data_dir=str(data_dir)))


def _prepare(builder: tfds.core.GeneratorBasedBuilder) -> Path:
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


# ----------------------------------------------------------------------------------------------------------- published

_HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
_SUMMARIES = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"


class HhRlhf(tfds.core.GeneratorBasedBuilder):
    """Pairs of HH-RLHF (Bai et al., 2022), as `sources.read_hh_rlhf` reads them; splits train and test.

    The configs are the two subsets: helpful, which PIT trains on (section 4.1), and harmless. How many rows were
    dropped, by split and cause, is in `info.metadata["dropped"]`, and in "files" the sha256 of each that was read.

    Sizes and sha256 of the test files of helpful-online and helpful-rejection-sampled are verified against the official
    files. Those of the others are not known here: TFDS records what it gets, and `register_checksums` of
    `tfds.download.DownloadConfig` writes that down.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BASE, TEST = _HH, ("test",)
    FOLDERS = {
        "helpful": ("helpful-base", "helpful-online", "helpful-rejection-sampled"),
        "harmless": ("harmless-base",),
    }
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=f"The {name} subset.") for name in ("helpful", "harmless")
    ]
    url_infos = {
        f"{_HH}/helpful-online/test.jsonl.gz": UrlInfo(
            1_053_578, "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10", "test.jsonl.gz"
        ),
        f"{_HH}/helpful-rejection-sampled/test.jsonl.gz": UrlInfo(
            1_361_231, "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb", "test.jsonl.gz"
        ),
    }

    def __init__(self, *, path: str | Path = "", **kwargs):
        """Args: path: a folder with the published folders; empty: they are downloaded. kwargs: of tfds builders."""
        self._path = path
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _dataset_info(
            self,
            description="Dialogues with an AI assistant, and the answer that people preferred of two.",
            metadata=tfds.core.MetadataDict(),
            homepage="https://github.com/anthropics/hh-rlhf",
            license="MIT",
            citation=(
                "@article{bai2022training, title={Training a Helpful and Harmless Assistant with Reinforcement "
                "Learning from Human Feedback}, author={Bai, Yuntao and others}, journal={arXiv:2204.05862}, "
                "year={2022}}"
            ),
        )

    @property
    def files(self) -> list[str]:
        """Names of the published files, below BASE."""
        folders = self.FOLDERS[self.builder_config.name]
        return [f"{folder}/{split}.jsonl.gz" for split in ("train", "test") for folder in folders]

    def _split_generators(self, dl_manager):
        files = _published_files(self, dl_manager, self._path)
        found, dropped = {}, {}
        for split in ("train", "test"):
            rows, counts = [], collections.Counter()
            for name, file in files.items():
                if name.endswith(f"/{split}.jsonl.gz"):
                    more, causes = sources.read_hh_rlhf(file)
                    rows += more
                    counts.update(causes)
            found[split], dropped[split] = rows, dict(counts)
        self.info.metadata["dropped"] = dropped
        return {split: self._generate_examples(rows) for split, rows in found.items() if rows}

    def _generate_examples(self, rows):
        yield from _examples(rows)


class SummarizeComparisons(tfds.core.GeneratorBasedBuilder):
    """OpenAI's comparisons of summaries (Stiennon et al., 2020), as `layouts.summarize` reads them.

    Splits train, valid1 and valid2 are those that the rows name. The prompt's wording is ours, see
    `layouts.summary_prompt`. No size and no sha256 of these files could be verified here, so none is given: TFDS
    records what it gets. How many rows were dropped, by split and cause, is in `info.metadata["dropped"]`, and in
    "files" the sha256 of each that was read.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BASE, TEST = _SUMMARIES, ("valid1", "valid2")
    FILES = (
        *(f"batch{i}.json" for i in range(3, 23) if i != 21),
        *("batch0_cnndm.json", "cnndm0.json", "cnndm2.json", "edit_b2_eval_test.json"),
    )

    def __init__(self, *, path: str | Path = "", **kwargs):
        """Args: path: a folder with some of the published files; empty: they are downloaded. kwargs: of tfds."""
        self._path = path
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _dataset_info(
            self,
            description="Posts of Reddit (and some news articles), and the summary that people preferred of two.",
            metadata=tfds.core.MetadataDict(),
            homepage="https://github.com/openai/summarize-from-feedback",
            license="CC BY 4.0 (the posts of TL;DR); see the homepage for the labels and the news articles",
            citation=(
                "@inproceedings{stiennon2020learning, title={Learning to summarize from human feedback}, "
                "author={Stiennon, Nisan and Ouyang, Long and Wu, Jeff and Ziegler, Daniel M. and Lowe, Ryan and Voss, "
                "Chelsea and Radford, Alec and Amodei, Dario and Christiano, Paul}, booktitle={NeurIPS}, year={2020}}"
            ),
        )

    @property
    def files(self) -> list[str]:
        """Names of the published files, below BASE."""
        return list(self.FILES)

    def _split_generators(self, dl_manager):
        files = _published_files(self, dl_manager, self._path)
        found, dropped = collections.defaultdict(list), collections.defaultdict(collections.Counter)
        for file in files.values():
            for where, row in row_files.read_rows(file):
                split = sources.string_field(row, "split", where)
                if not split.isidentifier():  # the name of a file of TFDS
                    raise DataError(f"{where}: field 'split' is {split!r}, but must be train, valid1 or valid2")
                example = layouts.summarize(row, where)
                if isinstance(example, str):
                    dropped[split][example] += 1
                else:
                    found[split].append(example)
        self.info.metadata["dropped"] = {split: dict(counts) for split, counts in dropped.items()}
        return {split: self._generate_examples(rows) for split, rows in found.items()}

    def _generate_examples(self, rows):
        yield from _examples(rows)


PUBLISHED = {"hh_rlhf": HhRlhf, "summarize": SummarizeComparisons}
"""config.data.source -> its builder."""


def _files_in(path: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Files by name: those of a folder that are there.

    Raises:
      DataError: where there are none.
    """
    files = {name: Path(path) / name for name in names if (Path(path) / name).is_file()}
    if not files:
        raise DataError(f"{path}: has none of {', '.join(names)}")
    return files


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    found = {}
    for name, path in files.items():
        with open(path, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _published_files(
    builder: HhRlhf | SummarizeComparisons, dl_manager: tfds.download.DownloadManager, path: str | Path
) -> dict[str, Path]:
    """Files by name: those of a folder that are there, or all of them, downloaded; their sha256 goes to the metadata.

    Raises:
      DataError: where the folder has none, a file is not the one that was published, or there is no network.
    """
    names, base = builder.files, builder.BASE
    if path:
        files = _files_in(path, names)
        builder.info.metadata["files"] = _digests(files)
        for name, file in files.items():
            info = (builder.url_infos or {}).get(f"{base}/{name}")
            if info and builder.info.metadata["files"][name] != info.checksum:
                raise DataError(
                    f"{file}: is not the published file, whose sha256 is {info.checksum}: get it from {base}/{name}, "
                    "or read your own by --config.data.source=file --config.data.path=FOLDER"
                )
        return files
    urls = {name: f"{base}/{name}" for name in names}
    try:
        host = urllib.parse.urlsplit(base).hostname
        if not urllib.request.getproxies():  # TFDS would try for minutes
            socket.create_connection((host, 443), timeout=20).close()
        files = {name: Path(file) for name, file in dl_manager.download(urls).items()}
    except OSError as error:
        raise DataError(
            f"{host}: cannot be reached ({error}). Get {', '.join(names)} from {base} on another machine, keep the "
            "folders, and read them by --config.data.source=file --config.data.path=FOLDER"
        ) from error
    builder.info.metadata["files"] = _digests(files)
    return files


def write_published(name: str, data_dir: str | Path | None = None, *, path: str | Path = "", config: str = "") -> Path:
    """Downloads a published set and writes it as array_record, unless it is there.

    Args:
      name: a key of PUBLISHED.
      data_dir: a TFDS data directory; None: TFDS_DATA_DIR, or ~/tensorflow_datasets.
      path: a folder with published files, of which some may be missing; empty: all of them are downloaded.
      config: of the builder; empty: its first.

    Returns:
      The folder of the data set.

    Raises:
      DataError: where files are missing, or cannot be downloaded; where the folder holds a data set of other files.
    """
    builder = _published(name, data_dir, path, config)
    folder = Path(builder.data_path)
    if folder.exists():
        held = dict((builder.info.metadata or {}).get("files", {}))
        if path:
            wanted = _digests(_files_in(path, builder.files))
            differing = sorted(dict(held.items() ^ wanted.items()))
        else:
            differing = sorted({*builder.files} - held.keys())
        if differing:
            raise DataError(
                f"{folder} holds a data set that was not made from {path or 'all published files'} (it differs in "
                f"{', '.join(differing)}): remove it, or name another data_dir or TFDS_DATA_DIR"
            )
    return _prepare(builder)


class Published(NamedTuple):
    """A published set.

    Attributes:
      training, test: its rows, as it is divided itself; each row once.
      dropped: cause -> number of other rows.
      report: what `sources.read_config` says of each source, here of each split.
    """

    training: list[PreferenceExample]
    test: list[PreferenceExample]
    dropped: dict[str, int]
    report: list[dict[str, Any]]


def read_published(
    name: str, data_dir: str | Path | None = None, *, path: str | Path = "", config: str = ""
) -> Published:
    """All rows of a published set, after `write_published`, whose arguments these are."""
    write_published(name, data_dir, path=path, config=config)
    builder = _published(name, data_dir, "", config)
    found, counts, report, seen = Published([], [], {}, []), collections.Counter(), [], set()
    for split in sorted(builder.info.splits, key=lambda split: (split not in builder.TEST, split)):
        rows = list(Source(builder.as_data_source(split=split)))
        dropped = dict((builder.info.metadata or {}).get("dropped", {}).get(split, {}))
        rows, dropped = sources.without_repeats(rows, dropped, seen)
        line = {"path": f"{builder.data_path}:{split}", "format": name, "weight": 1.0, "dropped": dropped}
        report.append(line | {"read": len(rows) + sum(dropped.values()), "taken": len(rows)})
        (found.test if split in builder.TEST else found.training).extend(rows)
        counts.update(dropped)
    return found._replace(dropped=dict(counts), report=report)


def _published(name: str, data_dir: str | Path | None, path: str | Path, config: str):
    kwargs = {"config": config} if config else {}
    return PUBLISHED[name](path=path, data_dir=None if data_dir is None else str(data_dir), **kwargs)
