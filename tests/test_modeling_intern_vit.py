"""The vision encoder: reference hidden states, attention backends, position table, stochastic depth, precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT, LLAMA, QWEN2, assert_same, expected, gradients, vision_6b_dict, vision_dict
from versions import CHECKPOINTING

from internvl_hub.configuration_intern_vit import InternVisionConfig
from internvl_hub.modeling_intern_vit import InternDropPath, InternVisionModel, drop_path_rates

FLAVOURS = pytest.mark.parametrize("name", [QWEN2, LLAMA], ids=["300m", "6b"])
TINY = pytest.mark.parametrize("fields", [vision_dict(), vision_6b_dict()], ids=["300m", "6b"])
BACKENDS = ("sdpa", "eager", "flex_attention")


def _encoder(name: str, **options: Any) -> InternVisionModel:
    """The encoder of a fixture checkpoint, from its weights alone."""
    weights = load_file(CHAT / name / "model.safetensors")
    prefix = "vision_model."
    weights = {key[len(prefix) :]: tensor for key, tensor in weights.items() if key.startswith(prefix)}
    config = InternVisionConfig.from_pretrained(CHAT / name, **options)
    model = InternVisionModel(config)
    model.load_state_dict(weights)
    return model.eval()


def _fresh(fields: dict[str, Any], **changes: Any) -> InternVisionModel:
    return InternVisionModel(InternVisionConfig(**{**fields, **changes}))


def _pixels(tiles: int = 2, size: int = 56) -> torch.Tensor:
    return torch.randn(tiles, 3, size, size)


def _loss(model: InternVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    hidden = model(pixel_values=pixels).last_hidden_state
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()


# --------------------------------------------------------------------------------------------------- reference numbers


@FLAVOURS
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_hidden_states_are_the_reference(name: str, backend: str) -> None:
    reference = expected(name)
    model = _encoder(name, attn_implementation=backend)
    assert model.config._attn_implementation == backend
    with torch.compiler.set_stance("force_eager"):  # flex attention would be compiled, for a minute
        output = model(pixel_values=reference["pixel_values"], output_hidden_states=True)
    own = {f"vit.hidden_states.{i}": state for i, state in enumerate(output.hidden_states)}
    own |= {"vit.last_hidden_state": output.last_hidden_state, "vit.pooler_output": output.pooler_output}
    assert_same(own, {k: v for k, v in reference.items() if k.startswith("vit.")}, rtol=1e-4, atol=1e-5)


def test_backends_can_be_switched_on_a_model() -> None:
    model = _encoder(QWEN2)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert all(layer.attn.config._attn_implementation == "eager" for layer in model.encoder.layers)


def test_missing_flash_attention_is_a_clear_error() -> None:
    with pytest.raises(ImportError, match="[Ff]lash.?[Aa]ttn|FlashAttention"):
        _fresh(vision_dict(), attn_implementation="flash_attention_2")


@torch.no_grad()
def test_tuple_output_and_embeddings_as_input() -> None:
    model, pixels = _encoder(QWEN2), _pixels()
    output = model(pixel_values=pixels)
    last, pooled = model(pixel_values=pixels, return_dict=False)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)
    embedded = model(pixel_embeds=model.embeddings(pixels))
    assert torch.equal(embedded.last_hidden_state, output.last_hidden_state)
    assert output.hidden_states is None


@TINY
def test_gradient_checkpointing_gives_the_same_gradients(fields: dict[str, Any]) -> None:
    model, pixels = _fresh(fields).train(), _pixels()
    _loss(model, pixels).backward()
    plain = gradients(model)
    getattr(model, f"{CHECKPOINTING}_enable")()
    assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
    _loss(model, pixels).backward()
    assert_same(gradients(model), plain, rtol=1e-5, atol=1e-6)


@TINY
def test_save_and_reload(fields: dict[str, Any], tmp_path: Path) -> None:
    model = _fresh(fields).eval()
    model.save_pretrained(tmp_path)
    again, pixels = InternVisionModel.from_pretrained(tmp_path), _pixels()
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


# ------------------------------------------------------------------------------------------------------ position table


def _bicubic_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old) weights of bicubic resampling: a = -0.75, half-pixel centres, edge rows repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return matrix


def _resized(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[0, 1:].double().reshape(side, side, -1)
    grid = torch.einsum("ar,bc,rcd->abd", _bicubic_matrix(side, height), _bicubic_matrix(side, width), grid)
    return torch.cat([table[:, :1].double(), grid.reshape(1, height * width, -1)], dim=1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 2), (3, 7), (4, 5)])
def test_position_interpolation_in_float64(height: int, width: int) -> None:
    embeddings = _fresh(vision_dict()).embeddings
    resized = embeddings.resized_positions(height, width).double()
    torch.testing.assert_close(
        resized, _resized(embeddings.position_embedding.detach(), height, width), rtol=1e-5, atol=1e-6
    )


def test_same_grid_is_the_table_itself() -> None:
    embeddings = _fresh(vision_dict()).embeddings
    assert embeddings.resized_positions(4, 4) is embeddings.position_embedding


@torch.no_grad()
def test_other_tile_sizes_run_on_interpolated_positions() -> None:
    model, pixels = _fresh(vision_dict()).eval(), _pixels(2, 84)
    embedded = model.embeddings(pixels).double()
    patches = torch.nn.functional.conv2d(
        pixels.double(), model.embeddings.patch_embedding.weight.double(), stride=14
    ).flatten(2)
    reference = _resized(model.embeddings.position_embedding, 6, 6)[:, 1:] + patches.transpose(1, 2)
    torch.testing.assert_close(embedded[:, 1:], reference, rtol=1e-4, atol=1e-5)
    assert model(pixels).last_hidden_state.shape == (2, 37, 16)


@torch.no_grad()
def test_resize_pos_embeddings(tmp_path: Path) -> None:
    model, pixels = _fresh(vision_dict()).eval(), _pixels(1, 84)
    before, table = model(pixels).last_hidden_state, model.embeddings.position_embedding.clone()
    model.resize_pos_embeddings(56, 84, 14)
    assert model.config.image_size == 84
    stored = model.embeddings.position_embedding
    torch.testing.assert_close(stored.double(), _resized(table, 6, 6), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(pixels).last_hidden_state, before)
    model.save_pretrained(tmp_path)
    assert InternVisionModel.from_pretrained(tmp_path).embeddings.position_embedding.shape == (1, 37, 16)


@pytest.mark.parametrize("sizes", [(84, 56, 14), (56, 60, 14)])
def test_resize_pos_embeddings_checks_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="old_size"):
        _fresh(vision_dict()).resize_pos_embeddings(*sizes)


# ---------------------------------------------------------------------------------------------------- stochastic depth


def test_drop_path_keeps_the_expectation() -> None:
    """Each sample is dropped as a whole or scaled by 1 / keep, so the mean stays what it was."""
    output = InternDropPath(0.3).train()(torch.ones(20_000, 3, 2))
    rows = output.reshape(20_000, -1)
    assert bool((rows == rows[:, :1]).all())
    assert rows.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert rows[:, 0].mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("rate", "training"), [(0.3, False), (0.0, True)])
def test_drop_path_is_the_identity(rate: float, training: bool) -> None:
    branch = torch.randn(4, 3, 2)
    assert torch.equal(InternDropPath(rate).train(training)(branch), branch)


def test_everything_can_be_dropped() -> None:
    assert torch.equal(InternDropPath(1.0).train()(torch.ones(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rates_grow_linearly(layers: int) -> None:
    reference = torch.linspace(0, 0.4, layers).tolist()
    assert drop_path_rates(0.4, layers) == pytest.approx(reference)
    model = _fresh(vision_dict(), num_hidden_layers=layers, drop_path_rate=0.4)
    assert [layer.drop_path1.rate for layer in model.encoder.layers] == pytest.approx(reference)
    assert [layer.drop_path2.rate for layer in model.encoder.layers] == pytest.approx(reference)


def test_drop_path_acts_in_training_only() -> None:
    model, pixels = _fresh(vision_dict(), drop_path_rate=0.5), _pixels(8)
    evaluated = model.eval()(pixels).last_hidden_state
    assert torch.equal(evaluated, model(pixels).last_hidden_state)
    assert not torch.equal(evaluated, model.train()(pixels).last_hidden_state)


# ------------------------------------------------------------------------------------------------------- fresh weights


@TINY
def test_fresh_encoder_is_alive_with_the_published_initializer_range(fields: dict[str, Any]) -> None:
    """Published files say 1e-10; weights of that size would make every output the same and every gradient vanish."""
    model = _fresh(fields, initializer_range=1e-10)
    loss = _loss(model, _pixels())
    loss.backward()
    assert model.encoder.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model(_pixels()).last_hidden_state.std().item() > 1e-3
    weights = {name: g for name, g in gradients(model).items() if not name.endswith("qkv.bias")}
    assert all(bool(g.abs().max() > 0) for g in weights.values())


@TINY
def test_initializer_range_and_factor_are_used(fields: dict[str, Any]) -> None:
    model = _fresh(fields, hidden_size=64, intermediate_size=64, initializer_range=0.5, initializer_factor=0.25)
    for weight in (model.encoder.layers[1].attn.proj.weight, model.embeddings.patch_embedding.weight):
        assert weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert bool((model.encoder.layers[1].ls2 == 0.25).all())
    assert bool((model.encoder.layers[1].norm1.weight == 1).all())


# ----------------------------------------------------------------------------------------------------------- precision


def _half(fields: dict[str, Any], folder: Path, edit: Any = None) -> tuple[InternVisionModel, InternVisionModel]:
    """A float32 model and the float16 one loaded from its file."""
    model = _fresh(fields).eval()
    if edit is not None:
        edit(model)
    model.save_pretrained(folder)
    return model, InternVisionModel.from_pretrained(folder, dtype=torch.float16).eval()


@TINY
def test_float16_keeps_norms_in_float32(fields: dict[str, Any], tmp_path: Path) -> None:
    model, half = _half(fields, tmp_path)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if "norm" in name}
    pixels = _pixels()
    output = half(pixels.half()).last_hidden_state
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), model(pixels).last_hidden_state, rtol=2e-2, atol=2e-2)


def _grow(model: InternVisionModel) -> None:
    """Make the residual stream exceed 65504 in the middle of the encoder and come back at its end."""
    first, last = model.encoder.layers[0], model.encoder.layers[-1]
    for layer, sign in ((first, 1.0), (last, -1.0)):
        torch.nn.init.zeros_(layer.mlp.fc2.weight)
        torch.nn.init.constant_(layer.mlp.fc2.bias, 300.0)
        torch.nn.init.constant_(layer.ls2, sign * 300.0)


@TINY
@torch.no_grad()
def test_float16_survives_activations_beyond_its_range(fields: dict[str, Any], tmp_path: Path) -> None:
    model, half = _half(fields, tmp_path, _grow)
    pixels = _pixels()
    states = model(pixels, output_hidden_states=True).hidden_states
    assert states[1].abs().max() > torch.finfo(torch.float16).max  # a float16 residual stream would be infinite here
    output = half(pixels.half())
    assert bool(output.last_hidden_state.isfinite().all())
    torch.testing.assert_close(output.last_hidden_state.float(), states[-1], rtol=5e-2, atol=5e-2)


@torch.no_grad()
def test_float16_hidden_states_saturate(tmp_path: Path) -> None:
    _, half = _half(vision_dict(), tmp_path, _grow)
    states = half(_pixels().half(), output_hidden_states=True).hidden_states
    assert all(bool(state.isfinite().all()) and state.dtype == torch.float16 for state in states)
    assert states[1].max() == torch.finfo(torch.float16).max


@FLAVOURS
@torch.no_grad()
def test_bfloat16_is_close_to_float32(name: str) -> None:
    reference = expected(name)
    output = _encoder(name).to(torch.bfloat16)(reference["pixel_values"]).last_hidden_state
    assert output.dtype == torch.bfloat16
    error = (output.float() - reference["vit.last_hidden_state"]).norm() / reference["vit.last_hidden_state"].norm()
    assert 0 < error.item() < 0.02


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 1, 56, 56), (1, 3, 50, 56), (1, 3, 56, 50)])
def test_wrong_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_values has shape .*multiples of the patch size 14"):
        _fresh(vision_dict())(torch.zeros(shape))


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_input(both: bool) -> None:
    inputs = {"pixel_values": _pixels(), "pixel_embeds": torch.zeros(2, 17, 16)} if both else {}
    with pytest.raises(ValueError, match="either pixel_values or pixel_embeds"):
        _fresh(vision_dict())(**inputs)
