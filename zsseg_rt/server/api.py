"""What the server answers to HTTP requests."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, WebSocket
from pydantic import BaseModel, ConfigDict
from starlette.responses import HTMLResponse

from zsseg_rt.errors import VocabularyError
from zsseg_rt.server.hub import Hub
from zsseg_rt.server.viewer import watch
from zsseg_rt.server.worker import Worker

__all__ = ["create_app"]


class NewVocabulary(BaseModel):
    """Classes to look for."""

    model_config = ConfigDict(extra="forbid")

    classes: list[str | list[str]]
    background: list[str] = []


def create_app(hub: Hub, page: str) -> FastAPI:
    """The application that answers requests.

    Args:
        hub: What all clients share.
        page: The page, HTML.
    """
    app = FastAPI(title="zsseg_rt", docs_url=None, redoc_url=None)
    desk = Worker("requests", most_waiting=hub.limits.waiting)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/v1/vocabulary")
    async def get_vocabulary() -> dict[str, Any]:
        return hub.vocabulary

    @app.put("/v1/vocabulary")
    async def put_vocabulary(new: NewVocabulary) -> Any:
        from starlette.responses import JSONResponse

        try:
            await desk.run(lambda: hub.labeller.set_classes(new.classes, new.background))
        except VocabularyError as exc:
            return JSONResponse({"error": type(exc).__name__, "message": str(exc)}, 422)
        hub.tell_vocabulary()
        return hub.vocabulary

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        await socket.accept("zsseg.v1" if "zsseg.v1" in offered else None)
        await watch(socket, hub)

    return app
