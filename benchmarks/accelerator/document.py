"""Writes docs/accelerators.md from the lines of JSON of `python -m benchmarks.accelerator`, and of --compile_only.

python -m benchmarks.accelerator.document results.jsonl compiled.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import run_program

DOCUMENT = Path("docs/accelerators.md")
BEGIN, END = "<!-- by python -m benchmarks.accelerator.document -->\n", "<!-- to here -->\n"
Lines = list[dict[str, Any]]

COLUMNS = {
    "program": "program",
    "case": "",
    "seconds": "s",
    "spread": "spread",
    "rate": "a second",
    "mfu": "MFU",
    "peak_gib_so_far": "peak GiB so far",
    "arguments_gib": "arguments GiB",
    "temporaries_gib": "temporaries GiB",
    "compile_seconds": "compile s",
    "load_seconds": "load s",
}
COMPILED = {
    "program": "program",
    "arguments_gib": "arguments GiB",
    "temporaries_gib": "temporaries GiB",
    "moved_gb": "GB through memory",
    "compile_cpu_seconds": "CPU s of compilation",
    "fusions": "fusions",
    "reductions": "of these sums",
    "convolutions": "cuDNN convolutions",
    "attentions": "cuDNN attentions",
    "products": "cuBLAS products",
    "others": "other calls",
    "file_mb": "file MB",
}


def tables(runs: Iterable[Lines]) -> str:
    """Return Markdown: of each run what it ran on, and what it found. Runs: lines of JSON, each as it was printed."""
    measured, compiled = [], []
    for lines in runs:
        (compiled if any("compiled_for" in line for line in lines) else measured).append(lines)
    text = [] if measured else ["**Nothing was measured yet: no card was at hand.** What follows the compiler said.\n"]
    text += ["\n".join(_measured(lines)) for lines in measured]
    text += ["\n".join(_compiled(lines)) for lines in compiled]
    return "\n".join(text)


def _measured(lines: Lines) -> Iterator[str]:
    about = {key: value for line in lines for key, value in line.items() if key in ("command", "began", "device")}
    versions = next((f"JAX {line['jax']}, jaxlib {line['jaxlib']}" for line in lines if "jax" in line), "")
    yield f"### {about.get('device', 'no device')}, {versions}, {about.get('began', '')}\n"
    yield f"    {about.get('command', '')}\n"
    for start in ("cold_start", "warm_start"):
        phases = [line for line in lines if line.get("part") == start and "phase" in line]
        if phases:
            said = "; ".join(f"{line['phase']} {line['seconds']} s" for line in phases)
            yield f"{start.replace('_', ' ')}: {said}; in all {phases[-1]['since_start']} s.\n"
    rows = [_with_rate(line) for line in lines if "program" in line and "seconds" in line]
    yield from _table(COLUMNS, rows)
    for line in lines:
        if "pixels" in line:
            yield f"Input, {line['pixels']} px: {line['images_per_second']} images/s, {line['threads']} threads.\n"
    for line in lines:
        if "kernels" in line:
            yield f"\nThe longest kernels of {line['program']}:\n"
            kernels = [{**one, "share": f"{one['share']:.1%}"} for one in line["kernels"]]
            yield from _table({"kernel": "kernel", "times": "times", "ms": "ms", "share": "share"}, kernels)
    for line in lines:
        for what in ("failed", "ended", "skipped", "note"):
            if what in line:
                yield f"- {line.get('program', line.get('part'))}: {what} {line[what]}"


def _compiled(lines: Lines) -> Iterator[str]:
    about = next(line for line in lines if "compiled_for" in line)
    yield f"### Compiled for {about['compiled_for']}, JAX {about['jax']}, jaxlib {about['jaxlib']}\n"
    yield from (f"    {line['command']}\n" for line in lines if "command" in line)
    yield from _table(COMPILED, [line for line in lines if "program" in line and "fusions" in line])
    yield from (f"- {line['program']}: failed: {line['failed']}" for line in lines if "failed" in line)


def _with_rate(line: dict[str, Any]) -> dict[str, Any]:
    rate = next((f"{value} {key[: -len('_per_second')]}" for key, value in line.items() if "_per_second" in key), "")
    mfu = f"{line['mfu']:.1%}" if "mfu" in line else ""
    return line | {"rate": rate.replace("_", " "), "mfu": mfu}


def _table(columns: dict[str, str], rows: Lines) -> Iterator[str]:
    """Yield a table of the columns that any row has."""
    there = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if rows:
        yield "| " + " | ".join(columns[key] for key in there) + " |"
        yield "|" + "---|" * len(there)
        yield from ("| " + " | ".join(str(row.get(key, "")) for key in there) + " |" for row in rows)
        yield ""


def read(file: str) -> Lines:
    """Return the lines of a file that are JSON objects. Raises UserError where there is none."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise UserError(f"{file} has no line of JSON")
    return lines


def main(argv) -> None:
    text = DOCUMENT.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{DOCUMENT} has no place for tables: put {BEGIN.strip()} and {END.strip()} where they go")
    disk.write(DOCUMENT, (before + begin + tables(map(read, argv[1:])) + end + after).encode())
    print(DOCUMENT)


if __name__ == "__main__":
    run_program(main, arguments=100)
