"""The routes: a page to try a model, the captions as JSON, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive

from cache.errors import CapError
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.predictions import Prediction
from pipeline.captioner.serve.answers import (
    About,
    CaptionAnswer,
    Health,
    OneCaption,
    Timing,
    error_responses,
)
from pipeline.captioner.serve.batcher import Batcher, Captioned, TooManyPixels
from pipeline.captioner.serve.config import Limits, ServeConfig
from pipeline.captioner.serve.guard import Guard
from pipeline.captioner.serve.metrics import CONTENT_TYPE, Metrics
from pipeline.captioner.serve.refusal import ClientLeft, Refusal, RefusalResponse
from pipeline.captioner.serve.upload import Body, BodyBudget, Upload, read_upload
from pipeline.photos.decoding import ImageError
from pipeline.photos.drive.shortages import ShortageError

T = TypeVar("T")

_PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_LEFT_STATUS = 499  # as nginx logs it; nobody reads this answer
_BINARY = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": _BINARY}}
            },
            "image/*": {"schema": _BINARY},
            "application/octet-stream": {"schema": _BINARY},
        },
    }
}
_ERRORS = error_responses(
    {
        400: "The form cannot be read, or has no photo.",
        403: "A page of another site asked.",
        408: "The photo came too slowly.",
        413: "The photo has too many bytes or pixels.",
        415: "Neither a form nor an image.",
        421: "The server does not go by the name in the Host header.",
        422: "The photo cannot be decoded.",
        500: "The networks failed.",
        503: "Too many photos at once. Retry-After says when to try again, in seconds.",
    }
)


class Served:
    """A captioner behind HTTP. `app` is the ASGI application."""

    def __init__(
        self,
        captioner: Captioner,
        config: ServeConfig,
        *,
        name: str,
        limits: Limits | None = None,
        connections: Callable[[], int] = lambda: 0,
    ) -> None:
        """name: what the page calls the model. connections: how many are open."""
        self.captioner, self.config, self.name = captioner, config, name
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.batcher = Batcher(
            captioner,
            batch=config.batch,
            max_pixels=config.max_pixels,
            gather_s=self.limits.gather_s,
            metrics=self.metrics,
        )
        self._connections = connections
        # One photo always fits, with its form.
        self._budget = BodyBudget(max(self.limits.body_bytes, 2 * config.max_bytes))
        self._photos = 0  # that are uploading, waiting or being captioned
        self.app: ASGIApp = Guard(
            self._routes(),
            names=(config.host, *(config.allow_host or ())),
            metrics=self.metrics,
            linger_s=self.limits.linger_s,
        )

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="cap serve",
            summary="Captions of photos, by one trained model.",
            version=_version(),
            docs_url=None,  # FastAPI's own pages load their scripts from another site
            redoc_url=None,
            lifespan=self._lifespan,
        )
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _our_error)
        app.post(
            "/caption",
            response_model=CaptionAnswer,
            responses=_ERRORS,
            response_description="The photo's captions.",
            openapi_extra=_BODY,
            summary="Caption a photo",
        )(self.caption)
        app.get(
            "/about",
            response_model=About,
            response_description="About the model.",
            summary="The model and its limits",
        )(self.about)
        app.get(
            "/healthz",
            response_model=Health,
            response_description="It works.",
            responses={503: {"model": Health, "description": "The last batch failed."}},
            summary="Whether the server works",
        )(self.healthz)
        app.head("/healthz", include_in_schema=False)(self.healthz)  # some probes ask so
        app.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}, "description": "The counters."}},
            summary="Counters for Prometheus",
        )(self.metrics_text)
        for path, (file, kind) in _PAGES.items():
            app.get(path, include_in_schema=False)(_page(file, kind))
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.stop()

    async def caption(self, request: Request) -> Any:
        """Send a form with the photo as its file, or the photo's bytes as the body."""
        with Body(request.receive, self._budget, self.limits) as body:
            try:
                return await self._caption(request, body)
            except ClientLeft:
                self.metrics.refused("left")
                return Response(status_code=_LEFT_STATUS)
            except Refusal as refusal:
                self.metrics.refused(refusal.reason)
                linger_s = 0.0 if body.complete else self.limits.linger_s
                return _AsResponse(RefusalResponse(refusal, linger_s=linger_s))
            except Exception:  # a bug, or a GPU that fails: uvicorn writes the traceback
                self.metrics.refused("failed")
                raise

    async def _caption(self, request: Request, body: Body) -> CaptionAnswer:
        if self._photos >= self.config.queue:
            raise Refusal("busy", f"{self._photos} photos wait already; try again in a second")
        self._photos += 1
        try:
            begun = time.perf_counter()
            upload = await read_upload(body, request.headers.raw, self.config.max_bytes)
            upload_s = time.perf_counter() - begun
            found = await self._or_left(self._captioned(upload), request.receive)
        finally:
            self._photos -= 1
        seconds = {"upload": upload_s, **found.seconds}
        self.metrics.photo_done(seconds)
        return self._answer(found.prediction, found.batch, seconds)

    async def _captioned(self, upload: Upload) -> Captioned:
        try:
            found = await self.batcher.caption(upload.name, upload.data)
        except TooManyPixels as error:
            raise Refusal("too_large", str(error)) from None
        except ImageError as error:
            bomb = str(error).startswith("too large")
            raise Refusal("too_large" if bomb else "not_a_photo", str(error)) from None
        except ShortageError:
            raise Refusal("busy", "the server is short of memory; try again later") from None
        except CapError as error:
            raise Refusal("failed", str(error)) from None
        if found.prediction.error:
            raise Refusal("failed", found.prediction.error)
        return found

    async def _or_left(self, work: Any, receive: Receive) -> Any:
        """The result of `work`, which is cancelled if the client leaves. Raises ClientLeft, too."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientLeft
            return working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    def _answer(
        self, prediction: Prediction, batch: int, seconds: dict[str, float]
    ) -> CaptionAnswer:
        captions = (*prediction.captions, *prediction.others)
        return CaptionAnswer(
            name=prediction.path,
            caption=prediction.caption,
            score=round(prediction.score, 4),
            captions=[OneCaption.of(caption) for caption in captions],
            timing_ms=Timing.of(seconds),
            batch=batch,
            doubt=self.batcher.doubt,
        )

    async def about(self) -> About:
        captioner = self.captioner
        search = captioner.search_config
        return About(
            model=self.name,
            backbone=captioner.encoder.record.backbone,
            words=len(captioner.bundle.vocabulary),
            search="sampling" if search.sample else f"beam size {search.beam_size}",
            device=str(captioner.encoder.device),
            max_bytes=self.config.max_bytes,
            max_pixels=self.config.max_pixels,
            doubt=self.batcher.doubt,
        )

    async def healthz(self, response: Response) -> Health:
        failing = self.batcher.failure is not None
        response.status_code = 503 if failing else 200
        return Health(status="failing" if failing else "ok")

    async def metrics_text(self) -> Response:
        text = self.metrics.text(
            {
                "connections": ("Open connections.", self._connections()),
                "photos_in_progress": ("Photos from upload to answer.", self._photos),
                "photos_waiting": ("Of those, decoded ones.", self.batcher.waiting),
                "body_bytes": ("Memory that uploads are granted.", self._budget.used_bytes),
            }
        )
        return Response(text, media_type=CONTENT_TYPE)


class _AsResponse(Response):
    """An ASGI application as FastAPI wants an answer."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _our_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its log says why"}, 500)


def _page(file: str, kind: str) -> Callable[[], Any]:
    data = (resources.files(__package__) / "page" / file).read_bytes()

    async def page() -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

    return page


def _version() -> str:
    try:
        return version("cap")
    except PackageNotFoundError:  # run from a copy of the source
        return "0"
