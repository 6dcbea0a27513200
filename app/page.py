"""The demo page: Gradio components and their wiring; what they do is in the other `page_` files.

Needs the extra `demo`. `page_command.py` has the command line.
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .page_chat import Host
from .page_gate import Gate, UploadBudget, UploadLimits
from .page_limits import THINKING, PageError, Settings, can_think, checked_settings, setting_ranges
from .page_media import IMAGE_ENDINGS, VIDEO_ENDINGS, MediaLimits, UploadError, read_upload
from .page_messages import Shelf, chat_messages, tile_views, token_summary
from .page_visitors import Conversations

logger = logging.getLogger(__name__)

_CSS = """
.gradio-container {max-width: 1320px !important; margin: 0 auto !important}
#title h1 {font-size: 1.45rem; font-weight: 650; margin: 0}
#title p {color: var(--body-text-color-subdued); margin: .15rem 0 0}
#summary {color: var(--body-text-color-subdued); font-size: .9rem; padding: 0 .25rem}
#chat .message img {border-radius: 6px; max-height: 270px}
#chat .message-buttons-left, #chat .message-buttons-right {display: none}
#tiles .caption {font-size: .85rem; font-weight: 500}
#tiles .preview {background: var(--background-fill-primary)}
#examples .gallery-item {max-height: 76px; font-size: .9rem}
#examples img {max-height: 60px; width: auto}
footer {display: none !important}
"""


class Page:
    """What the events of the page call.

    Args:
        host: The model.
        uploads: Folder of uploads and of pictures to show; Gradio must be using it too.
        media: Limits of single uploads.

    Attributes:
        budget: What all uploads may take together.
    """

    def __init__(self, host: Host, uploads: str | Path, media: MediaLimits | None = None) -> None:
        self.host, self.uploads = host, Path(uploads)
        self.media = media or MediaLimits()
        self.visitors = Conversations(host)
        self.shelf = Shelf(self.uploads / "shown")
        self.budget = UploadBudget(UploadLimits(seconds=host.limits.idle_seconds))

    def ask(self, request: gr.Request, sent: dict[str, Any] | None, turns: int, *values: Any) -> Iterator[Any]:
        """Answers what was sent; yields (chat, box, tiles, summary, number of turns).

        What is refused is said in a warning, and the text stays in the box.
        """
        sent = sent or {"text": "", "files": []}
        try:
            conversation = self.visitors.get(request.session_hash)
            if turns and not conversation.exchanges:
                gr.Warning("The earlier conversation was dropped, after a long pause or to make room for others.")
            settings = checked_settings(
                dict(zip(self._names(), values, strict=True)), self.host.limits, self.media.frames
            )
            self.host.limits.check_media(len(conversation.media) + len(sent["files"]))
            uploads = [read_upload(path, self.uploads, self.media, settings.frames) for path in sent["files"]]
            for exchange in conversation.ask(sent["text"], uploads, settings):
                self.visitors.admit()
                done = conversation.exchanges and conversation.exchanges[-1] is exchange
                yield self._shown(conversation, None if done else exchange)
            yield self._shown(conversation)
        except (PageError, UploadError) as error:
            gr.Warning(html.escape(str(error)))
            yield gr.skip(), gr.update(value=sent, interactive=True), gr.skip(), gr.skip(), gr.skip()
        except Exception:
            logger.exception("an answer failed")
            gr.Warning("The answer failed; the server's log says why.")
            yield gr.skip(), gr.update(value=sent, interactive=True), gr.skip(), gr.skip(), gr.skip()
        finally:
            self.visitors.release(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's answer."""
        conversation = self.visitors.find(request.session_hash)
        if conversation is not None:
            conversation.stop()

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Forgets the visitor's conversation."""
        conversation = self.visitors.find(request.session_hash)
        if conversation is not None:
            conversation.clear()
        return [], gr.update(value=None, interactive=True), [], token_summary([], 0), 0

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page."""
        self.visitors.close(request.session_hash)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of the numbers that a visitor can set."""
        ranges = setting_ranges(self.host.limits, self.media.frames)
        return {name: (low, high) for name, (low, high) in ranges.items() if low < high}

    def _names(self) -> tuple[str, ...]:
        return (*self.ranges, "system", *(("thinking",) if can_think(self.host.model) else ()))

    def _shown(self, conversation: Any, current: Any = None) -> tuple[Any, ...]:
        finished = conversation.exchanges
        media = [*conversation.media, *(current.media if current is not None else [])]
        views = tile_views(media, self.shelf)
        newest = len(views) - len(media[-1].views) if media else None
        gallery = gr.update(value=views, selected_index=newest)
        box = gr.update(value=None, interactive=current is None)
        summary = token_summary(media, self.host.tokens_per_tile)
        return chat_messages(finished, self.shelf, current), box, gallery, summary, len(finished)


def build(page: Page, title: str, examples: str | Path | None = None) -> gr.Blocks:
    """The page as Gradio blocks, with a queue: one answer at a time.

    Args:
        page: What its events call.
        title: Name of the model.
        examples: Folder of pictures with `questions.json`: `[{"image": name, "turns": [[question, answer], ...]}]`.
    """
    with gr.Blocks(title=f"InternVL: {title}", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>{html.escape(page.host.description)}</p>", elem_id="title")
        turns = gr.State(0)
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=420):
                chat = _chat()
                box = _box(page)
                with gr.Row():
                    stop, clear = gr.Button("Stop", size="sm"), gr.Button("Clear conversation", size="sm")
            with gr.Column(scale=5, min_width=360):
                tiles = gr.Gallery(
                    label="What the model sees", columns=6, object_fit="contain", height=400, elem_id="tiles",
                    format="png", interactive=False, buttons=["fullscreen"], preview=True,
                )  # fmt: skip
                summary = gr.Textbox(
                    token_summary([], 0), show_label=False, container=False, interactive=False, elem_id="summary"
                )
                settings = _add_settings(page)
                _add_examples(box, examples)
        outputs = [chat, box, tiles, summary, turns]
        box.submit(
            page.ask, [box, turns, *settings], outputs, concurrency_limit=1, concurrency_id="model",
            show_progress="minimal", show_progress_on=[box], api_name="ask", api_visibility="undocumented",
        )  # fmt: skip
        stop.click(page.stop, None, None, queue=False, api_name="stop", api_visibility="undocumented")
        for event in (clear.click, chat.clear):
            event(page.clear, None, outputs, queue=False, api_name="clear", api_visibility="undocumented")
        blocks.unload(page.leave)
    return blocks.queue(max_size=page.host.limits.waiting, api_open=False)  # else `run` would pass the queue by


def _chat() -> gr.Chatbot:
    # Plain text: answers and questions are shown letter by letter as they are, whatever they pretend to be. There is
    # no copy button, because it would copy the escapes of `page_messages.py`.
    return gr.Chatbot(
        label="Conversation", elem_id="chat", height=640, render_markdown=False, sanitize_html=True, allow_tags=False,
        latex_delimiters=[], buttons=[], feedback_options=None, allow_file_downloads=False, layout="bubble",
        placeholder="Send an image or a video, and ask about it.", group_consecutive_messages=True,
    )  # fmt: skip


def _box(page: Page) -> gr.MultimodalTextbox:
    box = gr.MultimodalTextbox(
        show_label=False, placeholder="Ask a question; add images or a video", file_count="multiple", autofocus=True,
        file_types=[*IMAGE_ENDINGS, *VIDEO_ENDINGS], sources=["upload"], elem_id="box", max_lines=6,
        max_plain_text_length=page.host.limits.characters,
    )  # fmt: skip
    _refuse_addresses(box)
    return box


def _refuse_addresses(box: gr.MultimodalTextbox) -> None:
    """Takes files from browsers only: where a message names an address as its file, Gradio would fetch it."""
    move = box.async_move_resource_to_block_cache

    async def move_files_only(url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path or "").lower().startswith(("http:", "https:")):
            raise gr.Error("Send the file itself, not its address.", print_exception=False)
        return await move(url_or_file_path)

    # On the object, because Gradio finds no browser code for a class derived from a component.
    box.async_move_resource_to_block_cache = move_files_only  # type: ignore[method-assign]


def _add_settings(page: Page) -> list[Any]:
    limits, default = page.host.limits, Settings()
    texts = {
        "max_tiles": ("Tiles of an image, at most", "for new images; more tiles show smaller things", 1),
        "frames": ("Frames of a video", "for new videos; one tile each", 1),
        "max_new_tokens": ("Tokens of an answer, at most", None, 1),
        "temperature": ("Temperature", "0: always the most likely word", 0.05),
        "top_p": ("Top-p", "not used at temperature 0", 0.01),
        "top_k": ("Top-k", "0: all words; not used at temperature 0", 1),
        "repetition_penalty": ("Repetition penalty", "1: none", 0.01),
    }
    inputs: list[Any] = []
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        for name, (low, high) in page.ranges.items():
            label, info, step = texts[name]
            value = page.host.default_tiles if name == "max_tiles" else min(getattr(default, name), high)
            inputs.append(gr.Slider(low, high, value, step=step, label=label, info=info))
        inputs.append(gr.Textbox(label="System text", info="empty: the model's own", max_length=limits.characters))
        if can_think(page.host.model):
            inputs.append(gr.Radio(list(THINKING), value=default.thinking, label="Thinking before the answer"))
    return inputs


def _add_examples(box: gr.MultimodalTextbox, folder: str | Path | None) -> None:
    rows = example_rows(folder)
    if rows:
        gr.Examples([[row] for row in rows], inputs=[box], examples_per_page=12, elem_id="examples")


def example_rows(folder: str | Path | None) -> list[dict[str, Any]]:
    """Values of the box, one per picture: its last question, which for shapes asks for a box."""
    path = Path(folder or "") / "questions.json"
    if folder is None or not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [{"text": row["turns"][-1][0], "files": [str(path.parent / row["image"])]} for row in rows]


def server_options(page: Page) -> dict[str, Any]:
    """Arguments of `launch` that keep visitors within bounds."""
    gate = Middleware(Gate, folder=page.uploads, budget=page.budget, kept=(page.shelf.folder,))
    return {
        "max_file_size": page.media.video_bytes, "allowed_paths": [], "show_error": False, "enable_monitoring": False,
        "strict_cors": True, "app_kwargs": {"middleware": [gate]},
    }  # fmt: skip


def launch(host: Host, uploads: str, title: str, examples: Path | None, options: Any, auth: Any = None) -> None:
    """Serves the page until it is interrupted.

    Args:
        host: The model.
        uploads: Folder of uploads, the one that Gradio uses.
        title: Name of the model.
        examples: As for `build`.
        options: Of the command: `host`, `port`, `share`, `open`, `max_frames`.
        auth: User and password that visitors must give.
    """
    media = MediaLimits() if options.max_frames is None else MediaLimits(frames=options.max_frames)
    page = Page(host, uploads, media)
    build(page, title, examples).launch(
        server_name=options.host, server_port=options.port, share=options.share, inbrowser=options.open, auth=auth,
        footer_links=[], theme=_theme(), css=_CSS, ssr_mode=False, **server_options(page),
    )  # fmt: skip


def _theme() -> gr.themes.Base:
    # Fonts of the browser: no request leaves the machine.
    fonts = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "sans-serif")
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace")
    )
