"""Where the reference's log-probabilities come from: copies and their memory, adapters, checkpoints, the disk."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_hub.data.media import RowSettings
from internvl_hub.data.pairs import parse_pair
from internvl_hub.data.preference_dataset import PreferenceDataset
from internvl_hub.data.records import RecordFile
from internvl_hub.modeling_intern_vit import InternVisionModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.tests.training import preference_runs, runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training import reference_pass
from internvl_hub.training.preference_collation import PreferenceCollator
from internvl_hub.training.reference import AdapterReference, FrozenReference, frozen_copy
from internvl_hub.training.reference_cache import ReferenceValues, weights_identity
from internvl_hub.training.reference_choice import make_reference

LORA = {"freeze_backbone": True, "use_llm_lora": 4, "lora_dropout": 0.0}
BATCH = PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE)(preference_runs.pairs(5))


def fresh_batch() -> dict[str, Any]:
    return dict(BATCH)


def written(folder: Path, count: int = 24) -> Path:
    """Pairs without pictures as MMPR writes them."""
    rows = [
        {"question": f"Question {i}?", "chosen": "yes " * (i % 5 + 1), "rejected": "no " * (i % 3 + 1)}
        for i in range(count)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def file_dataset(path: Path, **options: Any) -> PreferenceDataset:
    records = RecordFile(str(path), parse=parse_pair)
    return PreferenceDataset(records, tiny.tokenizer(), tiny.image_processor(), tiny.config(), **options)


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("frozen", ["nothing", "freeze_llm", "freeze_backbone"])
def test_a_copy_shares_what_is_not_trained(frozen: str, tmp_path: Path) -> None:
    options = {} if frozen == "nothing" else {frozen: True}
    trainer = preference_runs.make_trainer(str(tmp_path), move=0, **options)
    reference, policy = trainer.reference.module, trainer.model
    assert isinstance(trainer.reference, FrozenReference)
    for (name, own), (_, other) in zip(policy.named_parameters(), reference.named_parameters(), strict=True):
        assert (own.data_ptr() == other.data_ptr()) == (not own.requires_grad), name
        assert torch.equal(own, other) and not other.requires_grad
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    trainer.train()
    assert not any(module.training for module in reference.modules())
    for name, value in reference.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert moved <= trained and len(moved) > len(trained) / 2


def test_a_copy_draws_nothing_at_random(tmp_path: Path) -> None:
    vision = {**tiny.config().vision_config.to_dict(), "drop_path_rate": 0.5, "dropout": 0.3}
    trainer = preference_runs.make_trainer(str(tmp_path), model=tiny.model(vision_config=vision), move=0)
    trainer.model.train()
    state, pairs = torch.get_rng_state(), trainer._taken_apart(trainer.model, fresh_batch())
    values = [trainer.reference.log_probs(trainer.model, pairs) for _ in range(2)]
    assert torch.equal(*values) and torch.equal(torch.get_rng_state(), state)
    eval_model = trainer.model.eval()
    torch.testing.assert_close(values[0], pairs.score(eval_model).answers.detach())


def test_weights_that_are_elsewhere_cannot_be_copied() -> None:
    with torch.device("meta"):
        model = tiny.model()
    with pytest.raises(ValueError, match="set preference.reference_path"):
        frozen_copy(model)
    with pytest.raises(ValueError, match="by their content"):
        weights_identity(model)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_a_sharded_run_has_a_whole_copy_of_its_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared by TRL's helper; nothing is shared with parameters that will be sharded."""
    trainer = preference_runs.make_trainer(str(tmp_path), move=0, freeze_llm=True)
    monkeypatch.setattr(trainer, f"is_{kind}_enabled", True)
    prepared: list[Any] = []
    monkeypatch.setattr(f"trl.models.prepare_{kind}", lambda m, accelerator: prepared.append(m) or m, raising=False)
    reference = make_reference(trainer, trainer.preference, adapters_given=False)
    assert prepared == [reference.module]
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert not any(p.data_ptr() in own for p in reference.module.parameters())
    assert "pixel_values" in trainer._taken_apart(trainer.model.train(), fresh_batch()).inputs
    monkeypatch.setitem(sys.modules, "trl.models", None)
    with pytest.raises(ImportError, match="needs trl: pip install trl"):
        make_reference(trainer, trainer.preference, adapters_given=False)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("options", [{}, {"freeze_backbone": False}, {"freeze_mlp": True, "unfreeze_lm_head": True}],
                         ids=["projector", "encoder", "head"])  # fmt: skip
def test_a_disabled_adapter_is_a_copy_of_the_base(options: dict[str, Any], tmp_path: Path) -> None:
    """Parts that are trained whole beside the adapters (`modules_to_save`) too."""
    base = tiny.model()
    trainer = preference_runs.make_trainer(str(tmp_path), model=copy.deepcopy(base), **{**LORA, **options})
    assert isinstance(trainer.reference, AdapterReference)
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    pairs = trainer._taken_apart(trainer.model.train(), fresh_batch())
    values = trainer.reference.log_probs(trainer.model, pairs)
    copied = frozen_copy(base)
    plain = reference_pass.PairBatch.of(fresh_batch())
    torch.testing.assert_close(values, plain.score(copied).answers, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(values, pairs.score(trainer.model).answers.detach(), atol=1e-2)  # the policy has moved
    assert trainer.model.training and flags == {name: p.requires_grad for name, p in trainer.model.named_parameters()}


def test_training_under_an_adapter_equals_training_beside_a_copy(tmp_path: Path) -> None:
    results = []
    for copies in (False, True):
        trainer = preference_runs.make_trainer(str(tmp_path), move=0, **LORA)
        if copies:
            trainer.reference = FrozenReference(frozen_copy(trainer.model), trainer, same_vision=True)
        trainer.train()
        results.append((runs.losses(trainer), runs.weights(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert all(torch.allclose(v, results[1][1][n], atol=1e-6) for n, v in results[0][1].items())


def test_adapters_that_are_given_are_part_of_the_reference(tmp_path: Path) -> None:
    """A model that was tuned by LoRA before: its base would be the wrong reference."""
    first = preference_runs.make_trainer(str(tmp_path), **LORA)  # moved away from its base
    second = preference_runs.make_trainer(str(tmp_path), model=first.model, move=0, max_steps=1)
    shared = {p.data_ptr() for p in second.model.parameters() if not p.requires_grad}
    assert shared <= {p.data_ptr() for p in second.reference.module.parameters()}
    second.train()
    assert second.state.log_history[0]["loss_preference"] == pytest.approx(0.693147, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- checkpoint


def test_another_checkpoint(tmp_path: Path) -> None:
    other = tiny.model(seed=5)
    other.save_pretrained(tmp_path / "other")
    InternVLProcessor.from_model_config(other.config, tiny.tokenizer()).save_pretrained(tmp_path / "other")
    trainer = preference_runs.make_trainer(
        str(tmp_path), move=0, preference={"reference_path": str(tmp_path / "other")}, freeze_backbone=True
    )
    pairs = trainer._taken_apart(trainer.model.train(), fresh_batch())
    assert "pixel_values" in pairs.inputs  # its encoder is another one
    plain = reference_pass.PairBatch.of(fresh_batch())
    torch.testing.assert_close(
        trainer.reference.log_probs(trainer.model, pairs), plain.score(other.eval()).answers.detach()
    )
    values = preference_runs.make_trainer(
        str(tmp_path), move=0, dataset=preference_runs.pair_dataset(),
        preference={"reference_path": str(tmp_path / "other"), "precompute_reference": True},
    )  # fmt: skip
    direct = preference_runs.make_trainer(
        str(tmp_path), move=0, dataset=preference_runs.pair_dataset(),
        preference={"reference_path": str(tmp_path / "other")},
    )  # fmt: skip
    values.train()
    direct.train()
    assert runs.losses(values) == pytest.approx(runs.losses(direct), rel=1e-6)
    assert values.reference.module is None


# ----------------------------------------------------------------------------------------------------- visual features


@pytest.mark.parametrize("options", [{"freeze_backbone": True, "freeze_mlp": True}, {**LORA, "freeze_mlp": True}],
                         ids=["whole", "lora"])  # fmt: skip
@pytest.mark.parametrize("accumulation", [1, 4])
def test_untrained_towers_encode_once(
    options: dict[str, Any], accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for shared in (True, False):
        trainer = preference_runs.make_trainer(str(tmp_path), 8 // accumulation, accumulation, max_steps=1, **options)
        trainer.reference.same_vision = shared
        calls = []
        tower = InternVisionModel
        forward = tower.forward
        with monkeypatch.context() as patch:
            patch.setattr(tower, "forward", lambda *a, f=forward, c=calls, **k: c.append(1) or f(*a, **k))
            trainer.train()
        results.append((len(calls), runs.losses(trainer), runs.weights(trainer)))
    # Once a micro-batch, and once more each where rewards are found beforehand; not shared: the reference again.
    passes = 1 if accumulation == 1 else 2
    assert results[0][0] == accumulation * passes and results[1][0] == accumulation * (passes + 1)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert all(torch.allclose(v, results[1][2][n], atol=1e-6) for n, v in results[0][2].items())


def test_trained_towers_are_not_shared(tmp_path: Path) -> None:
    trainer = preference_runs.make_trainer(str(tmp_path), freeze_backbone=True)  # the projector is trained
    assert "pixel_values" in trainer._taken_apart(trainer.model.train(), fresh_batch()).inputs


# --------------------------------------------------------------------------------------------------------- precomputed


def precomputed(folder: Path, dataset: Any, **options: Any) -> preference_runs.Recorder:
    settings = {"precompute_reference": True, "reference_cache": str(folder / "cache")}
    return preference_runs.make_trainer(str(folder), move=0, dataset=dataset, preference=settings, **options)


def test_precomputed_values_are_those_of_a_copy(tmp_path: Path) -> None:
    path, results = written(tmp_path), []
    for make in (
        precomputed,
        lambda folder, dataset: preference_runs.make_trainer(str(folder), move=0, dataset=dataset),
    ):
        trainer = make(tmp_path, file_dataset(path))
        trainer.train()
        results.append((runs.losses(trainer), runs.weights(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert all(torch.allclose(v, results[1][1][n], atol=1e-6) for n, v in results[0][1].items())


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts on the disk are used, other weights and other rows are told apart, damaged parts are made again."""
    path = written(tmp_path)
    monkeypatch.setattr(reference_pass, "PART_ROWS", 4)
    scored: list[int] = []
    add = ReferenceValues.add

    def stopping(self: ReferenceValues, rows: list[int], values: Any) -> None:
        if len(scored) >= 8:
            raise KeyboardInterrupt
        scored.extend(rows)
        add(self, rows, values)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceValues, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            precomputed(tmp_path, file_dataset(path)).train()
    again: list[int] = []
    monkeypatch.setattr(
        ReferenceValues, "add", lambda self, rows, values: (again.extend(rows), add(self, rows, values))[1]
    )
    trainer = precomputed(tmp_path, file_dataset(path))
    trainer.train()
    assert sorted(scored + again) == list(range(24)) and len(scored) == 8
    again.clear()
    precomputed(tmp_path, file_dataset(path)).train()
    assert again == []
    part = next(tmp_path.glob("cache/*/part-*.npz"))
    part.write_bytes(b"PK half a part")
    precomputed(tmp_path, file_dataset(path)).train()
    assert len(again) == 4 and len(list(tmp_path.glob("cache/*"))) == 1
    precomputed(tmp_path, file_dataset(path), model=tiny.model(seed=1)).train()
    assert len(again) == 28 and len(list(tmp_path.glob("cache/*"))) == 2


def test_adapters_that_do_nothing_yet_share_the_values_of_their_base(tmp_path: Path) -> None:
    base = weights_identity(tiny.model())
    for options in (LORA, {**LORA, "use_llm_lora": 2, "freeze_mlp": True}):
        trainer = preference_runs.make_trainer(str(tmp_path), move=0, **options)
        assert weights_identity(trainer.model, below_adapters=True) == base != weights_identity(trainer.model)
    rows = file_dataset(written(tmp_path))
    results = []
    for make in (precomputed, lambda f, d, **o: preference_runs.make_trainer(str(f), move=0, dataset=d, **o)):
        trainer = make(tmp_path, rows, **LORA)
        trainer.train()
        results.append(runs.losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_evaluation_has_values_too(tmp_path: Path) -> None:
    """Made before the policy moves; those of a data set that comes later cannot be made any more."""
    for name in ("eval", "later"):
        (tmp_path / name).mkdir()
    rows, held_out = file_dataset(written(tmp_path)), file_dataset(written(tmp_path / "eval", 5))
    results = []
    for precompute in (True, False):
        preference = {"precompute_reference": True, "reference_cache": str(tmp_path / "cache")} if precompute else {}
        trainer = preference_runs.make_trainer(
            str(tmp_path), move=0, dataset=rows, preference=preference, eval_dataset=held_out
        )
        trainer.train()
        results.append(trainer.evaluate())
        if precompute:
            with pytest.raises(ValueError, match="give it to MPOTrainer as eval_dataset"):
                trainer.evaluate(file_dataset(written(tmp_path / "later", 3)))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5, abs=1e-7)
    assert results[0]["eval_rewards/margins"] != 0


def test_random_rows_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(ValueError, match="dataset: precompute_reference needs the same pictures .* data_augment"):
        precomputed(tmp_path, file_dataset(path, settings=RowSettings(data_augment=True)))
    row = {"video": "film.mp4", "question": "<video>\nWhat?", "chosen": "a", "rejected": "b"}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="pairs.jsonl:25 has a video and frame_sampling is rand"):
        precomputed(tmp_path, file_dataset(path))
    precomputed(tmp_path, file_dataset(path, settings=RowSettings(frame_sampling="middle")))
    with pytest.raises(ValueError, match="needs a PreferenceDataset, whose rows have numbers, got list"):
        precomputed(tmp_path, preference_runs.pairs(3))


def test_rows_that_bring_their_values(tmp_path: Path) -> None:
    """A list of features with `reference_log_probs`: no reference model, no pass."""
    rows = preference_runs.pairs(8)
    plain = preference_runs.make_trainer(str(tmp_path), dataset=rows, max_steps=1)
    plain.train()
    reference = tiny.model().eval()
    batch = reference_pass.PairBatch.of(PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE)(rows))
    values = batch.score(reference).answers.detach().reshape(-1, 2)
    rows = [{**row, "reference_log_probs": value} for row, value in zip(rows, values, strict=True)]
    own = preference_runs.make_trainer(
        str(tmp_path), dataset=rows, max_steps=1, preference={"precompute_reference": True}
    )
    own.train()
    assert runs.losses(own) == pytest.approx(runs.losses(plain), rel=1e-6)
