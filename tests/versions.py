"""What the lowest supported transformers names otherwise; tests skip nothing there for that."""

import re

import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.utils import is_torchvision_available

# Stem of the method, the property and the training argument; renamed in 5.23.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

# Below 5.18 `from transformers import AutoImageProcessor` asks for torchvision, which the class itself never needs.
# Our own code and tests import it from its module; what users read has the public name and says this beside it.
_PUBLIC = "from transformers import AutoImageProcessor, AutoModel\n"
_BY_MODULE = (
    "from transformers import AutoModel\n"
    "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
)
_ASKS_FOR_TORCHVISION = Version(transformers.__version__) < Version("5.18") and not is_torchvision_available()


def runnable(code: str) -> str:
    """Code from the documentation or a model card, with the import that stands beside it for these versions."""
    assert code.count(_PUBLIC) == 1
    return code.replace(_PUBLIC, _BY_MODULE) if _ASKS_FOR_TORCHVISION else code


_IMPORT = re.compile(r"^from transformers import (?P<names>.*\bAutoImageProcessor\b.*)$", re.MULTILINE)


def importable(code: str) -> str:
    """Code that imports `AutoImageProcessor` with other names, in a form that these versions run."""

    def from_module(match: re.Match[str]) -> str:
        others = [name for name in match["names"].split(", ") if name != "AutoImageProcessor"]
        lines = [f"from transformers import {', '.join(others)}"] if others else []
        return "\n".join([*lines, "from transformers.models.auto.image_processing_auto import AutoImageProcessor"])

    return _IMPORT.sub(from_module, code) if _ASKS_FOR_TORCHVISION else code
