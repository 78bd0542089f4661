"""``mage-fast web``: a page on this machine that paints over images and generates them."""

from __future__ import annotations

import functools
import html
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mage_fast.errors import InputError
from mage_fast.optional import optional
from mage_fast.recipes.loading import Precision, image_size, load_model
from mage_fast.recipes.web_actions import EXAMPLES, Actions, Result, Settings
from mage_fast.sampler_config import CONSTANT, SCHEDULES
from mage_fast.training.data import open_source
from mage_fast.training.images import EXTENSIONS
from mage_fast.training.run import pick_device

#: Opaque, so that what is painted over is what the model does not see.
PAINT = "#f97316"
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important }
.examples img, .pictures img { image-rendering: pixelated }
/* the editor keeps the size that it has when it first shows, which may be before the page is laid out */
.editor { flex: none !important; width: 432px !important }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; padding-top: 34px !important }
.pictures .image-container { box-sizing: border-box; padding: 34px 8px 8px }
.examples .gallery { gap: 6px }
.examples .gallery-item, .examples .gallery-item * { width: 42px; height: 42px }
"""
#: The largest file that may be uploaded, and how long (seconds) it stays.
MAX_FILE_SIZE = "50mb"
KEPT_S = 24 * 3600


@dataclass(frozen=True)
class WebConfig:
    """Edit, reconstruct and generate images on a page in the browser; Ctrl-C ends it."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Its held-out images are the examples: digits, folder:PATH, webdataset:PATH or hf:NAME.
    data: str = "digits"
    #: Address to serve on; by default nobody but this machine reaches it.
    host: str = "127.0.0.1"
    port: int = 7860
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: WebConfig) -> dict[str, object]:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        InputError: no model or one without a tokenizer, an unknown source or one of tokens, an address or
            port that cannot be had, gradio missing.
        ValueError: a model that does not generate.
    """
    server = serve(config)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was uploaded goes
    try:
        print(f"mage-fast: {server.local_url} (Ctrl-C ends it)", file=sys.stderr)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return {"stopped_by": "Ctrl-C or SIGTERM"}
    finally:
        signal.signal(signal.SIGTERM, before)
        server.close(verbose=False)


def serve(config: WebConfig) -> Any:
    """Begin to serve, in threads; gradio's Blocks, with ``local_url`` and ``close()``."""
    gradio = optional("gradio", extra="web")
    _check_address(config.host, config.port)
    model = load_model(config.model, pick_device(config.device))
    source = open_source(config.data, image_size=image_size(model), split="test")
    blocks = _page(gradio, Actions(model, source, config.precision))
    # the font is served from here; its file of weight 600 lacks most letters
    font = gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    blocks.launch(
        **{"server_name": config.host, "server_port": config.port, "prevent_thread_lock": True},
        **{"quiet": True, "inline": False, "footer_links": [], "max_file_size": MAX_FILE_SIZE},
        **dict.fromkeys(
            ("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"), False
        ),
        theme=gradio.themes.Default(
            primary_hue="orange", neutral_hue="stone", font=(font, "system-ui", "sans-serif")
        ),
        css=CSS,
    )
    return blocks


def _check_address(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise InputError(f"web: port is {port}, wanted 1 to 65535")
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given back is free
            tried.bind((host, port))
    except OSError as error:
        raise InputError(
            f"web: cannot serve on {host}:{port} ({error.strerror or error}): give another --port or --host"
        ) from error


def _page(gr: ModuleType, actions: Actions) -> Any:
    """The page: settings on the left, beside them a tab for editing and one for generation."""
    first = actions.examples[0]
    with gr.Blocks(title="mage_fast", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as blocks:
        image = gr.State(first)
        gr.Markdown(_title(actions))
        with gr.Row():
            with gr.Column(scale=1, min_width=200):
                settings = _settings(gr, actions)
            with gr.Column(scale=4, min_width=880):
                with gr.Tab("Edit"):
                    samples = gr.Dataset(
                        components=[gr.Image(visible=False, format="png")],
                        samples=[[example] for example in actions.examples],
                        samples_per_page=EXAMPLES,
                        **{"type": "index", "label": "Examples", "elem_classes": "examples"},
                    )
                    with gr.Row():
                        editor = gr.ImageEditor(
                            _unpainted(actions, first),
                            **{"label": "Paint over what shall change", "elem_classes": "editor"},
                            **{"type": "numpy", "image_mode": "RGBA", "format": "png", "height": 400},
                            **{"sources": (), "transforms": (), "layers": False, "buttons": []},
                            brush=gr.Brush(colors=[PAINT], color_mode="fixed", default_size=40),
                            canvas_size=actions.picture(first).shape[:2],
                        )
                        seen = gr.Image(
                            **{"label": "What the model sees", "elem_classes": "pictures", "height": 400},
                            **{"format": "png", "interactive": False, "buttons": []},
                        )
                    with gr.Row():
                        run_edit = gr.Button("Run", variant="primary")
                        run_reconstruct = gr.Button("Hide 75% at random")
                        upload = gr.UploadButton("Upload an image", file_types=sorted(EXTENSIONS))
                    edited = _gallery(gr, "Result")
                with gr.Tab("Generate"):
                    run_generate = gr.Button("Run", variant="primary")
                    generated = _gallery(gr, "Generated images")

        def on(event: Callable[..., Any], action: Callable[..., Any], inputs: list[Any], outputs: Any) -> Any:
            return event(
                _telling(gr, action),
                **{"inputs": inputs, "outputs": outputs, "api_visibility": "private"},
                **{"concurrency_limit": 1, "concurrency_id": "model"},  # one at a time, whoever asks
            )

        # an editor with paint hangs when it is given another image: it is taken away and a new one comes
        away = gr.update(value=None, visible=False)

        def show(image: Any) -> Any:
            return gr.update(value=_unpainted(actions, image), visible=True)

        def edit(image: Any, painted: dict[str, Any], *values: Any) -> Result:
            if painted["background"] is None:  # thrown away by the editor's bin
                raise InputError("there is no image: choose an example or upload one")
            return actions.edit(image, painted["layers"], Settings(*values))

        picked = on(samples.click, lambda index: (actions.examples[index], away), [samples], [image, editor])
        uploaded = on(upload.upload, lambda path: (actions.read(path), away), [upload], [image, editor])
        for chosen in (picked, uploaded):
            on(chosen.success, show, [image], editor)
        on(run_edit.click, edit, [image, editor, *settings], [seen, edited])
        on(
            run_reconstruct.click,
            lambda image, *values: actions.reconstruct(image, Settings(*values)),
            [image, *settings],
            [seen, edited],
        )
        on(run_generate.click, lambda *values: actions.generate(Settings(*values)), settings, generated)
    return blocks


def _unpainted(actions: Actions, image: Any) -> dict[str, Any]:
    """What the editor shows of an image at first."""
    return {"background": actions.picture(image), "layers": [], "composite": None}


def _gallery(gr: ModuleType, label: str) -> Any:
    return gr.Gallery(
        **{"label": label, "columns": 4, "object_fit": "contain", "height": "auto", "format": "png"},
        **{"interactive": False, "buttons": ["download"], "elem_classes": "pictures"},
    )


def _settings(gr: ModuleType, actions: Actions) -> list[Any]:
    """The controls, in the order of :class:`Settings`; those of a class only where the model knows any."""
    start, classes = Settings(), actions.model.config.num_classes
    return [
        gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=2**53),
        gr.Slider(1, 12, start.variants, step=1, label="Variants"),
        gr.Slider(1, 64, start.steps, step=1, label="Steps"),
        gr.Slider(0, 20, start.choice_temperature, step=0.5, label="Temperature"),
        gr.Dropdown([*SCHEDULES, CONSTANT], value=start.schedule, label="Schedule"),
        gr.Slider(0, 3, start.grow, step=1, label="Widening (tokens)"),
        gr.Textbox(
            start.label,
            **{"label": "Class label", "visible": classes is not None, "max_lines": 1},
            placeholder=f"any, or 0 to {(classes or 1) - 1}",
        ),
        gr.Slider(*(0, 10, start.guidance_scale), step=0.5, label="Guidance", visible=classes is not None),
    ]


def _title(actions: Actions) -> str:
    config = actions.model.config
    parameters = sum(x.numel() for x in actions.model.parameters()) / 1e6
    return (
        f"# mage_fast\nA model of {parameters:.1f} million parameters: {actions.side} x {actions.side} "
        f"pixels, {config.grid_size} x {config.grid_size} tokens of {config.codebook_size} codes."
    )


def _telling(gr: ModuleType, action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, whose user's mistakes are told on the page."""

    @functools.wraps(action)
    def told(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return told
