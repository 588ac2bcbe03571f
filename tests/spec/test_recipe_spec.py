import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hybridize.spec import Mamba1Spec
from hybridize.spec.data import FileDataSpec, WorldDataSpec
from hybridize.spec.recipe import load_recipe, parse_recipe
from hybridize.spec.stages import DistillStage

ROWS = {"tokens_per_step": 4096, "sequence_length": 1024}
STAGES = [
    {"kind": "rank", "steps": 5, **ROWS},
    {"kind": "convert", "ranking": "rank", "num_layers": 8, "mixer": "mamba1"},
    {"kind": "distill", "model": "convert", "steps": 10, **ROWS, "rows_per_batch": 2},
    {"kind": "evaluate", "model": "distill"},
    {"kind": "evaluate", "name": "teacher-judged", "model": "teacher"},
    {"kind": "report"},
]


def recipe(*stages, **changes):
    return {"name": "job", "teacher": "./teacher", "stages": list(stages)} | changes


def faults(value):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at every line
        parse_recipe(value)
    return str(caught.value).splitlines()


def test_a_whole_job_is_read():
    job = parse_recipe(recipe(*STAGES))
    assert [stage.name for stage in job.stages] == [
        "rank", "convert", "distill", "evaluate", "teacher-judged", "report",
    ]  # fmt: skip
    assert [stage.inputs for stage in job.stages] == [(), ("rank",), ("convert",), ("distill",), (), ()]
    assert job.stages[1].mixer == Mamba1Spec()
    assert job.stages[2].accumulation == 2
    assert job.data == WorldDataSpec()
    assert job.output_folder == Path("runs/job")
    assert parse_recipe(recipe(*STAGES, output="out")).output_folder == Path("out")
    assert parse_recipe(job.model_dump(mode="json")) == job


def test_explicit_layers_are_listed_with_their_places():
    job = parse_recipe(recipe({"kind": "report"}, {"kind": "convert", "layers": [3, 5]}))
    assert job.layers_named() == {"recipe.stages[1].layers": (3, 5)}


SEARCH = {"kind": "search", "rankings": ["rank"], "num_layers": 2}
RANK, CONVERT = {"kind": "rank"}, {"kind": "convert", "layers": [1]}
ONE_FAULT = {
    "kind": (
        [{"kind": "rnk"}],
        "recipe.stages[0].kind: 'rnk' is unknown; use one of traces, rank, search, convert, fit, distill, sft, "
        "on_policy, merge, schedule, evaluate, harness, text, throughput, report; "
        "did you mean 'rank'?",
    ),
    "no kind": ([RANK, {"name": "x"}], "recipe.stages[1]: its kind is missing; add kind"),
    "no mapping": ([RANK, 3], "recipe.stages[1]: 3 is not a mapping; write keys and values"),
    "key": ([{**RANK, "stepz": 3}], "recipe.stages[0].stepz: unknown key; did you mean 'steps'?"),
    "odd key": ([{**RANK, "qqq": 3}], "recipe.stages[0].qqq: unknown key; remove it"),
    "key like a kind": ([{**RANK, "report": 3}], "recipe.stages[0].report: unknown key; did you mean 'repeats'?"),
    "mixer": (
        [{**RANK, "mixer": "mamba"}],
        "recipe.stages[0].mixer: 'mamba' is unknown; use one of "
        "attention, mamba1, mamba2, gated_delta_net, kimi_delta_attention, sliding_window, identity; "
        "did you mean 'mamba2'?",
    ),
    "mixer type": (
        [{**RANK, "mixer": {"type": "mamba"}}],
        "recipe.stages[0].mixer.type: 'mamba' is unknown; use one of "
        "attention, mamba1, mamba2, gated_delta_net, kimi_delta_attention, sliding_window, identity; "
        "did you mean 'mamba2'?",
    ),
    "mixer size": (
        [{**RANK, "mixer": {"type": "mamba1", "d_inner": 7}}],
        "recipe.stages[0].mixer: d_inner 7 is not a multiple of state_size 16; change one",
    ),
    "convert to attention": (
        [{**CONVERT, "mixer": "attention"}],
        "recipe.stages[0].mixer: 'attention' is not accepted: a layer is converted to a mixer other than "
        "attention; use mamba1",
    ),
    "no choice": (
        [{"kind": "convert"}],
        "recipe.stages[0]: give either layers, or ranking and num_layers, or search, or layout",
    ),
    "a layout of digits without quotes": (
        [{"kind": "convert", "layout": 2222}],
        "recipe.stages[0].layout: 2222 is not accepted: write one letter a layer, in quotes where all are digits, or a "
        "list of mixers",
    ),
    "a misspelt mixer in a layout": (
        [{"kind": "convert", "layout": ["attention", "mamba1", "identty"]}],
        "recipe.stages[0].layout[2]: 'identty' is unknown; use one of "
        "attention, mamba1, mamba2, gated_delta_net, kimi_delta_attention, sliding_window, identity; "
        "did you mean 'identity'?",
    ),
    "a misspelt mixer in blocks": (
        [{"kind": "convert", "layout": "aax", "blocks": {"x": "mamba3"}}],
        "recipe.stages[0].blocks.x: 'mamba3' is unknown; use one of "
        "attention, mamba1, mamba2, gated_delta_net, kimi_delta_attention, sliding_window, identity; "
        "did you mean 'mamba2'?",
    ),
    "blocks without letters": (
        [{"kind": "convert", "layout": ["mamba1"], "blocks": {"x": "mamba1"}}],
        "recipe.stages[0].blocks: they say what letters of a layout mean; give a layout of letters",
    ),
    "layout and mixer": (
        [{"kind": "convert", "layout": "am", "mixer": "mamba2"}],
        "recipe.stages[0].mixer: the layout says what every layer becomes; remove mixer",
    ),
    "a gate that cannot be made": (
        [{"kind": "convert", "layout": "ak", "init": "attention_gate"}],
        "recipe.stages[0].init: attention_gate makes the output gate of the output projection, but Kimi delta "
        "attention's gate is of low rank; use neutral",
    ),
    "two choices": (
        [RANK, {**CONVERT, "ranking": "rank", "num_layers": 2}],
        "recipe.stages[1]: give either layers, or ranking and num_layers, or search, or layout",
    ),
    "how many": (
        [RANK, {"kind": "convert", "ranking": "rank"}],
        "recipe.stages[1]: ranking and num_layers go together; give both or neither",
    ),
    "no ranking": (
        [{"kind": "convert", "ranking": "rank", "num_layers": 2}, RANK],
        "recipe.stages[0].ranking: 'rank' is not an earlier stage, and none before it fits; add one first",
    ),
    "misspelt ranking": (
        [RANK, {"kind": "convert", "ranking": "rnk", "num_layers": 2}],
        "recipe.stages[1].ranking: 'rnk' is unknown; use one of rank; did you mean 'rank'?",
    ),
    "a search and a mixer": (
        [RANK, SEARCH, {"kind": "convert", "search": "search", "mixer": "mamba2"}],
        "recipe.stages[2].mixer: the search says what every layer becomes; remove mixer",
    ),
    "a search of a hybrid": (
        [RANK, SEARCH, CONVERT, {"name": "more", "kind": "convert", "search": "search", "model": "convert"}],
        "recipe.stages[3].model: a search is about the teacher, not about 'convert'; remove model",
    ),
    "a search without a target": (
        [RANK, {"kind": "search", "rankings": ["rank"]}],
        "recipe.stages[1]: give speedup, or num_layers, or both; else nothing need be replaced",
    ),
    "a search's ranking twice": (
        [RANK, {**SEARCH, "rankings": ["rank", "rank"]}],
        "recipe.stages[1].rankings: ['rank', 'rank'] is not accepted: 'rank' is named twice; name each ranking once",
    ),
    "a search's misspelt ranking": (
        [RANK, {**SEARCH, "rankings": ["rnk"]}],
        "recipe.stages[1].rankings[0]: 'rnk' is unknown; use one of rank; did you mean 'rank'?",
    ),
    "a misspelt search": (
        [RANK, SEARCH, {"kind": "convert", "search": "serach"}],
        "recipe.stages[2].search: 'serach' is unknown; use one of search; did you mean 'search'?",
    ),
    "misspelt model": (
        [CONVERT, {"kind": "distill", "model": "convrt", "steps": 1}],
        "recipe.stages[1].model: 'convrt' is unknown; use one of convert; did you mean 'convert'?",
    ),
    "model of the wrong kind": (
        [RANK, CONVERT, {"kind": "evaluate", "model": "rank"}],
        "recipe.stages[2].model: 'rank' is unknown; use one of convert, teacher",
    ),
    "the teacher is not trained": (
        [CONVERT, {"kind": "distill", "model": "teacher", "steps": 1}],
        "recipe.stages[1].model: 'teacher' is unknown; use one of convert",
    ),
    "later model": (
        [{"kind": "distill", "model": "convert", "steps": 1}, CONVERT],
        "recipe.stages[0].model: 'convert' is not an earlier stage, and none before it fits; add one first",
    ),
    "same name": (
        [RANK, RANK],
        "recipe.stages[1].name: 'rank' is taken; give each stage a name of its own",
    ),
    "reserved name": (
        [{**RANK, "name": "teacher"}],
        "recipe.stages[0].name: 'teacher' is taken; give each stage a name of its own",
    ),
    "rows": (
        [CONVERT, {"kind": "distill", "model": "convert", "steps": 1, "tokens_per_step": 100}],
        "recipe.stages[1]: tokens_per_step 100 is not a whole number of batches of 1 rows of 16384 tokens; "
        "use a multiple of 16384",
    ),
    "rows of a ranking": (
        [{**RANK, "tokens_per_step": 100}],
        "recipe.stages[0]: tokens_per_step 100 is not a whole number of rows of 16384 tokens; use a multiple of 16384",
    ),
    "missing": (
        [CONVERT, {"kind": "distill", "model": "convert"}],
        "recipe.stages[1].steps: required, but missing; add it",
    ),
    "value": (
        [{**RANK, "steps": 0}],
        "recipe.stages[0].steps: 0 is not accepted: Input should be greater than 0",
    ),
    "no stages": (
        [],
        "recipe.stages: [] is not accepted: Tuple should have at least 1 item after validation, not 0",
    ),
}


@pytest.mark.parametrize("name", ONE_FAULT)
def test_a_fault_is_one_line_with_place_value_and_remedy(name):
    stages, line = ONE_FAULT[name]
    assert faults(recipe(*stages)) == [line]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": {"source": "wrld"}}, "recipe.data.source: 'wrld' is unknown; use one of world, file, hub, traces"),
        ({"data": {"source": "world", "levels": [0]}}, "recipe.data.levels: 0 is out of range; use 1..8"),
        ({"data": {"source": "world", "world": 1}}, "recipe.data.world: unknown key; remove it"),
        ({"data": {"source": "file"}}, "recipe.data.path: required, but missing; add it"),
        ({"taecher": "x"}, "recipe.taecher: unknown key; did you mean 'teacher'?"),
        ({"stages": "x"}, "recipe.stages: 'x' is not accepted: Input should be a valid tuple"),
    ],
)
def test_faults_outside_the_stages_are_named(changes, line):
    assert [fault.split("; did you mean 'world'")[0] for fault in faults(recipe(RANK, **changes))] == [line]


def test_every_fault_gets_its_line_and_none_twice():
    lines = faults({"name": "job", "stages": [{"kind": "rank", "steps": 0, "x": 1}, {"kind": "convert"}]})
    assert [line.partition(":")[0] for line in lines] == [
        "recipe.teacher", "recipe.stages[0].steps", "recipe.stages[0].x", "recipe.stages[1]",
    ]  # fmt: skip


def test_accumulation_is_whole():
    stage = DistillStage(name="d", model="m", steps=1, rows_per_batch=4, **ROWS)
    assert stage.accumulation == 1
    with pytest.raises(ValueError, match="use a multiple of 3072"):
        DistillStage(name="d", model="m", steps=1, rows_per_batch=3, **ROWS)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    path = write(tmp_path / "jobs" / "job.yaml", recipe(RANK, data={"source": "file", "path": "traces.jsonl"}))
    job = load_recipe(path)
    assert Path(job.teacher) == tmp_path / "jobs" / "teacher"
    assert job.data == FileDataSpec(path=str(tmp_path / "jobs" / "traces.jsonl"))


@pytest.mark.parametrize("teacher", ["/models/teacher", "owner/teacher"])
def test_absolute_paths_and_hub_names_stay(tmp_path, teacher):
    path = write(
        tmp_path / "job.yaml",
        recipe(RANK, teacher=teacher, data={"source": "file", "path": "/data/traces.jsonl"}),
    )
    job = load_recipe(str(path))
    assert job.teacher == teacher
    assert job.data.path == "/data/traces.jsonl"


def test_a_parent_folder_is_relative_too(tmp_path):
    path = write(tmp_path / "jobs" / "job.yaml", recipe(RANK, teacher="../teacher"))
    assert Path(load_recipe(path).teacher).resolve() == (tmp_path / "teacher").resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"job\.yaml: is not valid YAML: "),
        ("- a\n- b\n", r"job\.yaml: holds no mapping; start with `name:` and `teacher:`"),
        ("", r"job\.yaml: holds no mapping"),
        ("\x00", r"job\.yaml: is not valid YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = write(tmp_path / "job.yaml", text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read \(No such file or directory\); check"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); check the path"):
        load_recipe(tmp_path)


def test_a_faulty_file_tells_every_fault(tmp_path):
    path = write(tmp_path / "job.yaml", recipe({**RANK, "stepz": 1}, {"kind": "report", "title": 3}))
    with pytest.raises(ValueError, match=r"stages\[0\]\.stepz: unknown key(.|\n)*stages\[1\]\.title: 3 is not"):
        load_recipe(path)


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, hybridize.spec.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"swps": 2}, r"recipe\.stages\[0\]\.levels: 'swps' is unknown; .*did you mean 'swaps'"),
        (
            {"swaps": 9},
            r"recipe\.stages\[0\]\.levels\.swaps: 9 is not accepted: Input should be less than or equal to 8",
        ),
    ],
)
def test_levels_by_task_are_checked(levels, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe({"kind": "evaluate", "model": "teacher", "levels": levels}))
