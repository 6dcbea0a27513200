"""InternVL-tiny learns from its own answers: pairs by both pipelines, MPO, and held-out accuracy before and after.

Run: python -m internvl_hub.examples.internvl_tiny.preference build/tiny-mpo [--seeds 1 2 3]

Questions are of the training split, scores of the test split, single questions answered greedily. Every step is found
done or is done: sampled answers, pair files, trained seeds and scores stay in the folder. `--only` does one step, so
that seeds can be trained side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...conversation import IMAGE_PLACEHOLDER
from ...evaluation.engines import Sampling
from ...evaluation.local_engine import LocalEngine
from ...preference.correctness import Caps
from ...preference.correctness_pipeline import make_correctness_pairs
from ...preference.dropout_pipeline import make_dropout_pairs
from ...preference.question_sources import read_sources
from ...preference.sampling import LazyEngine, SamplingPlan
from ...training.recipes import load_recipe
from ...training.run import train
from .evaluate import held_out, load, mark
from .metrics import POINTING_HIT
from .preference_report import Scores, write_report
from .tasks import TaskMixture

CHECKPOINT = Path("checkpoints/internvl-tiny")
RECIPE = Path(__file__).parent / "stages" / "mpo.yaml"
# Shares of the questions; those that the checkpoint answers badly have more to give, the others keep what it can.
WEIGHTS = {
    "numbers": 0.22, "words": 0.22, "letter_count": 0.08, "first_letter": 0.04, "digit_count": 0.03,
    "first_digit": 0.03, "last_digit": 0.03, "color": 0.04, "shape": 0.04, "count": 0.04, "count_color": 0.04,
    "count_shape": 0.04, "exists": 0.04, "describe": 0.03, "pointing": 0.16, "sum": 0.06,
}  # fmt: skip
QUESTIONS_SEED = 41  # no picture that the checkpoint was trained on
SAMPLING = Sampling(n=8, temperature=1.0, max_new_tokens=48, seed=0)
BATCH_SIZE = 64


def write_questions(folder: Path, count: int) -> Path:
    """`count` questions of the training split as a jsonl, with their pictures."""
    path, images = folder / "questions.jsonl", folder / "images"
    if path.is_file():
        return path
    images.mkdir(parents=True, exist_ok=True)
    mixture, lines = TaskMixture("train", QUESTIONS_SEED, WEIGHTS, turns=(1, 1)), []
    for i in tqdm(range(count), desc="Drawing", unit=" questions"):
        sample = mixture[i]
        turn = sample.turns[0]
        row = {"id": sample.id, "question": turn.question, "answer": turn.answer, "category": turn.task}
        row["task"] = "box" if turn.task == "pointing" else "exact"
        if sample.image is not None:
            sample.image.save(images / f"{i}.png")
            row |= {"image": f"{i}.png", "question": f"{IMAGE_PLACEHOLDER}\n{turn.question}"}
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_pairs(folder: Path, count: int, checkpoint: Path) -> Path:
    """Pairs of right with wrong answers, and of answers with what the model says without the picture: a meta file."""
    questions = write_questions(folder, count)
    engine = LazyEngine(str(checkpoint), lambda: LocalEngine(*load(checkpoint), BATCH_SIZE, keep_markup=True))
    sources = read_sources([questions], str(folder / "images"))
    plan = SamplingPlan(folder / "pairs", engine, SAMPLING, style="direct", batch_size=BATCH_SIZE)
    # Few pairs of each question: with many, the questions that it can hardly answer would be most of the data.
    made = make_correctness_pairs(sources, plan, caps=Caps(2, 1))
    single = Sampling(temperature=0.7, top_k=50, max_new_tokens=SAMPLING.max_new_tokens, seed=SAMPLING.seed)
    plan = SamplingPlan(folder / "pairs", engine, single, style="direct", batch_size=BATCH_SIZE)
    # Without a picture it mostly introduces itself: a few such answers are enough to learn from, and the chosen ones
    # are those of the data, since a sampled answer may be wrong.
    made = make_dropout_pairs(read_sources([questions], str(folder / "images"), limit=count // 5), plan, True)
    if made.meta is None:
        raise RuntimeError(f"no pair came out of {count} questions; see {folder / 'pairs'}")
    return made.meta


def train_seed(folder: Path, seed: int, overrides: Sequence[str]) -> Path:
    """MPO on the folder's pairs with one seed: the folder of the trained checkpoint."""
    output = folder / f"seed-{seed}"
    if not (output / "report.md").is_file():
        settings = [f"data.meta_path={folder / 'pairs' / 'meta.json'}", f"training.seed={seed}"]
        recipe = load_recipe(RECIPE, [*settings, f"training.output_dir={output}", *overrides])
        train(recipe, resume=True)
    return output


def score(folder: Path, name: str, checkpoint: Path, split: Any, per_task: int) -> Scores:
    """Whether each held-out question is answered rightly, by task; kept as `scores/SPLIT-NAME.json`."""
    path = folder / "scores" / f"{split}-{per_task}-{name}.json"
    if not path.is_file():
        rows = mark(*load(checkpoint), list(held_out(split, per_task)))
        hits: Scores = {}
        for row in rows:
            hits.setdefault(row.task, []).append(float(row.score >= POINTING_HIT))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(hits), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def run(arguments: argparse.Namespace) -> None:
    """All steps, or the one that is asked for."""
    folder, split, per_task = arguments.folder, arguments.split, arguments.samples
    steps = arguments.only or ("pairs", "before", "train", "report")
    if "pairs" in steps:
        print(make_pairs(folder, arguments.questions, CHECKPOINT))
    if "before" in steps:
        score(folder, "before", CHECKPOINT, split, per_task)
    if "train" in steps:
        for seed in arguments.seeds:
            score(folder, f"seed-{seed}", train_seed(folder, seed, arguments.overrides), split, per_task)
    if "report" in steps:
        before = score(folder, "before", CHECKPOINT, split, per_task)
        after = {
            seed: score(folder, f"seed-{seed}", folder / f"seed-{seed}", split, per_task) for seed in arguments.seeds
        }
        print(write_report(folder, split, before, after))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over stages/mpo.yaml")
    parser.add_argument("--questions", type=int, default=6000, help="questions to sample answers to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the training")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="of the scores")
    parser.add_argument("--samples", type=int, default=400, help="held-out questions per task")
    parser.add_argument("--only", nargs="+", choices=("pairs", "before", "train", "report"), help="steps to do")
    run(parser.parse_intermixed_args(argv))


if __name__ == "__main__":
    main()
