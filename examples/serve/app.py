"""The service: a FastAPI app that answers from whichever version of the model serves."""

import asyncio
import contextlib
import gc
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel, Field

from asyncloader import AsyncLoaderError, Event, Live, LoadFinished, Runtime
from asyncloader.metrics import Metrics
from examples.serve import model
from examples.serve.feed import EventStream, Feed
from examples.serve.pulse import Pulse
from examples.serve.rows import Rows
from examples.serve.status import event_message, history_message, model_status, state_message

__all__ = ["Server", "Service", "create_app"]

PAGE = Path(__file__).with_name("page.html").read_text()

# Seconds between two states that are sent: more of them while something moves.
_CALM, _BUSY = 0.25, 0.1
_REMEMBERED = 50

router = APIRouter()


class Service:
    """The model, and what is known about how it is doing.

    Args:
        run: The run folder to follow, or its URL.
        keep: Versions that stay in memory.
        poll: Seconds between two looks at the folder.
        max_loop_lag: Seconds that a load may delay the event loop by; `None` takes no care.
        disk: Whether rows of tables stay on the disk.
        cache_bytes: Memory for those of them that are asked for often.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        keep: int,
        poll: float,
        max_loop_lag: float | None,
        disk: bool,
        cache_bytes: int,
    ) -> None:
        runtime = Runtime(row_cache_bytes=cache_bytes)
        self.live = Live(
            run,
            partial(model.build_on_disk, runtime) if disk else model.build,
            keep=keep,
            poll=poll,
            loader_options={"max_loop_lag": max_loop_lag},
            check=model.check,
            on_event=self._note,
        )
        self.feed = Feed()
        self.pulse = Pulse()
        self.rows = Rows()
        self.registry = CollectorRegistry()
        self.events: deque[Event] = deque(maxlen=_REMEMBERED)
        self.last_load: LoadFinished | None = None
        self._metrics = Metrics(registry=self.registry)
        self._metrics.watch(self.live)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve the newest version from the beginning of the block to its end."""
        async with self.live, asyncio.TaskGroup() as group:
            # All that is here by now stays, and a full collection need not look at it: it would
            # stop the event loop for a tenth of a second.
            gc.collect()
            gc.freeze()
            with self.pulse:
                showing = group.create_task(self._show(), name="show")
                try:
                    yield
                finally:
                    showing.cancel()
                    gc.unfreeze()

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(_CALM if self.live.state.loading is None else _BUSY)
            if self.feed:
                rows = self.rows.seen(self.live.state.tables.values())
                self.feed.show(state_message(self.live, self.last_load, self.pulse, rows))

    def _note(self, event: Event) -> None:
        self._metrics(event)
        self.events.append(event)
        if isinstance(event, LoadFinished):
            self.last_load = event
        self.feed.post(event_message(event))


def create_app(
    run: str | Path,
    *,
    keep: int = 2,
    poll: float = 1.0,
    max_loop_lag: float | None = 0.005,
    disk: bool = False,
    cache_bytes: int = 0,
) -> FastAPI:
    """Return the app that serves the newest version of a run folder, which has to hold one.

    For the arguments, see `Service`.
    """
    service = Service(
        run, keep=keep, poll=poll, max_loop_lag=max_loop_lag, disk=disk, cache_bytes=cache_bytes
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="asyncloader", lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    return app


class Server(uvicorn.Server):
    """A uvicorn that ends open event streams when it is to stop: by itself it waits for them.

    Args:
        config: What to serve, an app of `create_app`.
        feed: Its streams.
        started: Called once it serves.
    """

    def __init__(
        self, config: uvicorn.Config, *, feed: Feed, started: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._feed = feed
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feed.close()
        await super().shutdown(sockets)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Asked = Annotated[Service, Depends(_service)]
Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Query(BaseModel):
    """Which items to rank, and for whom."""

    user: Id
    items: Annotated[list[Id], Field(max_length=10_000)]


class Ranking(BaseModel):
    """The items' scores, in their order, all of one version."""

    version: str
    scores: list[float]


@router.post("/rank")
async def rank(query: Query, service: Asked) -> Ranking:
    """Score items for a user."""
    with service.live.use() as version:
        scores = await model.rank(version, user=query.user, items=query.items)
        service.pulse.answered += 1
        return Ranking(version=version.version, scores=scores.tolist())


@router.get("/health")
async def health(service: Asked) -> dict[str, str]:
    """Say whether there is a version to answer from: 503 if there is not."""
    try:
        return {"serving": service.live.current.version}
    except RuntimeError as error:
        raise HTTPException(503, str(error)) from error


@router.get("/model")
async def state(service: Asked) -> dict[str, Any]:
    """Describe the model."""
    return model_status(service.live, service.last_load)


@router.post("/rollback")
async def rollback(service: Asked) -> dict[str, Any]:
    """Let the version serve that served before, until `/resume`. 409 if that cannot be."""
    try:
        version = await service.live.rollback()
    except (LookupError, AsyncLoaderError) as error:
        raise HTTPException(409, f"nothing has changed: {_text(error)}") from error
    return {"serving": version.version, "following": service.live.state.following}


@router.post("/resume")
async def resume(service: Asked) -> dict[str, Any]:
    """Follow the newest version again, which comes in meanwhile."""
    await service.live.resume()
    return {"serving": service.live.current.version, "following": True}


@router.get("/metrics")
async def metrics(service: Asked) -> Response:
    """Return what a Prometheus server collects."""
    return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/events")
async def events(service: Asked) -> EventStream:
    """Tell what happens, as it happens, as server-sent events."""
    return EventStream(service.feed, history_message(service.events, service.pulse))


@router.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Show it all to a person."""
    return PAGE


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, LookupError) else str(error)
