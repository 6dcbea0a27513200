"""The Jinja templates of model cards: how a published model is used, and what is known of its training."""

CHAT_USAGE = """An InternVL vision-language model, with its code: load it with `trust_remote_code=True` after reading \
the Python files.

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
image = Image.open("image.jpg")
pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
print(model.chat(processor.tokenizer, pixel_values, "<image>\\nDescribe the image.", {"max_new_tokens": 64}))
```

The same in the way of all of transformers:

```python
content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, model.dtype)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])
```
"""

ENCODER_USAGE = """\
An InternViT vision encoder, with its code: load it with `trust_remote_code=True` after reading the \
Python files.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True).eval()
image_processor = AutoImageProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
image = Image.open("image.jpg").convert("RGB")
pixel_values = image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
with torch.no_grad():
    tokens = model(pixel_values).last_hidden_state  # (images, 1 + patches, width)
patches = tokens[:, 1:]  # row by row; token 0 is the class token
```

`pooler_output` is the raw class token, no embedding to compare images by: start from the mean of the patches. Before
transformers 5.18 and without torchvision, `AutoImageProcessor` comes from
`transformers.models.auto.image_processing_auto`.
"""

NATIVE_USAGE = """An InternVL vision-language model in the layout of transformers' own classes, without \
code of its own.

```python
from PIL import Image
from transformers import pipeline

model = pipeline("image-text-to-text", "{{ repo_id }}")
image = Image.open("image.jpg").convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
print(model([{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```
{% if original %}
The same weights with `model.chat` and the other methods of InternVL: \
[{{ original }}](https://huggingface.co/{{ original }}).
{% endif %}"""

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ usage }}
{%- if run %}

## Training

{{ run.summary }}
{%- if run.curve %}

![Training loss](loss_curve.png)
{%- endif %}
{%- for title, table in run.tables %}

### {{ title }}

{{ table }}
{%- endfor %}
{%- endif %}
{%- if evaluations %}

## Evaluation

{{ evaluations }}
{%- endif %}
{%- if license_line %}

## Licence

{{ license_line }}
{%- endif %}
"""

USAGE = {
    "image-text-to-text": CHAT_USAGE,
    "image-feature-extraction": ENCODER_USAGE,
}
