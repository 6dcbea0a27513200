"""The local engine against the model's own chat, one request at a time."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from internvl_hub.data.records import FrameSampling, Video
from internvl_hub.evaluation.answer_store import AnswerStore
from internvl_hub.evaluation.collecting import collect, collection_settings
from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling
from internvl_hub.evaluation.local_engine import LocalEngine
from internvl_hub.evaluation.request_media import spell_request
from internvl_hub.frames_internvl import frame_prompt, segment_indices
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.tests.training import tiny_models

GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(n=3, temperature=1.0, top_k=20, max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return make_engine()


def make_engine(**options: Any) -> LocalEngine:
    model = tiny_models.model()
    processor = InternVLProcessor.from_model_config(model.config, tiny_models.tokenizer())
    return LocalEngine(model, processor, **{"batch_size": 3, **options})


def picture(folder: Path, index: int, size: tuple[int, int] = (56, 28)) -> Path:
    path = folder / f"{index}.png"
    tiny_models.picture(index, size).save(path)
    return path


def chat(engine: LocalEngine, request: Request, question: str, tiles: Any, num_patches: list[int]) -> str:
    """The greedy answer by the path that people use."""
    return engine.model.chat(
        engine.processor.tokenizer, tiles, question, {"max_new_tokens": 6, "do_sample": False},
        num_patches_list=num_patches, system=request.system,
    )  # fmt: skip


def test_greedy_answers_are_those_of_chat(engine: LocalEngine, tmp_path: Path) -> None:
    files = [picture(tmp_path, i, (56, 28 * (i + 1))) for i in range(3)]
    requests = [
        Request("Name three fruits!"),
        Request("<image>\nWhat is it?", (files[0],)),
        Request("What is it?", (tiny_models.picture(5),), max_tiles=1),
        Request("<image> and <image>?", (files[1], str(files[2])), max_tiles=4),
        Request("Hello!", system="Be brief."),
        Request("Hello!", system=""),
        Request("<image>\nColour?", (files[2],), system="Be brief."),
    ]
    processor = engine.processor.image_processor
    for request, answers in zip(requests, engine.sample(requests, GREEDY), strict=True):
        sources = [str(image) if isinstance(image, Path) else image for image in request.images]
        each = max(1, (request.max_tiles or 4) // max(1, len(sources)))
        output = processor(sources, max_dynamic_patch=each) if sources else {}
        tiles = output.get("pixel_values")
        patches = output["num_patches"].tolist() if sources else []
        (answer,) = answers
        assert answer.text.strip() == chat(engine, request, request.text, tiles, patches), request


def test_a_budget_limits_the_tiles(engine: LocalEngine, tmp_path: Path) -> None:
    file = picture(tmp_path, 0, (112, 28))
    parts = spell_request(Request("<image><image>", (file, file)))
    counts = {most: engine._tiles(parts, most)[1] for most in (None, 1, 3, 4, 8)}
    assert counts == {None: [3, 3], 1: [1, 1], 3: [1, 1], 4: [3, 3], 8: [5, 5]}


def test_samples_follow_the_seed_and_leave_the_random_state_alone(engine: LocalEngine) -> None:
    requests = [Request("Hello!"), Request("1+1=?")]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = engine.sample(requests, DRAWN)
    assert torch.equal(torch.rand(3), expected)
    assert engine.sample(requests, DRAWN) == first
    assert engine.sample(requests, Sampling(n=3, temperature=1.0, top_k=20, max_new_tokens=6, seed=4)) != first
    assert [len(answers) for answers in first] == [3, 3] and len({answer.text for answer in first[0]}) > 1


def test_a_tiny_temperature_draws_what_greedy_decoding_gives(engine: LocalEngine, tmp_path: Path) -> None:
    requests = [Request("Hello!"), Request("<image>\nWhat?", (picture(tmp_path, 1),))]
    cold = engine.sample(requests, Sampling(n=2, temperature=1e-4, max_new_tokens=6))
    for drawn, (greedy,) in zip(cold, engine.sample(requests, GREEDY), strict=True):
        assert drawn == [greedy, greedy]


def test_complete_says_whether_the_model_ended(engine: LocalEngine) -> None:
    def ends_with(token: int, request: Request, prefix: str = "") -> Answer:
        head = engine.model.language_model.get_output_embeddings()
        bias = torch.zeros(head.weight.shape[0])
        bias[token] = 1e4
        hook = head.register_forward_hook(lambda module, inputs, output: output + bias)
        try:
            ((answer,),) = engine.sample([request], GREEDY)
        finally:
            hook.remove()
        return answer

    tokenizer = engine.processor.tokenizer
    end, word = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("a")["input_ids"][0]
    assert ends_with(end, Request("Hello!")) == Answer("", True)
    assert ends_with(word, Request("Hello!")) == Answer("a" * 6, False)


def test_a_prefix_is_continued(root: Path) -> None:
    """The beginning of what a trained model says, given as the prefix, is continued by its rest."""
    folder = root / "checkpoints" / "internvl-tiny"
    engine = LocalEngine(InternVLChatModel.from_pretrained(folder), InternVLProcessor.from_pretrained(folder))
    ((whole,),) = engine.sample([Request("Who are you?")], GREEDY)
    words = whole.text.split(" ")
    assert len(words) == 3
    prefixes = [" ".join(words[:count]) for count in (1, 2)]
    results = engine.sample(
        [Request("Who are you?", prefix=prefix) for prefix in prefixes], Sampling(max_new_tokens=9)
    )
    for prefix, (rest,) in zip(prefixes, results, strict=True):
        assert (prefix + rest.text)[: len(whole.text)] == whole.text


def test_what_cannot_be_read_fails_alone(engine: LocalEngine, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    requests = [
        Request("Hello!"),
        Request("<image>\nWhat?", (tmp_path / "absent.png",)),
        Request("<image>\nWhat?", (broken,)),
        Request("<image>\nWhat?", (tmp_path,)),
        Request("<image><image>", (picture(tmp_path, 1),)),
        Request("<video>\nWhat?", videos=(Video(tmp_path / "absent.mp4"),)),
        Request("1+1=?"),
    ]
    results = engine.sample(requests, GREEDY)
    assert [isinstance(result, Failure) for result in results] == [False, True, True, True, True, True, False]
    words = ("absent.png", "broken.png", str(tmp_path), "2 <image> for 1", "absent.mp4")
    for result, word in zip(results[1:6], words, strict=True):
        assert word in result.reason
    assert [results[0], results[6]] == engine.sample([requests[0], requests[6]], GREEDY)


def test_a_prompt_too_long_fails_with_its_numbers(tmp_path: Path) -> None:
    engine = make_engine()
    engine.model.config.get_text_config().max_position_embeddings = 300
    short, long, tiled = engine.sample(
        [Request("Hi"), Request("word " * 200), Request("<image>", (picture(tmp_path, 0),), system="x " * 200)], GREEDY
    )
    assert isinstance(short, list)
    for result in (long, tiled):
        assert isinstance(result, Failure) and "the model 300 positions" in result.reason
    assert "3 tiles" in tiled.reason


def test_other_errors_end_the_run(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine.model, "batch_answers", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        engine.sample([Request("Hello!")], GREEDY)


def frames_folder(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (28, 28), (i, 0, 0)).save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


VIDEOS = {
    "segments": (FrameSampling(), segment_indices(20, 4).tolist()),
    "number": (FrameSampling(num_frames=3), segment_indices(20, 3).tolist()),
    "indices": (FrameSampling(indices=(7, 2, 7)), [7, 2, 7]),
}


@pytest.mark.parametrize("kind", ["folder", "list"])
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_a_video(tmp_path: Path, name: str, kind: str) -> None:
    files = frames_folder(tmp_path / "clip", 20)
    wish, expected = VIDEOS[name]
    video = Video(tmp_path / "clip" if kind == "folder" else tuple(files), frames=wish)
    parts = spell_request(Request("What happens?", videos=(video,)), num_frames=4)
    reds = [part.source.getpixel((0, 0))[0] for part in parts if not isinstance(part, str)]
    assert reds == expected and all(part.is_frame for part in parts if not isinstance(part, str))
    text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    assert text == frame_prompt(len(expected)) + "What happens?"


def test_a_clip_of_frames_with_a_rate(tmp_path: Path) -> None:
    frames_folder(tmp_path / "clip", 20)
    video = Video(tmp_path / "clip", clip=(5.0, 9.0), frames=FrameSampling(fps=2.0))
    parts = spell_request(Request("<video>", videos=(video,)), num_frames=4)
    reds = [part.source.getpixel((0, 0))[0] for part in parts if not isinstance(part, str)]
    assert reds == segment_indices(20, 4, 2.0, (5.0, 9.0)).tolist() and min(reds) >= 10


def test_a_few_frames_are_all_shown(tmp_path: Path) -> None:
    files = tuple(frames_folder(tmp_path / "clip", 3))
    parts = spell_request(Request("<video>", videos=(Video(files),)), num_frames=8)
    assert [part.source.getpixel((0, 0))[0] for part in parts if not isinstance(part, str)] == [0, 1, 2]


def test_pictures_and_frames_keep_their_order(engine: LocalEngine, tmp_path: Path) -> None:
    frames_folder(tmp_path / "clip", 2)
    request = Request("<image> then <video>\nand <image>", (picture(tmp_path, 0), picture(tmp_path, 1)),
                      (Video(tmp_path / "clip"),))  # fmt: skip
    tiles, patches = engine._tiles(spell_request(request), 8)
    assert patches == [3, 1, 1, 3]
    frame = engine.processor.image_processor(Image.new("RGB", (28, 28), (1, 0, 0)))["pixel_values"]
    assert torch.equal(tiles[4:5], frame)
    ((answer,),) = engine.sample([request], GREEDY)
    question = "<image> then Frame-1: <image>\nFrame-2: <image>\nand <image>"
    tiles, patches = engine._tiles(spell_request(request), None)
    assert answer.text.strip() == chat(engine, request, question, tiles, patches)


def test_a_collection_that_was_interrupted_ends_the_same(tmp_path: Path) -> None:
    engine = make_engine(batch_size=2)
    files = [picture(tmp_path, i) for i in range(3)]
    requests = []
    for i in range(5):
        number = 1 + i % 2
        requests.append((f"k{i}", Request(f"<image>\nQuestion {i}" * number, (files[i % 3],) * number)))
    requests.insert(2, ("bad", Request("<image>", (tmp_path / "absent.png",))))

    def run(folder: str, stop_after: int | None = None) -> bytes:
        store = AnswerStore(tmp_path / folder, collection_settings(requests, engine, DRAWN, 2))
        original, batches = engine.sample, []

        def sample(*arguments: Any) -> Any:
            if len(batches) == stop_after:
                raise KeyboardInterrupt
            batches.append(arguments)
            torch.manual_seed(random.randrange(1000))  # the state of the process must not matter
            return original(*arguments)

        engine.sample = sample
        try:
            collect(requests, engine, DRAWN, store, 2, progress=False)
        except KeyboardInterrupt:
            pass
        finally:
            del engine.sample
        return store.path.read_bytes()

    whole = run("whole")
    assert run("cut", stop_after=1) != whole
    assert run("cut", stop_after=1) != whole
    assert run("cut") == whole
    cut = tmp_path / "cut" / "answers-00000-of-00001.jsonl"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    assert run("cut") == whole


def test_settings(engine: LocalEngine) -> None:
    assert engine.name and not engine.model.training
    with pytest.raises(ValueError, match="batch_size=0"):
        make_engine(batch_size=0)
