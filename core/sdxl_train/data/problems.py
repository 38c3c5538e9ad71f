"""Everything wrong with the data in one message, by kind."""

from collections.abc import Sequence

from sdxl_train.data.metadata import problem_list
from sdxl_train.errors import DataError, Problem

# kind -> what stands above its problems, in the order in which they are shown; those of kind `data` come first, without a heading
_HEADINGS = {
    "metadata": "metadata_files: these problems must be mended first",
    "name": "names that stand for several files; give image_path or rename the files",
    "caption": "caption files that cannot be used",
    "image": 'bad pictures; mend or remove them, or set bad_images = "skip" to train without them',
    "cache": "caches of data without a picture that cannot be used; mend or remove them",
}


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one error for all problems; nothing happens where there are none.

    Raises:
        DataError: with `problems`.
    """
    if not problems:
        return
    parts = [problem.message for problem in problems if problem.kind == "data"]
    for kind, heading in _HEADINGS.items():
        messages = [problem.message for problem in problems if problem.kind == kind]
        if messages:
            parts.append(problem_list(heading, messages))
    assert {problem.kind for problem in problems} <= {"data", *_HEADINGS}
    raise DataError("\n".join(parts), problems)
