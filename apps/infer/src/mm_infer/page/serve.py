"""How a page is served: to this machine alone unless told otherwise, and nothing that was not named."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' blob: data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
"""What the browser may load: nothing from elsewhere."""


def import_gradio(held: ExitStack) -> tuple[Any, Path]:
    """gradio, which tells nobody that it runs, and the folder of what is uploaded: gone when `held` is left.

    ValueError where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    uploads = held.enter_context(tempfile.TemporaryDirectory(prefix="mm_infer_page_"))
    os.environ["GRADIO_TEMP_DIR"] = uploads
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'mm-infer[page]'") from error
    return gradio, Path(uploads)


def make_app(gradio: Any, blocks: Any, css: str, host: str, find: Callable[[str], Path | None]) -> Any:
    """The application of a page. find: the file of /made/NAME, or None for a name that is not to be seen."""
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, PlainTextResponse

    quiet = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**quiet)

    @app.middleware("http")
    async def guard(request: Any, call_next: Any) -> Any:
        # gradio fetches addresses of others for whoever asks
        if any(word in request.url.path for word in ("/file=http", "/proxy=")):
            return PlainTextResponse("not served", 404)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.api_route("/made/{name}", methods=["GET", "HEAD"])
    def made(name: str) -> Any:
        file = find(name)
        return PlainTextResponse("not here", 404) if file is None else FileResponse(file, media_type="video/mp4")

    if host in LOCAL:  # a page of somebody else that calls itself by another name is not answered
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        app_kwargs=quiet,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        css=css,
        theme=gradio.themes.Default(primary_hue="blue"),  # its fonts come with it
    )


def claim_port(host: str, port: int) -> socket.socket:
    """A socket that listens there. ValueError for a port that somebody else has, or a host that is not here."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror}: give another --port (0: any free one)"
        ) from error


def serve(app: Any, listening: socket.socket) -> None:
    """Until Ctrl-C."""
    import uvicorn

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"open http://{shown}:{port}", flush=True)
    if host not in LOCAL:
        print("note: whoever reaches this address can use the page and see what was made", file=sys.stderr)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])
