"""Parquet files and data sets of the hub: every row once, whole errors, and the same chats as from JSON lines."""

from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridize.data.packing import pack_rows
from hybridize.data.sources import iter_placed, read_prompts
from hybridize.spec.data import FileDataSpec, HubDataSpec


def row(i):
    return {"prompt": f"question {i}", "completion": f"answer {i}", "answer": i, "other": b"\xff"}


@pytest.fixture
def write_parquet(tmp_path):
    def write(*rows, name="traces.parquet", **options):
        pq.write_table(pa.Table.from_pylist(list(rows)), tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not bars:
        datasets.enable_progress_bars()


def questions(data, n, seed=0):
    return [placed.messages[0]["content"] for placed in islice(iter_placed(data, seed), n)]


@pytest.mark.parametrize("group", [3, 100])
def test_parquet_is_read_once_an_epoch_in_another_order_each(write_parquet, group):
    data = FileDataSpec(path=str(write_parquet(*map(row, range(20)), row_group_size=group)))
    read = questions(data, 60)
    passes = [read[i : i + 20] for i in (0, 20, 40)]
    everything = [f"question {i}" for i in range(20)]
    assert [sorted(p) for p in passes] == [sorted(everything)] * 3
    assert len({tuple(p) for p in [*passes, everything]}) == 4
    assert questions(data, 60) == read
    assert questions(data, 20, seed=1) != passes[0]
    assert [p.text for p in read_prompts(data, 20, 0)] == everything


def test_places_of_shuffled_parquet_rows_are_their_numbers(write_parquet):
    data = FileDataSpec(path=str(write_parquet(*map(row, range(20)), row_group_size=6)))
    for placed in islice(iter_placed(data, 0), 20):
        number = placed.messages[0]["content"].removeprefix("question ")
        assert placed.place.endswith(f"traces.parquet row {number}")


def test_parquet_is_known_by_its_content_and_packs_like_json_lines(write_parquet, write_lines, tokenizer):
    chats = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    binary = pack_rows(FileDataSpec(path=str(write_parquet(*chats, name="chats.bin"))), tokenizer, 64, 2, 0)
    lines = pack_rows(FileDataSpec(path=str(write_lines(*chats))), tokenizer, 64, 2, 0)
    assert binary.digest() == lines.digest()


def test_malformed_parquet_is_named_with_row_column_value_and_remedy(write_parquet, tmp_path):
    def refuse(path, message):
        with pytest.raises(ValueError, match=message):
            iter_placed(FileDataSpec(path=str(path)), 0)

    refuse(write_parquet(row(0), row(1) | {"completion": " "}), "traces.parquet row 1: completion: ' ' is empty; fill")
    refuse(
        write_parquet(row(0), row(1) | {"completion": None}), "row 1: completion missing, keys are 'prompt', 'answer'"
    )
    refuse(write_parquet({"prompt": 3, "completion": "x"}), "row 0: prompt: 3 is not text; write a string")
    refuse(write_parquet({"text": "x"}), "neither a column messages nor prompt, columns are text; rename")
    refuse(write_parquet(), "neither a column messages nor prompt, columns are none")
    path = write_parquet(*map(row, range(50)))
    pq.write_table(pq.read_table(path)[:0], tmp_path / "empty.parquet")
    refuse(tmp_path / "empty.parquet", "empty.parquet: it holds no conversation; write one a row")
    path.write_bytes(path.read_bytes()[:-20])
    refuse(path, "traces.parquet: it is no whole Parquet file .*; write it anew")
    refuse(tmp_path / "none.parquet", "none.parquet: it cannot be read .*No such file.*; check the path")


def test_folder_of_files_is_read_by_datasets_with_columns_renamed(tmp_path, write_parquet):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        {"problem": f"question {i}", "solution": f"answer {i}", "answer": str(i), "messages": "x"} for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:3]), folder / "test-00000.parquet")
    columns = {"prompt": "problem", "completion": "solution"}
    data = HubDataSpec(dataset=str(folder), columns=columns)
    read = questions(data, 16)
    assert sorted(read[:8]) == sorted(read[8:]) == [f"question {i}" for i in range(8)]
    assert read[:8] != read[8:]
    prompts = read_prompts(HubDataSpec(dataset=str(folder), columns=columns, split="test"), 99, 0)
    assert [(p.text, p.answer) for p in prompts] == [(f"question {i}", str(i)) for i in range(3)]
    assert prompts[2].place == f"{folder} test row 2"
    with pytest.raises(ValueError, match=r"columns\.prompt: there is no column 'promt'; use one of problem, solution"):
        iter_placed(HubDataSpec(dataset=str(folder), columns={"prompt": "promt"}), 0)
    with pytest.raises(ValueError, match=r"test row 0: messages: 'x' is not a list"):
        iter_placed(HubDataSpec(dataset=str(folder), split="test"), 0)


def test_what_save_to_disk_wrote_is_read_too(tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list([row(i) for i in range(4)])})
    saved.save_to_disk(str(tmp_path / "saved"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("saved", "one"):
        assert sorted(questions(HubDataSpec(dataset=str(tmp_path / name)), 4)) == [f"question {i}" for i in range(4)]


def test_data_set_that_does_not_load_is_one_clear_error(tmp_path, monkeypatch):
    def refuse(message, **spec):
        with pytest.raises(ValueError, match=message) as caught:
            iter_placed(HubDataSpec(**spec), 0)
        assert "\n" not in str(caught.value)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refuse(
        r"data set 'some/set', config 'main', split 'train', revision 'abc': it cannot be loaded \(.*\); "
        "check the name and the network, or download it and give its folder",
        dataset="some/set",
        config="main",
        revision="abc",
    )
    (tmp_path / "notes.txt").write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(r"cannot be loaded \(.*\); see that it holds data files", dataset=str(empty))
    (empty / "train.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    refuse(r"split 'dev': it cannot be loaded \(.*dev.*\)", dataset=str(empty), split="dev")
