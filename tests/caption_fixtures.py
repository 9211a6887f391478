"""Caption files of every layout that is read."""

import gzip
import json
import pathlib
from collections.abc import Sequence

import pyarrow
import pyarrow.parquet

SUFFIXES = (".txt", ".tsv", ".jsonl", ".parquet", ".txt.gz", ".tsv.gz", ".jsonl.gz")


def write_captions(path: pathlib.Path, captions: Sequence[str]) -> pathlib.Path:
    """Captions, without line ends and tabs, as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"url": ["u"] * len(captions), "caption": pyarrow.array(captions, pyarrow.string())})
        pyarrow.parquet.write_table(table, path)
        return path
    line = {
        ".txt": lambda caption: caption,
        ".tsv": lambda caption: f"https://example.com/a.jpg\t{caption}",
        ".jsonl": lambda caption: json.dumps({"url": "u", "caption": caption}),
    }[[suffix for suffix in path.suffixes if suffix != ".gz"][-1]]
    data = "".join(f"{line(caption)}\n" for caption in captions).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path
