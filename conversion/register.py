"""Makes transformers' auto classes use this package for InternVL checkpoints, whatever code a repository carries."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

# Below 5.18 transformers itself exports this class only where torchvision is installed, which the class does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internlm2 import InternLM2Config
from ..configuration_internvl_chat import InternVLChatConfig
from ..image_processing_internvl import InternVLImageProcessor
from ..modeling_intern_vit import InternVisionModel
from ..modeling_internlm2 import InternLM2ForCausalLM
from ..modeling_internvl_chat import InternVLChatModel
from ..processing_internvl import InternVLProcessor
from ..tokenization_internlm2 import InternLM2Tokenizer


def register() -> None:
    """After this call `AutoModel.from_pretrained("OpenGVLab/InternVL3-8B")` and its siblings use this package.

    Code in the repository is ignored, with `trust_remote_code=True` too; nothing is asked and nothing of it runs. It
    covers chat models, InternViT encoders and InternLM2 in their original layout. Checkpoints of transformers' own
    InternVL keep going to transformers' classes. Calling it again changes nothing.
    """
    configs = (InternVLChatConfig, InternVisionConfig, InternLM2Config)
    for config in configs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(InternVLChatConfig, InternVLChatModel, exist_ok=True)
    AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
    AutoTokenizer.register(InternLM2Config, InternLM2Tokenizer, exist_ok=True)
    AutoImageProcessor.register(
        InternVLChatConfig, image_processor_classes={"pil": InternVLImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(InternVLChatConfig, InternVLProcessor, exist_ok=True)
