"""How a request wants its answer drawn, checked before `generate` sees it."""

from __future__ import annotations

import math
from typing import Any

from .settings import Refused, ServeLimits

_LOWEST_SEED = -(2**63)
_RANGES = {  # lowest and highest value
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "frequency_penalty": (-0.9, 2.0),  # transformers takes 1 more as its repetition penalty, which is positive
    "max_tokens": (1, math.inf),
    "max_completion_tokens": (1, math.inf),
    "max_output_tokens": (1, math.inf),
    "top_k": (-1, math.inf),
    "seed": (_LOWEST_SEED, 2**63 - 1),
}


def check_sampling(body: dict[str, Any], limits: ServeLimits) -> None:
    """Raises `Refused` for sampling that `generate` could not do, or that is transformers' own whole configuration."""
    if "generation_config" in body:
        raise Refused("generation_config is not taken; set temperature, top_p, top_k, max_tokens and seed instead")
    for name, (low, high) in _RANGES.items():
        value, whole = body.get(name, low), isinstance(low, int)
        usable = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not usable or not low <= value <= high:
            most = f" to {high:g}" if high < 2**60 else ""
            start = f"from {low:g}{most}" if low > _LOWEST_SEED else "of 64 bits"
            raise Refused(f"{name} must be a {'whole ' * whole}number {start}, got {value!r:.40}")
    if not isinstance(body.get("stream", False), bool):
        raise Refused("stream must be true or false")
    stops, (most_stops, longest) = body.get("stop", []), limits.stops
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or any(not isinstance(stop, str) or not 0 < len(stop) <= longest for stop in stops):
        raise Refused(f"stop must be a text or a list of texts of 1 to {longest} characters")
    if len(stops) > most_stops:
        raise Refused(f"stop has {len(stops)} texts; at most {most_stops} are taken")
    if "stop" in body:
        body["stop"] = stops
        if not stops:
            del body["stop"]


def read_logit_bias(bias: Any, vocabulary: int) -> dict[str, float]:
    """Numbers from -100 to 100 by token id, as floats, which transformers insists on; else raises `Refused`."""
    usable = isinstance(bias, dict) and bias and all(
        str(key).isdecimal() and int(key) < vocabulary and isinstance(value, (int, float)) and abs(value) <= 100
        for key, value in bias.items()
    )  # fmt: skip
    if not usable:
        raise Refused(f"logit_bias must map token ids below {vocabulary} to numbers from -100 to 100")
    return {key: float(value) for key, value in bias.items()}
