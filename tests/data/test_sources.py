"""Where conversations come from: endless, deterministic, and checked before anything is trained."""

from itertools import islice

import pytest

from hybridize.data.sources import iter_conversations, read_prompts
from hybridize.data.world import draw_problem, split_of
from hybridize.spec.data import FileDataSpec, WorldDataSpec

WORLD = WorldDataSpec(tasks=("swaps", "addition"), levels=(1, 2))
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def take(data, n, seed=0):
    return list(islice(iter_conversations(data, seed), n))


def row(i):
    return {"prompt": f"question {i}", "completion": f"answer {i}"}


def test_world_cycles_tasks_and_levels_over_training_problems():
    cells = [("swaps", 1), ("addition", 1), ("swaps", 2), ("addition", 2)]
    expected = [draw_problem(task, level, "train", i) for i in range(3) for task, level in cells]
    assert take(WORLD, 12) == [problem.messages for problem in expected]
    assert {split_of(problem) for problem in expected} == {"train"}


def test_world_is_a_function_of_both_seeds():
    draws = [take(WORLD, 8), take(WORLD, 8, seed=1), take(WORLD.model_copy(update={"seed": 1}), 8)]
    assert draws[0] == take(WORLD, 8)
    assert all(draws[i] != draws[j] for i, j in ((0, 1), (0, 2), (1, 2)))


def test_world_refuses_an_unknown_task_at_once():
    with pytest.raises(ValueError, match=r"tasks\[1\]: 'swap' is unknown; .*did you mean 'swaps'"):
        iter_conversations(WorldDataSpec(tasks=("swaps", "swap")), 0)


def test_file_is_read_once_an_epoch_in_another_order_each(write_lines):
    data = FileDataSpec(path=str(write_lines(*map(row, range(20)))))
    passes = [[m[0]["content"] for m in part] for part in _chunks(take(data, 60), 20)]
    assert [sorted(p) for p in passes] == [sorted(f"question {i}" for i in range(20))] * 3
    assert len(set(map(tuple, passes))) == 3
    assert take(data, 60) == take(data, 60)
    assert take(data, 20) != take(data, 20, seed=1)


def test_file_may_hold_messages_prompts_empty_lines_and_a_mark(write_lines):
    system = {"role": "system", "content": "é ✓ 漢"}
    chat = {"messages": [system, USER | {"name": "x"}, ANSWER], "id": 7}
    path = write_lines("\ufeff" + '{"prompt": "2 + 2?", "completion": "4"}', "", chat, "  ")
    both = take(FileDataSpec(path=str(path)), 2)
    assert sorted(both, key=len) == [[USER, ANSWER], [system, USER, ANSWER]]


MALFORMED = [
    ('{"prompt": "2 + 2', r"'\{.*2 \+ 2' is not JSON \(Unterminated.*write one JSON object a line"),
    ("[1, 2]", r"\[1, 2\] is not an object; write \{"),
    ("NaN", "nan is not an object"),
    ({"text": "x"}, "prompt and completion missing, keys are 'text'; write"),
    ({"prompt": "x"}, "completion missing, keys are 'prompt'"),
    ({"prompt": "x", "completion": ""}, "completion: '' is empty; fill it in, or remove the line"),
    ({"prompt": " \n", "completion": "x"}, r"prompt: ' \\n' is empty"),
    ({"prompt": ["x"], "completion": "x"}, r"prompt\[0\]: 'x' is no message; write"),
    (
        {"messages": [USER, ANSWER], "prompt": "x"},
        "it has messages and prompt as well, and the prompt 'x' is none of the messages; keep one",
    ),
    ({"messages": "x" * 99}, r"messages: 'x{50,}\.\.\. is not a list of at least two messages"),
    ({"messages": [ANSWER]}, r"messages: \[\{.*\] is not a list of at least two messages"),
    ({"messages": [USER, "4"]}, r"messages\[1\]: '4' is no message; write"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]\.content: missing in .*; add it"),
    ({"messages": [{"content": "x"}, ANSWER]}, r"messages\[0\]\.role: missing"),
    ({"messages": [USER, ANSWER | {"content": None}]}, r"messages\[1\]\.content: None is not text"),
    ({"messages": [USER, ANSWER, USER]}, r"messages\[2\]\.role: 'user' is last; end with the assistant's"),
    ('{"prompt": "\\ud800", "completion": "x"}', r"prompt: '\\ud800' holds half a character"),
    ("[" * 100_000, r"'\[+\.\.\. is not JSON \(maximum recursion"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_line_is_named_with_its_field_value_and_remedy(line, message, write_lines):
    path = write_lines(row(0), "", line)
    with pytest.raises(ValueError, match=f"traces.jsonl:3: {message}") as caught:
        iter_conversations(FileDataSpec(path=str(path)), 0)
    assert len(str(caught.value)) < 500


def test_file_that_is_no_text_or_empty_or_absent_is_refused(tmp_path, write_lines):
    def refuse(path, message):
        with pytest.raises(ValueError, match=message):
            iter_conversations(FileDataSpec(path=str(path)), 0)

    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    refuse(binary, r"binary.jsonl:1: it is not UTF-8 \(invalid start byte\); save")
    refuse(write_lines("", " "), "traces.jsonl: it holds no conversation; write one a row")
    refuse(tmp_path / "none.jsonl", "none.jsonl: it cannot be read .*No such file.*; check the path")
    refuse(tmp_path, "it cannot be read .*directory")


def _chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def test_rows_may_tell_their_chat_twice_and_prompts_may_be_messages(write_lines):
    twice = {"messages": [USER, ANSWER], "prompt": "2 + 2?", "completion": "4"}
    lists = {"prompt": [USER], "completion": [ANSWER], "messages": None}
    path = write_lines(twice, lists)
    assert take(FileDataSpec(path=str(path)), 2) == [[USER, ANSWER]] * 2
    path = write_lines(twice | {"completion": "5"})
    with pytest.raises(ValueError, match=r"jsonl:1: it has messages and completion as well, and the completion '5' is"):
        iter_conversations(FileDataSpec(path=str(path)), 0)


def test_prompts_come_in_order_without_their_completion(write_lines):
    path = write_lines(
        {"prompt": "a", "completion": "b", "answer": 4, "id": 17},
        {"messages": [USER, ANSWER], "answer": "four"},
        {"messages": [USER, ANSWER, USER], "answer": None},
        {"prompt": "not read"},
    )
    prompts = read_prompts(FileDataSpec(path=str(path)), 3, seed=5)
    assert [prompt.messages for prompt in prompts] == [[{"role": "user", "content": "a"}], [USER], [USER, ANSWER, USER]]
    assert [prompt.answer for prompt in prompts] == ["4", "four", None]
    assert [prompt.id for prompt in prompts] == ["17", f"{path}:2", f"{path}:3"]
    assert prompts[2].text == USER["content"]
    assert len(read_prompts(FileDataSpec(path=str(path)), 99, seed=0)) == 4


BAD_PROMPTS = [
    ({"completion": "x"}, "prompt missing, keys are 'completion'; write"),
    ({"messages": [ANSWER]}, "messages: there is none before the assistant's; write the user's message first"),
    ({"messages": []}, r"messages: \[\] is not a list"),
    ({"prompt": "x", "answer": ["4"]}, r"answer: \['4'\] is not text"),
    ({"prompt": "x", "answer": True}, "answer: True is not text"),
    ({"prompt": "x", "answer": " "}, "answer: ' ' is empty"),
]


@pytest.mark.parametrize(("line", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_malformed_prompt_is_named_with_its_column_value_and_remedy(line, message, write_lines):
    path = write_lines({"prompt": "fine"}, line)
    with pytest.raises(ValueError, match=f"traces.jsonl:2: {message}"):
        read_prompts(FileDataSpec(path=str(path)), 2, 0)


def test_prompts_of_the_world_are_the_problems_that_are_trained_on():
    prompts = read_prompts(WORLD, 9, seed=3)
    chats = take(WORLD, 9, seed=3)
    assert [prompt.messages for prompt in prompts] == [chat[:1] for chat in chats]
    for prompt, chat in zip(prompts, chats, strict=True):
        assert prompt.problem.messages == chat
        assert prompt.answer == prompt.problem.answer
    assert len({prompt.id for prompt in prompts}) == 9
