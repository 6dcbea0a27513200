"""What the lowest supported transformers names otherwise, or does not have; the pinned versions skip nothing here."""

import pytest
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

# Stem of the method, the property and the training argument; renamed in 5.23.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

# The class itself needs no torchvision in any version: `transformers.models.auto.image_processing_auto` has it.
needs_public_auto_image_processor = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18") and not transformers.utils.is_torchvision_available(),
    reason="below 5.18 `from transformers import AutoImageProcessor` asks for torchvision",
)
