"""`megafusion serve`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from megafusion.commands.arguments import Overrides
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.yaml_values import apply_overrides


def serve(
    pipeline: Annotated[
        Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")
    ],
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine's need MEGAFUSION_API_KEYS.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535)
    ] = 8000,
) -> None:
    """Serve a pipeline over HTTP in OpenAI's shapes: chat, images, edits.

    Limits are keys: `megafusion keys serve`. With MEGAFUSION_API_KEYS, each request must bear one of them.

    Example: megafusion serve runs/quickstart --port 8000 max_batch=16
    """
    from megafusion.serve.config import ServeConfig

    config = parse_config(ServeConfig, apply_overrides({}, overrides or []), "serve")
    if not pipeline.is_dir():
        raise UserError(f"{pipeline}: no such folder; give a pipeline folder, a run folder or a checkpoint")
    if missing := [name for name in ("fastapi", "prometheus_client", "uvicorn") if not find_spec(name)]:
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
    typer.echo(f"serving {pipeline} at http://{where}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)")
    run_server(app, listener)
