"""Imports go down only: no module imports from a layer above its own, and nobody imports a program."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

# From the lowest; packages of one row do not import each other.
LAYERS = (
    ("core",),
    ("config",),
    ("attention", "diffusion", "view"),
    ("models",),
    ("data",),
    ("checkpoints", "scoring"),
    ("sampling",),
    ("tasks",),
    ("training",),
    ("planning", "evaluation", "building"),
    ("programs",),
)
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
CONFIG = ("configuration", "config_fields", "config_rules", "config_flag")  # modules of the layer "config"


def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of the package."""
    found = {}
    for path in sorted((ROOT / "m2m_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def is_program(tree: ast.Module) -> bool:
    """Whether `python -m` of it does something."""
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def layer(name: str, tree: ast.Module) -> str:
    """The package of a module: the first below m2m_jax; a program belongs to "programs", wherever it lies."""
    if is_program(tree):
        return "programs"
    first = name.split(".")[1] if "." in name else "programs"  # m2m_jax itself only names what is public
    return "config" if first in CONFIG else first


def imported(tree: ast.Module, names: set[str]) -> set[str]:
    """Modules of the package that a module imports, at its top or within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "m2m_jax":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in names else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "m2m_jax"}
    return found - {"m2m_jax"}


def test_imports_go_down_only():
    trees = modules()
    layers = {name: layer(name, tree) for name, tree in trees.items()}
    unknown = sorted(set(layers.values()) - set(RANK))
    assert not unknown, f"packages without a layer: {unknown}"
    upward = [
        f"{name} ({layers[name]}) imports {other} ({layers[other]})"
        for name, tree in trees.items()
        for other in sorted(imported(tree, set(trees)))
        if (layers[name] != layers[other] and RANK[layers[other]] >= RANK[layers[name]]) or layers[other] == "programs"
    ]
    assert not upward, "\n".join(upward)
