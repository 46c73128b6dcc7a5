"""Data sets saved on disk and streamed from local files; nothing here needs the network."""

import json
from pathlib import Path

import pytest

from ssd_lit.config import ConfigError, HubSource
from ssd_lit.data.sources import hub_documents

datasets = pytest.importorskip("datasets", reason="reading from the hub is an extra: pip install -e .[hub]")
TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def source(folder: Path, **settings: object) -> HubSource:
    return HubSource.model_validate({"kind": "huggingface", "dataset": str(folder), **settings})


def test_one_split_saved_on_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    assert list(hub_documents(source(tmp_path / "saved"))) == TEXTS


def test_named_split_and_column_saved_on_disk(tmp_path: Path) -> None:
    some = datasets.Dataset.from_dict({"body": TEXTS})
    datasets.DatasetDict({"train": some.select([0]), "extra": some}).save_to_disk(tmp_path / "saved")
    assert list(hub_documents(source(tmp_path / "saved", split="extra", text_key="body"))) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_data_files(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    assert list(hub_documents(source(folder, streaming=streaming))) == TEXTS


def test_a_dotted_key_leads_into_a_column(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": [{"b": text} for text in TEXTS], "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    assert list(hub_documents(source(tmp_path / "saved", text_key="a.b"))) == TEXTS


def test_missing_split_lists_the_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"extra": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="no split 'train'; there are: extra"):
        list(hub_documents(source(tmp_path / "saved")))


def test_missing_text_key_lists_the_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": TEXTS, "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="no text_key 'text'; there are: body, n"):
        list(hub_documents(source(tmp_path / "saved")))


def test_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"nothing' cannot be loaded"):
        list(hub_documents(source(tmp_path / "nothing")))


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"extra 'hub': pip install 'ssd-lit\[hub\]'"):
        list(hub_documents(source(tmp_path)))


def test_a_split_is_not_asked_of_one_that_was_saved_alone(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    for split in ("test", "train[:1]"):
        with pytest.raises(ConfigError, match="is one saved split; leave out split"):
            list(hub_documents(source(tmp_path / "saved", split=split)))
