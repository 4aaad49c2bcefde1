"""Start vLLM's server: `gblm serve DIR -- vLLM options`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, backend_option, progress_bars


@click.command("serve", cls=Command, context_settings={"ignore_unknown_options": False})
@click.argument("folder")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@backend_option
@click.option(
    "--pack",
    is_flag=True,
    help="Pack the zeros of a dense FOLDER into the cache first, once; every value stays as it is.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the API key.")
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve other machines without an API key, or open ports to them that ask for none.",
)
@click.option(
    "--open-routes",
    multiple=True,
    metavar="PATH",
    help="A route that is open without the API key, such as metrics; repeatable. /health and /ping "
    "always are.",
)
@click.option(
    "--max-body-size",
    type=click.IntRange(1, 1 << 20),
    default=8,
    show_default=True,
    help="MiB that the body of a request may have.",
)
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    folder: str,
    vllm_options: tuple[str, ...],
    pack: bool,
    **given: Any,
) -> None:
    """Serve FOLDER (or a hub id) with vLLM's OpenAI server; options behind -- go to vLLM."""
    from gblm.model.folder import model_name
    from gblm.serve.access import Server
    from gblm.serve.cached import folder_to_serve
    from gblm.serve.launch import check_options, serve

    server = Server(Path(folder), name=model_name(folder), options=vllm_options, **given)
    check_options(server)
    with progress_bars(ctx) as progress:
        found = folder_to_serve(folder, pack, progress)
    serve(replace(server, folder=found))
