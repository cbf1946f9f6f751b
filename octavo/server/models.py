"""/v1/models: the names under which the one model is served, and the check of a request's ``model``.

Owns these names; it does not know what a model is. Invariant: a name that the list shows is accepted everywhere, and every
other one is a 404 everywhere.
"""

import time

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.errors import ApiError
from octavo.server.service import Service
from octavo.server.sse import send_json

STARTED = int(time.time())


class Permission(msgspec.Struct, kw_only=True):
    """What OpenAI once said about who may do what; clients of that time still read it."""

    id: str
    object: str = "model_permission"
    created: int = STARTED
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, kw_only=True):
    """One name of the model. root: the model as the operator named it. max_model_len: tokens of prompt and answer."""

    id: str
    object: str = "model"
    created: int = STARTED
    owned_by: str = "octavo"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[Permission]


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


def served_names(service: Service) -> tuple[str, ...]:
    """The names that a request may use; the first one is the model's own."""
    return service.server.served_model_name or (service.config.model,)


def check_model(service: Service, model: str | None) -> str:
    """The name to answer with: the request's own, or the first; ApiError 404 for one that is not served."""
    names = served_names(service)
    if model is None:
        return names[0]
    if model not in names:
        raise ApiError(404, f"The model {model!r:.200} does not exist.", param="model", code="model_not_found")
    return model


def card(service: Service, name: str) -> ModelCard:
    """What is known of the model under one of its names."""
    return ModelCard(id=name, root=service.config.model, max_model_len=service.info.max_model_len,
                     permission=[Permission(id=f"modelperm-{name}")])


async def list_models(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """GET /v1/models."""
    await send_json(send, msgspec.json.encode(ModelList(data=[card(service, name) for name in served_names(service)])))


async def get_model(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """GET /v1/models/{id}; an id may hold slashes."""
    name = check_model(service, scope["path_params"]["model"])
    await send_json(send, msgspec.json.encode(card(service, name)))


ROUTES = (("GET", "/v1/models", list_models), ("GET", "/v1/models/{model:path}", get_model))
