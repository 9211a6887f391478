"""Read the emoji families that npm's `@iconify-json/*` packages hold, and draw their icons.

A package is read as `npm pack` leaves it, NAME-VERSION.tgz, in a folder that the caller names (`make npm-emoji` fills
one). The icons are in its `package/icons.json`: a map of names to the insides of SVG files.
"""

import dataclasses
import functools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.data.drawing import render, view_box
from m2m_jax.data.emoji.subjects import parse_codepoints

# Package -> its version, and the side of the square that is drawn in canvases (their longer sides): families leave
# different margins, and the pictures should be of like size in all of them. Measured: the median drawing then takes
# nine tenths of the square.
PACKAGES = {
    "noto": ("1.2.9", 1.04),
    "noto-v1": ("1.2.5", 1.10),
    "twemoji": ("1.2.5", 1.10),
    "openmoji": ("1.2.29", 0.95),
    "emojione": ("1.2.3", 1.04),
    "emojione-v1": ("1.2.3", 1.10),
    "fxemoji": ("1.2.2", 1.10),
    "fluent-emoji": ("1.2.7", 0.97),
    "fluent-emoji-flat": ("1.2.6", 0.97),
    "streamline-emojis": ("1.2.4", 1.04),
}
_MAX_BYTES = 256 * 2**20  # of one file in a package; the largest here has 104 MB
_MAX_CANVAS = 1e6  # pixels a side; icons have 16 to 512
_FOLDER = "package"


@dataclasses.dataclass(frozen=True)
class Family:
    """Hold the icons of one package.

    icons: name -> {"body": SVG text, and where they differ from `canvas` "left", "top", "width", "height"}.
    aliases: other name -> name; those that turn or mirror an icon are left out.
    names: codepoints, hexadecimal and joined by "-", -> name, in those packages that say so.
    categories: name -> what the package files it under, where it does.
    """

    name: str
    icons: dict[str, dict[str, Any]]
    canvas: dict[str, float]
    aliases: dict[str, str]
    names: dict[str, str]
    categories: dict[str, str]

    def draw(self, icon: str, size: int) -> np.ndarray | None:
        """Draw an icon: uint8 RGBA [size, size, 4], transparent ground; None where the family lacks it."""
        entry = self.icons.get(self.aliases.get(icon, icon))
        if entry is None:
            return None
        left, top, width, height = (float(entry.get(key, self.canvas[key])) for key in _CANVAS)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f"{view_box(left, top, width, height, PACKAGES[self.name][1])}>{entry['body']}</svg>"
        )
        return render(svg, size, size)


_CANVAS = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults


def package_file(folder: str | Path, name: str) -> Path:
    """Name the file of a package in a folder, as `npm pack` does."""
    return Path(folder) / f"iconify-json-{name}-{PACKAGES[name][0]}.tgz"


def families_in(folder: str | Path) -> list[str]:
    """List which families' packages are in a folder, at the pinned versions; none where there is no folder."""
    return [name for name in PACKAGES if package_file(folder, name).is_file()]


@functools.cache
def load_family(folder: str | Path, name: str) -> Family:
    """Read a package. Raises UserError where it is missing or is not what was written for."""
    path = package_file(folder, name)
    remedy = f"fetch it with: make npm-emoji, or npm pack @iconify-json/{name}@{PACKAGES[name][0]} in {folder}"
    try:
        with tarfile.open(path) as archive:
            icons = _read_json(archive, "icons.json")
            metadata = _read_json(archive, "metadata.json")
            codepoints = _read_json(archive, "chars.json")
        aliases = {
            alias: entry["parent"]
            for alias, entry in icons.get("aliases", {}).items()
            if set(entry) <= {"parent", "hidden"}
        }
        family = Family(
            name=name,
            icons={icon: entry for icon, entry in icons["icons"].items() if not entry.get("hidden")},
            canvas={key: float(icons.get(key, default)) for key, default in _CANVAS.items()},
            aliases=aliases,
            names={str(code): str(icon) for code, icon in codepoints.items()},
            categories={icon: kind for kind, members in metadata.get("categories", {}).items() for icon in members},
        )
        _check(family)
    except FileNotFoundError as error:
        raise UserError(f"no package {path}: {remedy}") from error
    except (OSError, tarfile.TarError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged or another package ({error!r:.100}): {remedy}") from error
    return family


def _check(family: Family) -> None:
    """Refuse what could not be drawn or named. Raises KeyError, TypeError, ValueError."""
    if not family.icons:
        raise ValueError("no icons")
    for canvas in (family.canvas, *family.icons.values()):
        sizes = {key: float(canvas.get(key, default)) for key, default in _CANVAS.items()}
        if not all(abs(size) < _MAX_CANVAS for size in sizes.values()) or min(sizes["width"], sizes["height"]) <= 0:
            raise ValueError(f"a canvas of {sizes}")
    if not all(isinstance(entry["body"], str) for entry in family.icons.values()):
        raise TypeError("an icon that is no text")
    if not all(isinstance(name, str) for named in (family.aliases, family.names) for name in named.values()):
        raise TypeError("a name that is no text")
    if not all(isinstance(kind, str) for kind in family.categories.values()):
        raise TypeError("a category that is no text")
    for codepoints in family.names:
        parse_codepoints(codepoints)


def _read_json(archive: tarfile.TarFile, name: str) -> Any:
    """Read one file of the package without unpacking it. Raises KeyError, ValueError."""
    member = archive.getmember(f"{_FOLDER}/{name}")
    if not member.isfile() or member.size > _MAX_BYTES:
        raise ValueError(f"{name} is no file of a package")
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{name} is no file of a package")
    return json.load(file)
