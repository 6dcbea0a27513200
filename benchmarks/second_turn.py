"""Time to the first token of a second turn about an image: with a session against recomputing the conversation.

The model has random weights in the proportions of InternVL2.5-1B (InternViT-300M, Qwen2.5-0.5B); by default a quarter
of the layers of both, which keeps each part's share of the compute. Turn 1 shows 7 tiles of 448 pixels (1792 visual
tokens) and answers one token; turn 2 asks 20 tokens more. Both ways take turns in one run and must give the same
answers. Goal: at least 5x. Only the first token is measured: a session saves nothing in the decoding steps after it.

    python benchmarks/second_turn.py
    python benchmarks/second_turn.py --full --device cuda --dtype bfloat16
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from internvl_hub.benchmarks._one_billion import (
        IMAGE_SIZE,
        LAYERS,
        add_model_options,
        build_model,
        build_tokenizer,
        layers_of,
        ratio,
        where,
    )
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

TILES, QUESTION_TOKENS, CHECKED_TOKENS = 7, 20, 8
FIRST_QUESTION = "<image>\n" + " ".join(f"w{i}" for i in range(100, 110))
SECOND_QUESTION = " ".join(f"w{i}" for i in range(200, 200 + QUESTION_TOKENS))


class Conversation:
    """The two turns; `second` takes a session or recomputes."""

    def __init__(self, model: InternVLChatModel, device: str, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.session = model, build_tokenizer(), model.new_session()
        self.pixel_values = torch.randn(TILES, 3, IMAGE_SIZE, IMAGE_SIZE).to(device=device, dtype=dtype)
        self.history: list[tuple[str, str]] = []

    def first(self) -> None:
        """Turn 1. Asked again, it takes the session back to where turn 1 ended, at the price of one token."""
        _, self.history = self._chat(FIRST_QUESTION, 1, self.session, [])

    def second(self, session: Any = None, new_tokens: int = 1) -> str:
        return self._chat(SECOND_QUESTION, new_tokens, session, self.history)[0]

    def _chat(self, question: str, new_tokens: int, session: Any, history: list[tuple[str, str]]) -> Any:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        return self.model.chat(
            self.tokenizer, self.pixel_values, question, options, history=history, return_history=True, session=session
        )


def seconds(task: Callable[[], object]) -> float:
    """Time of a task; `chat` ends with the answer's ids on the CPU, so nothing is left running on a GPU."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def measure(talk: Conversation, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"turn 1": [], "turn 2, recomputed": [], "turn 2, session": []}
    times["turn 1"].append(seconds(talk.first))
    talk.second(talk.session)
    for _ in range(rounds):
        times["turn 2, recomputed"].append(seconds(talk.second))
        talk.first()
        times["turn 2, session"].append(seconds(lambda: talk.second(talk.session)))
    return times


def check_answers(talk: Conversation) -> None:
    """Exits unless both ways give the same tokens."""
    expected = talk.second(new_tokens=CHECKED_TOKENS)
    talk.first()
    answer = talk.second(talk.session, CHECKED_TOKENS)
    print(f"reused prompt tokens    {talk.session.reused_tokens}, encoded images {talk.session.encoded_images}")
    print(f"answers                 {'equal' if answer == expected else 'DIFFERENT'}, {CHECKED_TOKENS} greedy tokens")
    if answer != expected:
        sys.exit(f"with a session {answer!r}, recomputed {expected!r}")


def report(times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        spread = f"({1000 * min(values):.0f}-{1000 * max(values):.0f})" if len(values) > 1 else ""
        print(f"{name:23} {1000 * statistics.median(values):7.0f} ms   {spread}")
    gain = ratio(times["turn 2, recomputed"], times["turn 2, session"], digits=1)
    print(f"recomputed / session    {gain}; goal >= 5x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, rounds=5)
    args = parser.parse_args()
    layers = LAYERS if args.full else layers_of(args.layers_fraction)
    dtype = getattr(torch, args.dtype)
    talk = Conversation(build_model(layers, args.device, dtype), args.device, dtype)
    print(
        f"{layers} of {LAYERS} layers, {TILES} tiles, {args.rounds} rounds, {args.dtype}, {where(args.device)}, ",
        end="",
    )
    print(f"torch {torch.__version__}")
    report(measure(talk, args.rounds))
    check_answers(talk)


if __name__ == "__main__":
    main()
