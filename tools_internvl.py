"""Tool calls in the Hermes format, which Qwen2 and later models know: descriptions in, parsed calls out.

Tools are described in the system turn within `<tools>`, a model calls them within `<tool_call>`, results go back in a
user turn within `<tool_response>`. The words are those of Qwen2.5's and Qwen3's own chat templates, since the models
were trained on them. Nothing is executed here: what a model asks for is the caller's to check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import get_json_schema

from .reasoning_internvl import THINK_START, split_reasoning

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESULT_START, RESULT_END = "<tool_response>", "</tool_response>"

TOOLS_INTRODUCTION = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_CONCLUSION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

_JSON = json.JSONDecoder(strict=False)  # models write line breaks into strings as they are
_IMAGE = "<image>"  # in a question it would be an image slot

Tool = Callable[..., Any] | dict[str, Any]


class ToolCall(NamedTuple):
    """A call that a model asks for; neither the name nor the arguments have been checked against any schema."""

    name: str
    arguments: dict[str, Any]


class ToolProblem(NamedTuple):
    """A call that cannot be read: the text of its block and what is wrong with it."""

    text: str
    cause: str


class ParsedToolCalls(NamedTuple):
    """Tool calls of a response.

    Attributes:
        calls: In order.
        rest: The text around them, stripped.
        problems: Blocks that hold no readable call.
    """

    calls: list[ToolCall]
    rest: str
    problems: list[ToolProblem]


# ------------------------------------------------------------------------------------------------------------ describe


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """JSON schemas of tools, each as `{"type": "function", "function": {...}}`.

    Args:
        tools: Python functions with type hints and a Google docstring (read by transformers' `get_json_schema`), or
            schemas with or without the outer `{"type": "function"}`.

    Raises:
        TypeError: an entry is neither, or `tools` is no list.
        transformers' own errors: a function lacks a docstring, hints or the description of an argument.
    """
    if not isinstance(tools, (list, tuple)):
        raise TypeError(f"tools must be a list of functions or JSON schemas, got {type(tools).__name__}.")
    return [_schema(i, tool) for i, tool in enumerate(tools)]


def _schema(index: int, tool: Tool) -> dict[str, Any]:
    if isinstance(tool, dict):
        function = tool.get("function") if tool.get("type") == "function" else tool
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return {"type": "function", "function": function} if function is tool else tool
    elif callable(tool):
        return get_json_schema(tool)
    raise TypeError(
        f"tools[{index}] must be a Python function or a JSON schema "
        "{'type': 'function', 'function': {'name': ..., 'parameters': {...}}}; got " + repr(tool)[:80] + "."
    )


def with_tools(system: str | None, tools: Sequence[Tool]) -> str:
    """A system text that ends with the descriptions of `tools`; without tools, `system` alone."""
    schemas = tool_schemas(tools)
    if not schemas:
        return system or ""
    lines = "".join(f"\n{tool_json(schema)}" for schema in schemas)
    return f"{system}\n\n" * bool(system) + TOOLS_INTRODUCTION + lines + TOOLS_CONCLUSION


def tool_json(value: Any) -> str:
    """JSON as transformers' chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------------------------------------------- write


def tool_results(results: Sequence[Any]) -> str:
    """The question that gives a model the results of its calls, in their order.

    Args:
        results: Strings go as they are, anything else as JSON. A string with `<image>` or `</tool_response>` in it,
            which would break the turn, goes as a JSON string whose `<` is escaped.

    Raises:
        TypeError: a result is not to be had as JSON, or `results` is a string.
    """
    if isinstance(results, str):
        raise TypeError("results must be a list with one entry per call; got a single string.")
    return "\n".join(f"{RESULT_START}\n{_result(result)}\n{RESULT_END}" for result in results)


def _result(result: Any) -> str:
    marks = (_IMAGE, RESULT_START, RESULT_END)
    if isinstance(result, str) and not any(mark in result for mark in marks):
        return result
    text = tool_json(result)
    for mark in marks:  # outside its strings, JSON has no such character
        text = text.replace(mark, f"\\u003c{mark[1:]}")
    return text


def answer_with_calls(content: str, calls: Sequence[Any]) -> str:
    """An assistant's text with its calls behind it.

    Args:
        content: The text, or "".
        calls: `ToolCall`s, or OpenAI's `{"function": {"name": ..., "arguments": {...} or JSON text}}`, also bare.

    Raises:
        TypeError: a call has no name.
    """
    blocks = []
    for call in calls:
        if isinstance(call, ToolCall):
            call = call._asdict()
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TypeError(f"A tool call needs a name and arguments; got {repr(call)[:80]}.")
        arguments = function.get("arguments", {})
        arguments = arguments if isinstance(arguments, str) else tool_json(arguments)
        name = tool_json(function["name"])
        blocks.append(f'{CALL_START}\n{{"name": {name}, "arguments": {arguments}}}\n{CALL_END}')
    return "\n".join([content] * bool(content) + blocks)


# ---------------------------------------------------------------------------------------------------------------- read


def parse_tool_calls(text: str) -> ParsedToolCalls:
    """Tool calls in what a model wrote; broken ones are recorded problems, never errors.

    A closing tag may be missing. The arguments may be JSON inside a string, and be called `parameters`. Calls within
    `<think>` at the beginning were only thought of: they are left out, and so is the thinking from `rest`.

    Args:
        text: The answer.
    """
    if text.lstrip().startswith(THINK_START):
        text = split_reasoning(text).answer
    parsed, rest, place = ParsedToolCalls([], "", []), [], 0
    while (start := text.find(CALL_START, place)) >= 0:
        rest.append(text[place:start])
        body = start + len(CALL_START)
        value, cause, place = _json_at(text, body)
        if cause is None:
            calls, cause = _calls_of(value)
            parsed.calls.extend(calls)
        if cause is not None:
            parsed.problems.append(ToolProblem(text[start:place], cause))
    rest.append(text[place:])
    return parsed._replace(rest="".join(rest).strip())


def _json_at(text: str, place: int) -> tuple[Any, str | None, int]:
    """The JSON value of a block, what is wrong with it, and where the block ends.

    The value tells its own end, so that tags inside its strings do not matter.
    """
    while place < len(text) and text[place].isspace():
        place += 1
    try:
        if text[place : place + 1] not in ("{", "["):
            raise ValueError("no JSON object")
        value, end = _JSON.raw_decode(text, place)
    except (ValueError, RecursionError) as error:  # deep nesting ends in the latter
        ends = [at for at in (text.find(CALL_END, place), text.find(CALL_START, place)) if at >= 0]
        end = min(ends, default=len(text))
        unfinished = "" if ends else ", and the block is not closed"
        return None, f"invalid JSON ({getattr(error, 'msg', None) or error}){unfinished}", _past_end(text, end)
    after = end
    while after < len(text) and text[after].isspace():
        after += 1
    return value, None, _past_end(text, after) if text.startswith(CALL_END, after) else end


def _past_end(text: str, place: int) -> int:
    return place + len(CALL_END) if text.startswith(CALL_END, place) else place


def _calls_of(value: Any) -> tuple[list[ToolCall], str | None]:
    """The calls that a JSON value stands for, or what is wrong with it."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            return [], "no function name"
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = _JSON.decode(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                return [], "arguments are a string that is no JSON"
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            return [], f"arguments are no object but {type(arguments).__name__}"
        calls.append(ToolCall(function["name"], arguments))
    return (calls, None) if calls else ([], "an empty list")
