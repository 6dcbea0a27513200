"""Every check with a row that passes and one that does not; counts against brute force and against training itself."""

import copy
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_hub.app.data_commands import validate_main
from internvl_hub.conversation import TemplateError
from internvl_hub.data.augmentation import Take
from internvl_hub.data.checks import CHECKS, find_grounding_problems, hash_record
from internvl_hub.data.dataset import ConversationDataset
from internvl_hub.data.features import FeatureMaker
from internvl_hub.data.media import RowSettings
from internvl_hub.data.media_checks import explain_unusable
from internvl_hub.data.mixture import Mixture, load_sources
from internvl_hub.data.pairs import is_pair, parse_pair
from internvl_hub.data.preference_dataset import PreferenceDataset
from internvl_hub.data.records import Record, RecordError, parse_record
from internvl_hub.data.repetition import repeated_ngrams, repeated_share
from internvl_hub.data.validate import Limits, find_duplicates, validate
from internvl_hub.data.validation_report import ValidationReport
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import DataArguments

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "internvl-tiny"
Row = dict[str, Any]


def talk(question: str = "Hi", answer: str = "Hello", **media: Any) -> Row:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad pictures and of a video of 4 frames, half a second each."""
    folder = tmp_path_factory.mktemp("media")
    picture = tiny.picture(0)
    picture.save(folder / "good.png")
    picture.save(folder / "good.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    for name, side in (("large.png", 14_000), ("bomb.png", 30_000)):
        (folder / name).write_bytes(with_size((folder / "good.png").read_bytes(), side))
    frames = [Image.new("RGB", (28, 28), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(folder / "video.gif", save_all=True, append_images=frames[1:], duration=500)
    (folder / "text.gif").write_text("not a video")
    return folder


def with_size(png: bytes, side: int) -> bytes:
    """The PNG with another size in its header: what a decompression bomb looks like before it is decoded."""
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def data(folder: Path, rows: list[Row | str], root: Path | None = None, name: str = "train.jsonl") -> DataArguments:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return DataArguments(data_paths=[str(folder / name)], image_folders=[None if root is None else str(root)])


def maker(eos: bool = True) -> FeatureMaker:
    tokenizer = tiny.tokenizer()
    if not eos:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = None
    return FeatureMaker(tokenizer, tiny.image_processor(), tiny.config())


def found(report: ValidationReport) -> dict[str, int]:
    """Rows with each problem, over all data sets."""
    counts: Counter[str] = Counter()
    for (_, check), count in report.counts.items():
        counts[check] += count
    return dict(counts)


def choice(question: str = "Q", chosen: str = "Good", rejected: str = "Bad", **media: Any) -> Row:
    return {**media, "question": question, "chosen": chosen, "rejected": rejected}


def talked(*texts: str) -> list[Row]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ANSWER = "<ref>cat</ref><box>[[0, 10, 1000, 10]]</box>"
LOOP = "one two three four five six seven eight nine ten "
PLAIN = " ".join(map(str, range(60)))
CASES: dict[str, tuple[Row, Row | str]] = {
    "row-pair": (choice(), {"question": "Q", "chosen": "Good"}),
    "row-pair-prompts": (choice(), {"chosen": talked("a", "b"), "rejected": talked("c", "d")}),
    "placeholders-pair": (choice("<image>", image="good.png"), choice("<image><image>", image="good.png")),
    "missing-media-pair": (choice(image="good.png"), choice(image="gone.png")),
    "clip-end-pair": (choice(video="video.gif", clip=[1, 2.9]), choice(video="video.gif", clip=[1, 3.1])),
    "empty-pair-answer": (choice(rejected="."), choice(rejected=" ")),
    "empty-pair-answer-chosen": (choice(chosen="."), choice(chosen="")),
    "identical-answers": (choice(chosen="same", rejected="Same"), choice(chosen="same", rejected="same")),
    "box-pair": (choice(chosen=ANSWER), choice(chosen=ANSWER.replace("1000", "1001"))),
    "question-box-pair": (choice(), choice("Is it <box>[[10, 2, 3, 4]]</box>?")),
    "repetition-pair": (choice(rejected=LOOP * 4), choice(chosen=LOOP * 4)),
    "duplicate-pair": (choice("a"), choice()),
    "markup-pair": (choice(rejected="a <b> c"), choice(rejected="a <|im_end|> c")),
    "row": (talk(), '{"conversations": ['),
    "row-turns": (talk(), {"conversations": [{"from": "human", "value": "Hi"}]}),
    "row-format": (talk(), {"dialogue": []}),
    "placeholders": (talk("<image>", image="good.png"), talk("<image><image>", image="good.png")),
    "placeholders-text": (talk("an image"), talk("an <image>")),
    "missing-media": (talk(image="good.png"), talk(image="gone.png")),
    "missing-media-video": (talk(video="video.gif"), talk(video="gone.gif")),
    "missing-media-frame": (talk(video=[["good.png"] * 2]), talk(video=[["good.png", "gone.png"]])),
    "damaged-media-empty": (talk(image="good.png"), talk(image="empty.png")),
    "damaged-media-text": (talk(image="good.png"), talk(image="text.png")),
    "damaged-media-url": (talk(), talk(image="data:image/png;base64,AAAA")),
    "damaged-media-video": (talk(video="video.gif"), talk(video="text.gif")),
    "huge-media": (talk(image="good.png"), talk(image="large.png")),
    "huge-media-pillow": (talk(image="good.png"), talk(image="bomb.png")),
    "clip": (talk(video="video.gif", clip=[0, 1]), talk(video="video.gif", clip=[5, 6])),
    "clip-end": (talk(video="video.gif", clip=[1, 2.9]), talk(video="video.gif", clip=[1, 3.1])),
    "frames": (
        talk(video={"path": "video.gif", "indices": [0, 3]}),
        talk(video={"path": "video.gif", "indices": [0, 4]}),
    ),
    "box": (talk(answer=ANSWER), talk(answer=ANSWER.replace("1000", "1001"))),
    "question-box": (talk("Write <box>[[x1, y1, x2, y2]]</box>"), talk("Is it <box>[[10, 2, 3, 4]]</box>?")),
    "empty-answer": (talk(answer="."), talk(answer=" \n")),
    "repetition": (talk(answer=PLAIN), talk(answer=LOOP * 4)),
    "duplicate": (talk("a"), talk()),
    "markup": (talk("a <b> c"), talk("a <|im_end|> c")),
    "markup-answer": (talk(), talk(answer="see <image>")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_each_check_finds_the_bad_row_only(case: str, media: Path, tmp_path: Path) -> None:
    check = max((name for name in CHECKS if case.startswith(name)), key=len)
    good, bad = CASES[case]
    plain = choice() if is_pair(bad) else talk()
    rows = [plain, good, bad] if good != plain else [plain, bad]
    report = validate(data(tmp_path, rows, media))
    assert found(report) == {check: 1}
    (finding,) = report.kept["train", check]
    assert finding.where == f"{tmp_path / 'train.jsonl'}:{len(rows)}"
    assert report.is_ok == (CHECKS[check].severity != "error")
    assert dict(report.left_out) == ({"train": 1} if CHECKS[check].is_left_out else {})
    assert report.notes == ["lengths were not checked: no model is named"]


def test_truncated_pictures_show_when_decoded(media: Path, tmp_path: Path) -> None:
    rows = [talk("a", image="good.jpg"), talk("b", image="truncated.jpg"), talk(video="video.gif")]
    arguments = data(tmp_path, rows, media)
    assert found(validate(arguments)) == {}
    assert found(validate(arguments, decode=True)) == {"damaged-media": 1}


def test_lengths_are_those_of_training(media: Path, tmp_path: Path) -> None:
    rows = [talk("x" * n, image="good.png") for n in range(0, 60, 7)] + [talk("y", video="video.gif"), talk("<image>")]
    arguments = data(tmp_path, rows, media)
    dataset = ConversationDataset(
        Mixture(load_sources(arguments)), tiny.tokenizer(), tiny.image_processor(), tiny.config(), on_error="skip",
        settings=RowSettings(max_seq_length=230), seed=42,
    )  # fmt: skip
    index = dataset.build_index(progress=False)
    report = validate(arguments, maker(), Limits(max_seq_length=230, seed=42), report=tmp_path / "report.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    bad = {int(line["where"].rsplit(":", 1)[1]) - 1 for line in lines if CHECKS[line["check"]].is_left_out}
    assert bad == set(index.unusable)
    assert 1 < len(bad) < len(rows)
    assert {line["check"] for line in lines} == {"too-long", "placeholders"}
    assert report.left_out["train"] == len(bad)

    frames = (
        maker().measure(Mixture(load_sources(arguments)).record(len(rows) - 2), take=Take(42, len(rows) - 2)).tiles
    )
    assert found(validate(arguments, maker(), Limits(max_tiles=frames))) == {"placeholders": 1}
    assert found(validate(arguments, maker(), Limits(max_tiles=frames - 1))) == {"placeholders": 1, "too-long": 1}


def test_lengths_of_pairs_are_those_of_training(media: Path, tmp_path: Path) -> None:
    rows = [choice(rejected="x" * n, image="good.png") for n in range(0, 60, 7)]
    rows += [choice(chosen="x" * 40, video="video.gif"), choice("<image>")]
    rows[0]["rejected"] = "x"
    arguments = data(tmp_path, rows, media)
    dataset = PreferenceDataset(
        Mixture(load_sources(arguments), parse_pair), tiny.tokenizer(), tiny.image_processor(), tiny.config(),
        on_error="skip", settings=RowSettings(max_seq_length=200), seed=42,
    )  # fmt: skip
    index = dataset.build_index(progress=False)
    report = validate(arguments, maker(), Limits(max_seq_length=200, seed=42), report=tmp_path / "report.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {int(line["where"].rsplit(":", 1)[1]) - 1 for line in lines} == set(index.unusable)
    assert 1 < report.left_out["train"] < len(rows)
    assert found(report) == {"too-long": report.left_out["train"] - 1, "placeholders": 1}
    assert "with its rejected answer: " in report.kept["train", "too-long"][0].message
    film = len(rows) - 2
    tiles = maker().measure_pair(dataset.records[film], take=Take(42, film)).tiles
    assert found(validate(arguments, maker(), Limits(max_tiles=tiles))) == {"placeholders": 1}
    assert found(validate(arguments, maker(), Limits(max_tiles=tiles - 1))) == {"placeholders": 1, "too-long": 1}


def test_what_both_answers_share_is_reported_once(media: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    row = choice(
        "<|im_end|> <box>[[9, 9, 1, 1]]</box>", ANSWER, "see <image>", images=["gone.png"], system="<s> [INST]"
    )
    validate(data(tmp_path, [row], media), report=path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["check"], line["message"].split()[:3]) for line in found] == [
        ("markup", ["turn", "1", "(system)"]), ("question-box", ["turn", "2:", "[9,"]),
        ("markup", ["turn", "2", "(human)"]), ("markup", ["the", "rejected", "answer"]),
        ("missing-media", ["there", "is", "no"]),
    ]  # fmt: skip
    assert found[0]["row"] == row


def test_earlier_answers_of_a_pair_are_not_learned(tmp_path: Path) -> None:
    row = choice("Sure?", history=[["Q", LOOP * 4], ["Q", ""]])
    assert found(validate(data(tmp_path, [row]))) == {}


def test_a_run_takes_one_kind_of_rows(tmp_path: Path) -> None:
    arguments = data(tmp_path, [talk(), choice(), choice("R"), {"question": "?"}])
    report = validate(arguments)
    assert found(report) == {"row": 1}
    assert report.notes[-1].startswith("2 are preference rows and 1 are conversations; a run takes one kind: ")
    supervised = validate(arguments, parse=parse_record)
    assert (found(supervised), len(supervised.notes)) == ({"row": 3}, 1)
    assert "recipe has a 'preference' section" in supervised.kept["train", "row"][0].message
    preference = validate(arguments, parse=parse_pair)
    assert (found(preference), len(preference.notes)) == ({"row": 2}, 1)
    assert "the row has no 'chosen'" in preference.kept["train", "row"][0].message


def test_duplicates_of_pairs(tmp_path: Path) -> None:
    messages = talked("Q", "Good")
    same = {"messages": messages, "rejected_response": "Bad"}
    rows = [choice(), same, choice(chosen="Bad", rejected="Good"), choice(rejected="Worse"), talk("Q", "Good")]
    report = validate(data(tmp_path, rows))
    assert found(report) == {"duplicate": 1}
    assert report.kept["train", "duplicate"][0].where.endswith(":2")


def test_rows_without_a_learned_token(tmp_path: Path) -> None:
    arguments = data(tmp_path, [{"text": "words"}, {"text": ""}])
    assert found(validate(arguments, maker(eos=False))) == {"unsupervised": 1, "empty-answer": 1}
    assert "unsupervised" not in found(validate(arguments, maker()))


def test_a_row_that_cannot_be_encoded() -> None:
    error = RecordError("rows:1", "no such template")
    error.__cause__ = TemplateError("no such template")
    assert explain_unusable(Record(()), error).check == "encoding"


# ---------------------------------------------------------------------------------------------------------------- text


def test_repetition_agrees_with_the_original(fixtures: Path) -> None:
    for case in json.loads((fixtures / "repetition.json").read_text()):
        assert repeated_ngrams(case["text"]) == case["ngram10"]


@pytest.mark.parametrize("seed", range(5))
def test_repeated_share_against_brute_force(seed: int) -> None:
    words = random.Random(seed).choices("ab", k=40)
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    alike = [sum(gram == other for other in grams) for gram in grams]
    assert repeated_share(" ".join(words), 4) == sum(count > 1 for count in alike) / len(grams)
    distinct = {tuple(gram) for gram, count in zip(grams, alike, strict=True) if count > 1}
    assert repeated_ngrams(" ".join(words), 4) == len(distinct) / len(grams)


def test_loops_are_seen_that_the_original_misses() -> None:
    assert repeated_ngrams("x " * 200) < 0.01
    assert repeated_share("x " * 200) == 1
    assert repeated_share("你好吗" * 30) == 1
    assert repeated_share("one two three") == 0


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("no markup", 0),
        ("<ref>a</ref><box>[[1, 2, 3, 4], [0, 0, 1000, 1000]]</box> <quad>[[1, 2]]</quad>", 0),
        ("<box>[[5, 5, 5, 5]]</box>", 0),
        ("<box>[1, 2, 3, 4]</box>", 1),
        ("<box>[[1, 2, 3]]</box>", 1),
        ("<box>[[0.1, 0.2, 0.3, 0.4]]</box>", 1),
        ("<box>[[1, 2, 3, true]]</box>", 1),
        ("<box></box>", 1),
        ("<box>[]</box>", 1),
        ("<box>" + "[" * 20_000 + "</box>", 1),
        ("<box>[[-1, 2, 3, 4]]</box>", 1),
        ("<box>[[1, 2, 3, 1001]]</box>", 1),
        ("<box>[[3, 2, 1, 4]]</box>", 1),
        ("<box>[[1, 4, 3, 2]]</box>", 1),
        ("<box>[[x1, y1, x2, y2]]</box>", 1),
        ("<ref>a<box>[[1, 2, 3, 4]]</box>", 1),
        ("a</ref>", 1),
        ("<box>[[1, 2, 3, 4]]", 1),
        ("<quad>[[1, 2]]", 1),
    ],
    ids=range(19),
)
def test_grounding(text: str, problems: int) -> None:
    assert len(find_grounding_problems(text)) == problems


# ---------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_against_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 8, 40).astype(np.uint64) * np.uint64(2**60)
    rows = np.flatnonzero(generator.random(40) < 0.8)
    expected, first = [], {}
    for row in rows.tolist():
        if int(hashes[row]) in first:
            expected.append((row, first[int(hashes[row])]))
        first.setdefault(int(hashes[row]), row)
    assert list(find_duplicates(hashes, rows)) == expected
    assert list(find_duplicates(hashes, rows[:0])) == []


def test_duplicates_across_data_sets_and_formats(media: Path, tmp_path: Path) -> None:
    message = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]
    first = data(tmp_path, [talk("<image>\nQ", "A", image="good.png"), talk()], media, "a.jsonl")
    again = data(tmp_path, [{"messages": message, "images": ["good.png"]}, talk("other")], media, "b.jsonl")
    both = DataArguments(
        data_paths=[*first.data_paths, *again.data_paths], image_folders=[str(media)] * 2,
        eval_data_paths=first.data_paths, eval_image_folders=[str(media)],
    )  # fmt: skip
    report = validate(both)
    assert dict(report.counts) == {("b", "duplicate"): 1, ("eval:a", "duplicate"): 2}
    assert "a.jsonl:1 of data set 'a'" in report.kept["b", "duplicate"][0].message


@pytest.mark.parametrize(
    "other",
    [talk("Hi "), talk(answer="Hello!"), talk("<image>Hi", image="a.png"), talk("Hi", image="a.png")],
    ids=["question", "answer", "picture", "added"],
)
def test_different_rows_have_different_hashes(other: Row) -> None:
    assert hash_record(parse_record(other)) != hash_record(parse_record(talk()))
    assert hash_record(parse_record(other)) == hash_record(parse_record(copy.deepcopy(other), "elsewhere"))


# -------------------------------------------------------------------------------------------------------------- report


def test_report_holds_every_problem_with_its_row(media: Path, tmp_path: Path) -> None:
    rows = [talk(f"{i}", image="gone.png") for i in range(5)] + ["{broken", talk("0", image="gone.png")]
    path = tmp_path / "report.jsonl"
    report = validate(data(tmp_path, rows, media), report=path, examples=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [*rows, rows[-1]]
    assert [line["check"] for line in lines] == ["missing-media"] * 5 + ["row", "missing-media", "duplicate"]
    assert len(report.kept["train", "missing-media"]) == 2
    summary = report.summary()
    assert "missing-media  error         6  85.71%" in summary
    assert "and 4 more" in summary
    assert (
        "training would leave out 7 of 7 rows (100.00%), more than max_skip_share=0.01: the run would stop" in summary
    )
    assert "7 errors, 1 warnings in 7 rows" in summary


def test_several_findings_of_a_row_count_once(media: Path, tmp_path: Path) -> None:
    report = validate(data(tmp_path, [talk("<image><image>", image=["x.png", "y.png"])], media))
    assert found(report) == {"missing-media": 1}
    assert report.left_out["train"] == 1


def test_workers_find_the_same(media: Path, tmp_path: Path) -> None:
    rows = [talk(str(i % 90), image="gone.png" if i % 7 == 0 else "good.png") for i in range(150)]
    arguments = data(tmp_path, rows, media)
    reports = [validate(arguments, maker(), workers=workers, report=tmp_path / str(workers)) for workers in (0, 2)]
    assert reports[0].counts == reports[1].counts
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text()
    assert found(reports[0])["duplicate"] == sum(rows.index(row) < i for i, row in enumerate(rows))


def test_what_is_not_checked_is_said(tmp_path: Path) -> None:
    arguments = data(tmp_path, [talk()])
    off = DataArguments(
        data_paths=[*arguments.data_paths, str(tmp_path / "off.jsonl")], repeat_times=[1, 0], max_skip_share=0
    )
    notes = validate(off).notes
    assert notes == [
        "lengths were not checked: no model is named",
        "data set 'off' has repeat_time 0 and was not checked",
    ]


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments: Any) -> int:
    return validate_main([str(argument) for argument in arguments])


def test_exit_codes(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path, [talk(answer=""), talk(image="good.png")])
    assert command(tmp_path / "train.jsonl", "--images", media) == 0
    assert "empty-answer" in capsys.readouterr().out
    assert command(tmp_path / "train.jsonl", "--images", tmp_path) == 1
    assert "missing-media" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.jsonl",), "there is no annotation file"),
        (("train.jsonl", "exif=false"), "overrides go with a recipe"),
        (("train.jsonl", "--max-seq-length", "5"), "--max-seq-length needs a tokenizer"),
        (("tiny/stage2",), "names no data"),
        (("meta.json", "--images", "x"), "--images goes with an annotation file"),
        (("train.jsonl", "--model", "no/such/model"), "no/such/model is no folder"),
        (("broken.json",), "not valid json"),
    ],
    ids=["gone", "override", "length", "no-data", "images", "model", "json"],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data(tmp_path, [talk()])
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"annotation": "train.jsonl"}}))
    (tmp_path / "broken.json").write_text("{")
    assert command(*arguments) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_recipe_and_meta_file(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path, [talk(), talk("long " * 400)])
    (tmp_path / "meta.json").write_text(json.dumps({"mine": {"annotation": "train.jsonl", "root": str(media)}}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{model_name_or_path: {CHECKPOINT}}}\ndata: {{meta_path: {tmp_path / 'meta.json'}}}\n"
        "training: {use_cpu: true, max_seq_length: 512}\n"
    )
    assert command(recipe) == 1
    assert "too-long  error         1  50.00%" in capsys.readouterr().out
    assert command(recipe, "max_seq_length=5000") == 0
    assert command(recipe, "--max-seq-length", 5000) == 0
    capsys.readouterr()
    packed = ("max_seq_length=null", "packing=true", "per_device_train_batch_size=1")
    assert command(recipe, *packed, "max_packed_tokens=512") == 1
    assert command(recipe, "--no-lengths") == 0
    assert "lengths were not checked" in capsys.readouterr().out
    assert command(tmp_path / "meta.json") == 0


def test_recipe_of_preference_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path, [choice(), talk()])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{model_name_or_path: {CHECKPOINT}}}\ndata: {{data_paths: [{tmp_path / 'train.jsonl'}]}}\n"
        "training: {use_cpu: true}\n"
    )
    assert command(recipe, "--no-lengths") == 1
    assert "train.jsonl:1: the row has 'chosen': this is a row for preference" in capsys.readouterr().out
    assert command(recipe, "preference={}", "--no-lengths") == 1
    assert "train.jsonl:2: the row has no 'chosen'" in capsys.readouterr().out
    assert command(tmp_path / "train.jsonl") == 0
    assert "1 are preference rows and 1 are conversations" in capsys.readouterr().out


def test_checks_are_documented() -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows: Callable[[str], bool] = lambda name: f"| `{name}` |" in guide  # noqa: E731
    assert [name for name in CHECKS if not rows(name)] == []
