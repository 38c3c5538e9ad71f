"""How a plan is shown: as lines for people, or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sdxl_train.memory_estimate import shown_parts
from sdxl_train.text_display import listed, printable

if TYPE_CHECKING:
    from sdxl_train.check import BucketPlan, Plan

_LISTED = 20


def as_json_object(plan: Plan) -> str:
    """Every field of the plan under its name; null where it could not be found out. One line, ASCII.

    Of a problem only what it has; of memory also its `total` in bytes.
    """
    fields = asdict(plan)
    for name in ("problems", "bad_pictures"):
        fields[name] = fields[name] and [_problem_fields(problem) for problem in fields[name]]
    if plan.tokens is not None:
        worst = [{"key": key, "tokens": tokens} for key, tokens in plan.tokens.worst]
        fields["tokens"] = {"over": plan.tokens.num_over, "worst": worst}
    for part in (fields["memory"] or {}).values():
        if part is not None:
            part["total"] = sum(part["bytes_by_part"].values())
    return json.dumps(fields) + "\n"


def _problem_fields(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in problem.items() if value is not None}


def as_text(plan: Plan) -> str:
    """The plan in plain lines: what is trained, what is left out, and what that takes, notes, warnings, problems."""
    parts = (_data, _buckets, _steps, _texts, _caches, _memory, _saves, _duplicates)
    lines = [line for part in parts for line in part(plan)] if plan.images is not None else []
    lines += _section("warnings", plan.warnings)
    lines += _section("problems", [problem.message for problem in plan.problems])
    return printable("\n".join(lines)) + "\n" if lines else ""


def _section(title: str, messages: Sequence[str]) -> Iterator[str]:
    if messages:
        yield f"{title}: {len(messages)}"
        for message in messages:
            yield from (f"  {line}" for line in message.splitlines())


def _data(plan: Plan) -> Iterator[str]:
    assert plan.missing_keys is not None and plan.run_folders is not None and plan.bad_pictures is not None
    yield f"pictures: {plan.images}, of which {plan.captioned} captioned, {plan.described} described, {plan.without_text} without text"
    yield f"left out: {plan.missing} missing, {plan.dropped} dropped by 0 repeats, {plan.bad} bad"
    if plan.missing_keys:
        yield f"  missing: {listed(plan.missing_keys, _LISTED)}"
    for problem in plan.bad_pictures[:_LISTED]:
        yield f"  bad: {problem.message}"
    if len(plan.bad_pictures) > _LISTED:
        yield f"  and {len(plan.bad_pictures) - _LISTED} more bad pictures"
    if plan.hidden:
        yield f"  not searched: {plan.hidden} names that start with a dot"
    if plan.run_folders:
        yield f"  not searched: {len(plan.run_folders)} folders of training runs: {listed(plan.run_folders, _LISTED)}"
    if plan.undecoded:
        yield f"  not decoded yet, so damaged pixels are not known: {plan.undecoded} pictures (--decode looks at them)"
    yield f"samples: {plan.samples_per_epoch} an epoch"


_COLUMNS = ("size", "pictures", "samples", "batches", "cut off mean", "worst", "scaled mean", "least", "most", "enlarged")


def _buckets(plan: Plan) -> Iterator[str]:
    yield f"buckets: {len(plan.buckets or ())}"
    rows = [_COLUMNS, *map(_cells, sorted(plan.buckets or (), key=lambda bucket: (-bucket.images, bucket.size)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else ():
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _cells(bucket: BucketPlan) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        "{}x{}".format(*bucket.size),
        *map(str, (bucket.images, bucket.samples, bucket.batches)),
        *(shown(value, ".1%") for value in (bucket.cut_mean, bucket.cut_worst)),
        *(shown(value, ".2f") for value in (bucket.scale_mean, bucket.scale_min, bucket.scale_max)),
        shown(bucket.enlarged, "d"),
    )


def _steps(plan: Plan) -> Iterator[str]:
    yield (
        f"steps: {plan.num_train_steps}, of {plan.steps_per_epoch} an epoch; {plan.batches_per_epoch} batches an epoch; "
        f"effective batch {plan.effective_batch}"
    )


def _texts(plan: Plan) -> Iterator[str]:
    if plan.tokens is not None:
        yield f"texts that will be cut: {plan.tokens}"


def _caches(plan: Plan) -> Iterator[str]:
    caches = plan.caches
    if caches is None:
        return
    size = f", about {_size(caches.bytes_to_write)} to write" if caches.bytes_to_write else ""
    judged = "" if caches.were_read else " (by their headers)"
    yield f"caches: {caches.usable} can be used{judged}, {caches.to_encode} pictures to encode{size}"
    for reason in caches.invalid[:_LISTED]:
        yield f"  made again: {reason}"
    if len(caches.invalid) > _LISTED:
        yield f"  and {len(caches.invalid) - _LISTED} more caches that are made again"


def _memory(plan: Plan) -> Iterator[str]:
    if plan.memory is None:
        return
    predicted, measured = plan.memory.predicted, plan.memory.measured
    yield "memory at its peak, for a batch of {} at {}x{}:".format(predicted.batch_size, *predicted.size)
    yield f"  predicted: {predicted}"
    if measured is not None:
        waits = f"{len(measured.waits)} waits for the device{': ' if measured.waits else ''}{listed(measured.waits, _LISTED)}"
        yield f"  measured:  {shown_parts(measured.bytes_by_part)}; without the CUDA context"
        yield f"  the step: {measured.flops / 1e12:.3g} TFLOP, {measured.num_kernels} kernels, {waits}"


def _saves(plan: Plan) -> Iterator[str]:
    saves = plan.saves
    if saves is None:
        return
    count = len(saves.steps)
    yield f"output_dir: {saves.output_dir}, {_size(saves.free_bytes)} free on its disk"
    needs = f", of about {_size(saves.model_bytes)} each, {_size(saves.bytes)} at once" if count else ""
    yield f"models to save: {count}{needs}"
    if saves.state_bytes:
        yield f"train states: of about {_size(saves.state_bytes)} each, {_size(saves.states_bytes)} at once"
    if count:
        steps = ", ".join(map(str, saves.steps[:_LISTED])) + (f", and {count - _LISTED} more" if count > _LISTED else "")
        yield f"  after the steps {steps}; the last is {saves.last}"
    if saves.further_triggers:
        yield f"  and whenever these ask for it: {', '.join(saves.further_triggers)}"


def _duplicates(plan: Plan) -> Iterator[str]:
    groups = plan.duplicates or []
    if groups:
        yield f"groups of equal pictures: {len(groups)}"
        for group in groups[:_LISTED]:
            yield f"  {listed(group, _LISTED)}"
        if len(groups) > _LISTED:
            yield f"  and {len(groups) - _LISTED} more groups"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
