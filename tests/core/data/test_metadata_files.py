import json
import os
import random

import pytest

from sdxl_train.data.metadata_files import MOST_PROBLEMS, read_metadata_files


def write(tmp_path, content, name="m.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return str(path)


def read_with_problems(*paths):
    problems = []
    rows = read_metadata_files(list(paths), problems)
    return {key: json.loads(text) for key, text in zip(rows.keys, rows.texts, strict=True)}, problems


def read(*paths):
    rows, problems = read_with_problems(*paths)
    assert problems == []
    return rows


def refused(*paths) -> str:
    problems = read_with_problems(*paths)[1]
    assert {problem.kind for problem in problems} == {"metadata"}
    return "\n".join(problem.message for problem in problems)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_files_merge_per_picture_and_per_field_and_the_later_wins(tmp_path):
    first = write(tmp_path, '{"a": {"caption": "old", "artist": "x"}, "b": {"caption": "b"}}', "1.json")
    second = write(tmp_path, '{"a": {"caption": "new", "more": [1]}, "c": {}}', "2.json")
    assert read(first, second) == {"a": {"caption": "new", "artist": "x", "more": [1]}, "b": {"caption": "b"}, "c": {}}
    assert read(second, first)["a"]["caption"] == "old"


def test_merged_rows_have_merged_columns(tmp_path):
    first = write(tmp_path, '{"a": {"image_path": "x.png", "caption": "c", "original_size": [2, 3]}, "z": {"artist": "q"}}', "1.json")
    second = write(tmp_path, '{"a": {"artist": "\\ud800", "caption": null, "tags": "tags", "nl_caption": "long text"}}', "2.json")
    rows = read_metadata_files([first, write(tmp_path, '{"a": {"artist": "\\udc80me"}}', "3.json")], [])
    assert list(rows.keys) == ["a", "z"] and list(rows.image_paths) == ["x.png", ""]
    assert [rows.artists.names[code] for code in rows.artists.codes] == ["\udc80me", "q"]
    problems = []
    rows = read_metadata_files([first, second, first], problems)
    assert [problem.message for problem in problems] == [f'{second}:1: key "a": artist holds half of a surrogate pair, \\ud800, which is no character']
    second = write(tmp_path, '{"a": {"caption": null, "tags": "tags", "nl_caption": "long text", "image_path": null}}', "2.json")
    rows = read_metadata_files([first, second], problems)
    assert rows.max_tokens[0] == len("long text") and rows.has_caption[0] and rows.image_paths[0] == ""
    assert rows.original_sizes.tolist() == [[2, 3], [0, 0]]


def test_rows_that_do_not_fit_together_are_a_problem_of_the_later_file(tmp_path):
    first = write(tmp_path, '{"a": {"caption": "c", "tags": ["x"]}}', "1.json")
    second = write(tmp_path, '{"a":\n {"caption": null}}', "2.json")
    rows, problems = read_with_problems(first, second)
    assert rows == {} and [problem.message for problem in problems] == [
        f'{second}:2: key "a": tags, used as caption, must be text, found ["x"]'
    ]


def test_formats_merge_with_one_another(tmp_path):
    first = write(tmp_path, '{"a": {"caption": "c", "image_path": "old.png"}}', "1.json")
    second = write(tmp_path, lines({"file_name": "a.png", "artist": "x"}, {"key": "b"}), "2.jsonl")
    assert read(first, second)["a"] == {"caption": "c", "image_path": "old.png", "file_name": "a.png", "artist": "x"}
    assert read_metadata_files([first, second], []).image_paths[0] == str(tmp_path / "a.png")
    assert read_metadata_files([second, first], []).image_paths[0] == "old.png"


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert read(write(tmp_path, b'\xef\xbb\xbf{"a": {}}')) == {"a": {}}
    assert read(write(tmp_path, b'\xef\xbb\xbf{"key": "a"}', "m.jsonl")) == {"a": {"key": "a"}}


BAD_OBJECTS = [
    ('{"a": {"caption": "x"},\n "b": {"caption": "y', 2, "not JSON"),
    ('{"a": {},\n\n', 3, "not JSON"),
    ("", 1, "the end of the file"),
    ("[1]", 1, "expected {"),
    ('{"a": {}}\n{}', 2, "follows"),
    ('{"a": {},\n}', 2, 'expected "'),
    ('{"a": {"aesthetic_score":\n NaN}}', 2, "NaN"),
    ('{"a": {"mine": [1,\n -Infinity]}}', 2, "-Infinity"),
    ('{"a": {},\n"b": {},\n"a": {}}', 3, "twice, first on line 1"),
    ('{"a": {},\n"a": {},\n"b": {}}', 2, "twice, first on line 1"),
    ('{"a": {"caption": "x",\n"caption": "y"}}', 2, "twice"),
    ('{"a": {"caption": "x",\n"caption" : "y"}}', 2, "twice"),
    ('{"a": {"caption": "x",\n"caption"\n\t: "y"}}', 2, "twice"),
    ('{"a": {"caption": "x",\n"\\u0063aption": "y"}}', 1, "twice"),
    ('{"a": {"mine": [{"deep": 1,\n"deep": 2}]}}', 2, "twice"),
    ('{"a":\n [1]}', 2, "object"),
    ('{"x": {},\n "a": {"caption": 5}}', 2, "caption must be text, found 5"),
    ('{"a": {"tags": ["x"]}}', 1, "tags, used as caption"),
    ('{"a": {"tags": ["x"], "caption": " "}}', 1, "tags, used as caption"),
    ('{"a": {"aesthetic_score": true}}', 1, "aesthetic_score must be a number, found true"),
    ('{"a": {"aesthetic_score":\n 1e999}}', 2, "1e999"),
    ('{"a": {"original_size": [3]}}', 1, "original_size must be [w, h] in px, found [3]"),
    ('{"a": {"original_size": [3.0, 4]}}', 1, "original_size"),
    ('{"a": {"original_size": [true, 4]}}', 1, "original_size"),
    ('{"a": {"original_size": [0, 4]}}', 1, "original_size"),
    ('{"a": {"original_size": [1, 2147483648]}}', 1, "original_size"),
    ('{"a": {"original_size": "3x4"}}', 1, "original_size"),
    ('{"a": {"caption": "x\\u0000"}}', 1, 'key "a": caption holds a NUL character'),
    ('{"a": {"caption": "\\ud800"}}', 1, 'key "a": caption holds half of a surrogate pair, \\ud800'),
    ('{"a": {"tags": "x\\u0000"}}', 1, "tags, used as caption, holds a NUL character"),
    ('{"a": {"caption": "x\ny"}}', 1, "control character"),
    ('{"a\\u0000": {}}', 1, "no file can have this name: it holds a NUL character"),
    ('{"ok": {},\n"a": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}", 2, "nested too deeply"),
    ('{"ok": {},\n"a": {"x": ' + "[" * 101 + "]" * 101 + "}}", 2, "nested too deeply"),
    ('{"ok": {},\n"a": ' + '{"x": ' * 102 + "1" + "}" * 102 + "}", 2, "nested too deeply"),
    ('{"ok": {},\n"a": {"x": ' + "9" * 5000 + "}}", 2, "digits"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD_OBJECTS)
def test_bad_objects_are_refused_with_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path, text)
    message = refused(path)
    assert f"{path}:{line}: " in message
    assert words in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"key": "a"}\n{"key": "b"', 2, "not JSON"),
        ('\n\n{"key": "a"}\n\n{"key": "b",}\n', 5, "not JSON"),
        ('{"key": "a"}\n{"key": "b"} {}', 2, "follows"),
        ('{"key": "a"}\n5', 2, "object"),
        ('{"key": "a"}\n{"caption": "c"}', 2, "give key, image_path or file_name"),
        ('{"key": "a"}\n{"image_path": "folder/"}', 2, "give key, image_path or file_name"),
        ('{"key": 7}', 1, "key must be text, found 7"),
        ('{"key": "a\\u0000"}', 1, "key holds a NUL character"),
        ('{"key": "\\ud800"}', 1, "key holds half of a surrogate pair, \\ud800"),
        ('{"key": "a", "file_name": "x\\u0000"}', 1, "file_name holds a NUL character"),
        ('{"key": "a"}\n\n{"key": "b"}\n{"key": "a"}', 4, 'key "a": the key stands in this file twice, first on line 1'),
        ('{"key": "a"}\n{"image_path": "x/a.png"}', 2, "twice, first on line 1"),
        ('{"key": "a", "caption": "x", "caption": "y"}', 1, "the field caption is given twice"),
        ('{"key": "a", "aesthetic_score": NaN}', 1, "NaN"),
        ('{"key": "a"}\n{"key": "b", "caption": "\udc80"}', 2, "not UTF-8"),
        ('{"key": "a", "x": ' + "[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path, text, "m.jsonl")
    message = refused(path)
    assert message.startswith(f"{path}:{line}: ") and "\n" not in message
    assert words in message


def test_rows_beside_a_wrong_one_are_kept(tmp_path):
    assert set(read_with_problems(write(tmp_path, lines({"key": "a"}, {"key": "b", "artist": 5}, {"key": "c"}), "m.ndjson"))[0]) == {
        "a",
        "c",
    }
    assert set(read_with_problems(write(tmp_path, '{"a": {}, "b": {"artist": 5}, "c": {}, "d": {"x"'))[0]) == {"a", "c"}


def test_of_a_key_that_stands_twice_the_first_is_kept(tmp_path):
    assert read_with_problems(write(tmp_path, '{"a": {"x": 1}, "b": {}, "a": {"x": 2}, "a": {}}'))[0] == {"a": {"x": 1}, "b": {}}


@pytest.mark.parametrize(
    ("row", "key", "image_path"),
    [
        ({"key": "k", "image_path": "x/a.png", "file_name": "b.png"}, "k", "x/a.png"),
        ({"image_path": "x\\y.z\\a.b.png", "file_name": "b.png"}, "a.b", "x/y.z/a.b.png"),
        ({"image_path": "x.y/a"}, "a", "x.y/a"),
        ({"image_path": "x/.hidden"}, ".hidden", "x/.hidden"),
        ({"key": None, "image_path": None, "file_name": "sub/b.png"}, "b", "{folder}/sub/b.png"),
        ({"key": "", "image_path": "", "file_name": "sub\\b.png"}, "b", "{folder}/sub/b.png"),
        ({"key": "k"}, "k", ""),
        ({"key": "猫"}, "猫", ""),
        ({"image_path": "x/\udc80.png"}, "\udc80", "x/\udc80.png"),
    ],
)
def test_a_line_is_named_by_key_or_picture(tmp_path, row, key, image_path):
    rows = read_metadata_files([write(tmp_path, lines(row), "m.jsonl")], problems := [])
    assert problems == [] and list(rows.keys) == [key]
    assert rows.image_paths[0] == image_path.format(folder=tmp_path)


def test_in_a_json_object_file_name_is_a_field_like_any_other(tmp_path):
    rows = read_metadata_files([write(tmp_path, '{"a": {"file_name": 5, "key": 6}}')], problems := [])
    assert problems == [] and list(rows.keys) == ["a"] and rows.image_paths[0] == ""


def test_blank_lines_and_carriage_returns_are_no_rows(tmp_path):
    assert set(read(write(tmp_path, '\r\n{"key": "a"}\r\n  \t\n{"key": "b"}\r\n\r\n', "m.jsonl"))) == {"a", "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"caption": "caption", "artist": "NaN, Infinity"},
        {"caption": ":3, cat :d, x : y", "artist": "\\:", "mine": '":"'},
        {"caption": 'he said "x": {y}', "styles": "a\\u0000b", "{": "[[["},
        {"aesthetic_score": 10**25, "safe_rating": -0.0, "mine": {"deep": [{}, {"caption": 1}]}},
        {"mine": [[1, [2]], None, True], "original_size": [1, 2147483647], "caption": None, "": 1},
    ],
)
def test_what_only_looks_suspicious_is_accepted(tmp_path, row):
    assert read(write(tmp_path, json.dumps({"a": row, "b": {}})))["a"] == row
    assert read(write(tmp_path, lines({"key": "a", **row}), "m.jsonl"))["a"] == {"key": "a", **row}


def random_json(random, depth=0):
    """A JSON text with space in odd places, escapes, and fields of an object that may be equal."""
    space = random.choice(["", "", "", " ", "\t ", "\n"])
    kind = random.randrange(6 if depth < 3 else 4)
    if kind < 3:
        value = "".join(random.choices(['"', ":", ": ", " :", "\\", "{", "[", "a", "u0000", "猫", ","], k=random.randrange(5)))
        return space + json.dumps(value, ensure_ascii=random.random() < 0.5)
    if kind == 3:
        return space + random.choice(["1", "-0.5", "null", "true", "1e3"])
    if kind == 4:
        return space + "[" + ",".join(random_json(random, depth + 1) for _ in range(random.randrange(3))) + space + "]"
    return random_object(random, depth + 1)


def random_object(random, depth=0):
    names = random.choices(['"a"', '"b"', '"c:"', '"d "', '"\\u0061"', '"e\\""', '"f"', '"g"'], k=random.randrange(5))
    gap = random.choice(["", "", "", " ", "\n"])
    return gap + "{" + ",".join(f"{gap}{name}{gap}:{random_json(random, depth)}" for name in names) + "}"


def test_repeated_fields_are_found_wherever_python_finds_them(tmp_path):
    draws = random.Random(0)
    texts = [random_object(draws) for _ in range(4000)]

    def strict(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    expected, wrong = {}, set()
    for i, text in enumerate(texts):
        try:
            expected[f"{i:04d}"] = json.loads(text, object_pairs_hook=strict)
        except AssertionError:
            wrong.add(f"{i:04d}")
    assert 500 < len(wrong) < 3000
    path = write(tmp_path, "{" + ",\n".join(f'"{i:04d}":{text}' for i, text in enumerate(texts)) + "}")
    rows, problems = read_with_problems(path)
    assert rows == expected
    assert all("twice" in problem.message for problem in problems[:MOST_PROBLEMS])
    assert {problem.key for problem in problems[:MOST_PROBLEMS]} <= wrong


def test_lines_of_rows_over_several_lines_are_right(tmp_path):
    path = write(tmp_path, json.dumps({f"{i:04d}": {"artist": 5 if i == 900 else "x"} for i in range(1000)}, indent=1))
    assert refused(path) == f'{path}:{2 + 900 * 3}: key "0900": artist must be text, found 5'


def test_all_problems_of_all_files_come_in_one_report(tmp_path):
    first = write(tmp_path, '{"a": {"caption": 1},\n"b": {"artist": 2}}', "1.json")
    second = write(tmp_path, b'{"a": {},\n"\xff": {}}', "2.json")
    missing, folder = str(tmp_path / "none.json"), str(tmp_path)
    message = refused(first, second, missing, folder)
    for place in (f"{first}:1", f"{first}:2", f"{second}:2", missing, folder):
        assert f"{place}: " in message
    assert "not UTF-8" in message and "No such file" in message and "not a regular file" in message


def test_a_problem_knows_its_file_and_datum(tmp_path):
    path = write(tmp_path, '{"a\\n": {"caption": 1}}')
    [problem] = read_with_problems(path)[1]
    assert (problem.path, problem.key) == (path, "a\n") and 'key "a\\n": caption' in problem.message


def test_of_very_many_problems_the_rest_is_counted(tmp_path):
    problems = read_with_problems(write(tmp_path, "x\n" * (MOST_PROBLEMS + 7), "m.jsonl"))[1]
    assert len(problems) == MOST_PROBLEMS + 1 and "7 more problems" in problems[-1].message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in refused(str(tmp_path / "pipe.jsonl"))
