"""The data set on disk gives back the rows that were written, without TensorFlow."""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from pit_jax import config as config_lib
from pit_jax.data import builders, sources, synthetic
from pit_jax.data.sources import DataError
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.stages import Workdir
from pit_jax.types import PreferenceExample

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))


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


# Published sets.

HEAD = "\n\nHuman: Name fruit {}.\n\nAssistant:"


def hh_file(path: pathlib.Path, *numbers: int, more=()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"chosen": f"{HEAD.format(i)} apple", "rejected": f"{HEAD.format(i)} carrot"} for i in numbers]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (*rows, *more)).encode()))


def test_hh_rlhf_of_a_folder(tmp_path):
    same = {"chosen": f"{HEAD.format(9)} a", "rejected": f"{HEAD.format(9)} a"}
    hh_file(tmp_path / "helpful-base" / "train.jsonl.gz", 1, 2, more=[same])
    hh_file(tmp_path / "helpful-online" / "train.jsonl.gz", 3)
    hh_file(tmp_path / "helpful-base" / "test.jsonl.gz", 4)
    hh_file(tmp_path / "harmless-base" / "test.jsonl.gz", 5)
    folder = builders.write_published("hh_rlhf", tmp_path / "tfds", path=tmp_path)
    assert folder == tmp_path / "tfds" / "hh_rlhf" / "helpful" / "1.0.0"
    rows, test, counts, report = builders.read_published("hh_rlhf", tmp_path / "tfds", path=tmp_path)
    assert [row.prompt for row in rows] == [f"Name fruit {i}.\n\n" for i in (1, 2, 3)]
    assert test == [PreferenceExample("Name fruit 4.\n\n", "carrot", "apple")] and counts == {"same_answers": 1}
    assert [(part["read"], part["taken"], part["dropped"]) for part in report] == [
        (1, 1, {}), (4, 3, {"same_answers": 1}),
    ]  # fmt: skip
    harmless = builders.read_published("hh_rlhf", tmp_path / "tfds", path=tmp_path, config="harmless")
    assert not harmless.training and [row.prompt for row in harmless.test] == ["Name fruit 5.\n\n"]
    info = builders.HhRlhf(data_dir=str(tmp_path / "tfds")).info
    assert info.redistribution_info.license == "MIT" and "2204.05862" in info.citation and "anthropics" in info.homepage


def test_a_part_of_a_set_is_not_taken_for_the_set(tmp_path):
    hh_file(tmp_path / "some" / "helpful-base" / "train.jsonl.gz", 1, 2)
    for folder in ("some", "more"):
        hh_file(tmp_path / folder / "helpful-online" / "train.jsonl.gz", 3)
    hh_file(tmp_path / "other" / "helpful-base" / "train.jsonl.gz", 1)
    hh_file(tmp_path / "other" / "helpful-online" / "train.jsonl.gz", 3)
    read = lambda **keywords: builders.read_published("hh_rlhf", tmp_path / "tfds", **keywords)  # noqa: E731
    first = read(path=tmp_path / "some")
    assert len(first.training) == 3 and read(path=tmp_path / "some") == first
    for folder in ("more", "other"):
        with pytest.raises(DataError, match=rf"not made from .*/{folder} \(it differs in helpful-base/train"):
            read(path=tmp_path / folder)
    with pytest.raises(DataError, match=r"all published files \(it differs in helpful-base/test\.jsonl\.gz, h"):
        read()


def test_another_file_under_the_name_of_a_published_one(tmp_path):
    hh_file(tmp_path / "helpful-online" / "test.jsonl.gz", 1)
    with pytest.raises(DataError, match="is not the published file, whose sha256 is 39a475cc"):
        builders.write_published("hh_rlhf", tmp_path / "tfds", path=tmp_path)
    assert not (tmp_path / "tfds" / "hh_rlhf" / "helpful" / "1.0.0").exists()
    with pytest.raises(DataError, match="has none of helpful-base/train"):
        builders.write_published("hh_rlhf", tmp_path / "tfds", path=tmp_path / "tfds")


def test_published_test_files_are_the_verified_ones(tmp_path):
    folder = DATA / "hh-rlhf"
    if not folder.exists():
        pytest.skip(f"no {folder}: set PIT_JAX_DATA to the folder of test data")
    training, rows, counts, _ = builders.read_published("hh_rlhf", tmp_path, path=folder)
    expected, dropped = sources.read(folder)
    assert not training and rows == expected and counts == dropped
    assert counts == {"same_answers": 34, "empty_answer": 3, "prompts_differ": 3} and len(rows) == 1137 + 2749 - 40
    assert {url.rsplit("/", 2)[1] for url in builders.HhRlhf.url_infos} == {
        p.name for p in folder.iterdir() if p.is_dir()
    }


def test_summaries_of_a_folder(tmp_path):
    def row(i, split, choice=0):
        info = {"post": f"Post {i}.", "title": "T", "subreddit": "pets"}
        return {"info": info, "summaries": [{"text": " a"}, {"text": " b"}], "choice": choice, "split": split}

    lines = {
        "batch3.json": [row(1, "train"), row(2, "valid1"), row(3, "train", None)],
        "cnndm0.json": [row(4, "train", 1)],
    }
    for name, rows in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    rows, test, counts, report = builders.read_published("summarize", tmp_path / "tfds", path=tmp_path)
    prompt = "Summarize this post from r/pets in a sentence or two.\n\nT\n\nPost {}.\n\n"
    assert rows == [
        PreferenceExample(prompt.format(1), "b", "a"), PreferenceExample(prompt.format(4), "a", "b"),
    ]  # fmt: skip
    assert test == [PreferenceExample(prompt.format(2), "b", "a")]
    assert counts == {"tie": 1} and [part["read"] for part in report] == [1, 3]
    (tmp_path / "batch4.json").write_text(json.dumps(row(5, "../x")) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"batch4\.json, line 1: field 'split' is '\.\./x'"):
        builders.write_published("summarize", tmp_path / "other", path=tmp_path)


@pytest.mark.parametrize("name", ["hh_rlhf", "summarize"])
def test_without_network_it_says_what_to_do(tmp_path, monkeypatch, name):
    def refuse(*arguments, **keywords):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(
        DataError, match=r"cannot be reached \(Name or.*--config\.data\.source=file --config\.data\.path"
    ):
        builders.read_published(name, tmp_path / "tfds")
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))


def test_a_download_is_asked_for_by_its_urls(tmp_path, monkeypatch):
    """The files that TFDS would bring: a double of its download, as the tests have no network."""
    hh_file(tmp_path / "any.jsonl.gz", 1)
    asked = {}

    def download(self, urls):
        asked.update(urls)
        return dict.fromkeys(urls, tmp_path / "any.jsonl.gz")

    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    builders.write_published("hh_rlhf", tmp_path / "tfds")
    base = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
    folders = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
    assert [*asked.values()] == [f"{base}/{f}/{split}.jsonl.gz" for split in ("train", "test") for f in folders]
    assert set(builders.HhRlhf.url_infos) < set(asked.values())
    rows, test, counts, _ = builders.read_published("hh_rlhf", tmp_path / "tfds")  # what is there is not made again
    assert not rows and len(test) == 1 and counts == {"duplicate_row": 5}


def test_published_test_rows_are_the_test_rows(tmp_path, monkeypatch):
    asked = "\n\nHuman: NAME fruit 7\n\nAssistant:"
    for folder in builders.HhRlhf.FOLDERS["helpful"]:
        hh_file(tmp_path / folder / "train.jsonl.gz", *range(40))
        again = {"chosen": f"{asked} pear", "rejected": f"{asked} leek"}
        hh_file(tmp_path / folder / "test.jsonl.gz", *range(100, 109), more=[again])
    monkeypatch.setattr(builders.HhRlhf, "url_infos", {})
    found = builders.read_published("hh_rlhf", tmp_path / "tfds", path=tmp_path)
    monkeypatch.setattr(builders, "read_published", lambda name: found)
    path = pathlib.Path(__file__).parents[1] / "configs" / "pit_hh_rlhf.py"
    config = runpy.run_path(str(path))["get_config"]("smoke")
    config = config_lib.from_config_dict(config_lib.PitConfig, config)
    data = dataclasses.replace(config.data, source="hh_rlhf", path="", num_selection=3, num_test=6)
    context = Context(dataclasses.replace(config, data=data), Workdir(tmp_path / "run", config), None)
    record = common.data_stage(context)
    prompts = {name: {row.prompt for row in rows} for name, rows in context.rows.items()}
    assert len(prompts["test"]) == 6 and prompts["test"] <= {row.prompt for row in found.test}
    training = set.union(*(prompts[name] for name in ("sft", "rm", "rl", "selection")))
    assert training == {f"Name fruit {i}.\n\n" for i in range(40) if i != 7} and len(prompts["selection"]) == 3
    assert record["skipped"] == {"duplicate_row": 2 * 40 + 2 * 10, "prompt_of_a_test_row": 1}
