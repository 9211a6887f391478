"""What to sample, from which files, and where it goes: the options that both sampling programs share.

    job = Job(context=("a.png", "b.png"), num_images=4, output="out")
    job.find_sets()  # {"": [Path("a.png"), Path("b.png")]}

`run_job.py` does the job. Needs numpy and Pillow alone.
"""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path

from m2m_jax.core.errors import UserError
from m2m_jax.core.image_folder import list_images, list_sets
from m2m_jax.core.options import Options, option
from m2m_jax.core.paths import expand_home, natural_order

RECORD = "sample.json"  # the mark of a folder that this program wrote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Options):
    """What to sample and where to put it: each field is an option of both programs."""

    output: Path = option("Folder to write.")
    context: tuple[str, ...] = option(
        "Context images in order: files, patterns or folders; a name with a comma in double quotes. None is legal.",
        (),
    )
    sets: Path | None = option("Folder of folders of context images, in place of --context.", None)
    num_context: int | None = option("Use so many of each set's images, the first by name.", None, low=0)
    num_images: int = option("Images to generate for each set.", 4, low=1)
    seed: int = option(
        "Of the first set; each further one has the next. The same seed gives the same images.", 0, low=0
    )
    batch_size: int = option("Sets that a process samples at once, on all of its devices together.", 16, low=1)
    contact_sheet: bool = option("Write contact_sheet.png.", True)
    html: bool = option("Write index.html, a page of everything that opens from disk.", False)

    def find_sets(self) -> dict[str, list[Path]]:
        """Return {set name: its context files}; the one set of `context` has the empty name.

        Names are sorted as people count: 2.png before 10.png.

        Raises:
          UserError: there are none, or `output` holds what no earlier call wrote: the images it is given, for one.
        """
        sets = self._find_sets()
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output={self.output} is a file; name a folder")
        if self.sets is not None and self.output.resolve() == self.sets.resolve():
            raise UserError("--output and --sets are the same folder; name another")
        for folder in (self.output / name for name in sets):
            taken = folder.exists() if folder != self.output else any(numbered_images(folder))
            if taken and not (folder / RECORD).exists():
                raise UserError(f"--output={self.output}: {folder} holds other files; name another folder")
        return sets

    def _find_sets(self) -> dict[str, list[Path]]:
        if self.sets is None:
            return {"": self._find_context()[: self.num_context]}
        if self.context:
            raise UserError("--context and --sets exclude one another")
        if not self.sets.is_dir():
            raise UserError(f"--sets={self.sets} is not a folder")
        sets = {}
        for one in list_sets(self.sets, follow_links=True)[0]:
            if one.fault:
                raise UserError(one.fault)
            sets[one.name] = list(one.files)[: self.num_context]
        if not sets:
            raise UserError(f"--sets={self.sets} holds no folder of images")
        return sets

    def _find_context(self) -> list[Path]:
        """Return the files that `context` names, in its order; those of a pattern or a folder by name."""
        files = []
        for number, item in enumerate(self.context):
            path = expand_home(item)
            if path.is_dir():
                found = list_images(path)
            elif path.exists():
                found = [path]
            else:
                found = _matches(path)
            if not found and not path.is_dir() and not glob.has_magic(item):
                raise UserError(f"--context: {item}: no such file{self._about_commas(number)}")
            if not found:
                raise UserError(f"--context: there is no image at {item}{self._about_commas(number)}")
            files += found
        return files

    def _about_commas(self, number: int) -> str:
        """Return a hint where an item that is no file is a part of a file's name, which commas have parted."""
        for first in range(number, -1, -1):
            for end in range(number + 1, len(self.context) + 1):
                for comma in (",", ", "):
                    name = comma.join(self.context[first:end])
                    if end - first > 1 and expand_home(name).exists():
                        return f"; a name with a comma stands in double quotes: --context='\"{name}\"'"
        return ""


def numbered_images(folder: Path) -> list[Path]:
    """Return 000.png, 001.png, ... of a folder."""
    return [path for path in folder.glob("*.png") if path.stem.isdigit() and len(path.stem) >= 3]


def _matches(pattern: Path) -> list[Path]:
    """Return what a pattern finds. The folders that are there by that very name are no part of it: `runs [2]/*.png`."""
    folder = next((parent for parent in pattern.parents if parent.exists()), Path())
    rest = str(pattern.relative_to(folder))
    found = glob.glob(rest, root_dir=folder) if glob.has_magic(rest) else ()
    return sorted((folder / name for name in found), key=natural_order)
