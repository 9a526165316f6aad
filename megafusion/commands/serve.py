"""`megafusion serve`."""

import os
import sys
import webbrowser
from importlib.util import find_spec
from typing import Annotated

import typer

from megafusion.commands.arguments import Overrides, TrainedModel, check_trained_model
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.yaml_values import apply_overrides


def serve(
    pipeline: TrainedModel,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine's need MEGAFUSION_API_KEYS.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535)
    ] = 8000,
    page: Annotated[
        bool, typer.Option("--page", help="Serve a page to chat, draw, describe and edit, too.")
    ] = False,
    open_page: Annotated[
        bool, typer.Option("--open", help="Serve the page, and open it in a browser if there is a desktop.")
    ] = False,
) -> None:
    """Serve a pipeline over HTTP in OpenAI's shapes: chat, images, edits; and, with --page, in a browser.

    Limits are keys: `megafusion keys serve`. With MEGAFUSION_API_KEYS, each request must bear one of them.

    Example: megafusion serve runs/quickstart --page max_batch=16
    """
    from megafusion.serve.config import ServeConfig

    config = parse_config(ServeConfig, apply_overrides({}, overrides or []), "serve")
    check_trained_model(pipeline)
    page = page or open_page
    packages = ["fastapi", "prometheus_client", "python_multipart", "uvicorn", *(["gradio"] if page else [])]
    if missing := [name for name in packages if not find_spec(name)]:
        raise UserError(f"{missing[0]} is not installed: pip install 'megafusion[web]'")
    from megafusion.serve.server import listen, model_name, read_keys
    from megafusion.serve.server import serve as run_server

    keys = read_keys(host)
    listener = listen(host, port)

    from megafusion.device import default_device

    from megafusion import TransfusionPipeline
    from megafusion.serve.app import make_app

    opened = TransfusionPipeline.from_pretrained(pipeline).to(default_device())
    app = make_app(opened, config, model_name(pipeline), keys)
    where = f"[{host}]" if ":" in host else host
    address = f"http://{where}:{listener.getsockname()[1]}"
    if page:
        from megafusion.serve.page.mount import mount_page, read_captions, remove_files

        app = mount_page(app, model_name(pipeline), read_captions(pipeline), keys)
        typer.echo(f"the page: {address}")
    typer.echo(f"serving {pipeline} at {address}/v1 (Ctrl-C ends it)")
    if open_page and has_desktop():
        webbrowser.open(address)  # which waits until the server answers
    try:
        run_server(app, listener)
    finally:
        if page:
            remove_files(app)


def has_desktop() -> bool:
    """Whether a browser can show a window; elsewhere webbrowser may start one in the terminal."""
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
