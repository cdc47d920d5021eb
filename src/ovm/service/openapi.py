"""The OpenAPI document of the REST interface, generated from the table of its verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from ovm.service.app import VERBS, Verb
from ovm.service.protocol import API, Problem
from ovm.wire import codec


@dataclass(frozen=True, slots=True)
class _Component:
    """Differences between a schema of the document and the type that it is generated from."""

    name: str
    """Name in generated clients; it stays when the type is renamed."""
    required: tuple[str, ...] = ()
    """Fields that every answer has, although the type has a default for them."""


_COMPONENTS = {
    "Info": _Component("InfoAnswer", ("docker_host",)),
    "StateInfo": _Component("State"),
    "ClockSync": _Component("Synced"),
    "Forward": _Component("PortOpen", ("purpose",)),
    "Pruned": _Component("PrunedAnswer", ("failures",)),
    "Event": _Component("Told", ("at",)),
}
_REFERENCE = "#/components/schemas/{name}"
_REFERENCES = {
    _REFERENCE.format(name=name): _REFERENCE.format(name=component.name) for name, component in _COMPONENTS.items()
}
_WRONG = {
    "400": "The request is invalid; nothing was changed.",
    "409": "The machine's state does not allow the request, or a port is taken.",
    "500": "The service failed.",
    "502": "The guest could not be reached, or a request to it failed.",
    "503": "The service has too many requests at once.",
    "504": "A command in the guest exceeded its timeout.",
    "507": "The file system is full.",
}


def document() -> dict[str, Any]:
    """Return the whole document, in OpenAPI 3.1."""
    kinds = [kind for verb in VERBS for kind in (verb.body, verb.answer) if kind is not None]
    schemas, components = _renamed(
        msgspec.json.schema_components([*kinds, Problem], schema_hook=codec.schema, ref_template=_REFERENCE)
    )
    names = dict(zip(map(id, kinds), schemas, strict=False))
    problem = {"application/json": {"schema": schemas[-1]}}
    paths: dict[str, Any] = {}
    for verb in VERBS:
        paths.setdefault(verb.path, {})[verb.method.lower()] = _operation(verb, names, problem)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ovm",
            "version": str(API),
            "description": "A machine's service, on a unix socket of mode 0600.",
        },
        "paths": paths,
        "components": {"schemas": dict(_published(name, schema) for name, schema in components.items())},
    }


def _renamed(schema: Any) -> Any:
    """Return ``schema`` with each reference replaced by the component's published name."""
    if isinstance(schema, dict):
        return {key: _renamed(value) for key, value in schema.items()}
    if isinstance(schema, list | tuple):
        return [_renamed(value) for value in schema]
    return _REFERENCES.get(schema, schema) if isinstance(schema, str) else schema


def _published(name: str, schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the component of the type ``name``, with the changes of ``_COMPONENTS``."""
    component = _COMPONENTS.get(name)
    if component is None:
        return name, schema
    fields = schema["properties"]
    required = {*schema["required"], *component.required}
    for field in component.required:
        fields[field].pop("default", None)
    return component.name, schema | {"title": component.name, "required": [name for name in fields if name in required]}


def _operation(verb: Verb, schemas: dict[int, Any], problem: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": verb.path.removeprefix("/v1/").replace("/", "-"),
        "summary": verb.summary,
        "responses": {"200": {"description": "Done.", "content": _content(verb, schemas)}}
        | {status: {"description": words, "content": problem} for status, words in _WRONG.items()},
    }
    if verb.body is not None:
        body = {"application/json": {"schema": schemas[id(verb.body)]}}
        operation["requestBody"] = {"required": True, "content": body}
    if verb.queries:
        operation["parameters"] = [
            {"name": query.name, "in": "query", "description": query.about, "schema": _query(query.kind)}
            for query in verb.queries
        ]
    return operation


def _query(kind: str) -> dict[str, Any]:
    return {"type": kind, "minimum": 0} if kind == "integer" else {"type": kind}


def _content(verb: Verb, schemas: dict[int, Any]) -> dict[str, Any]:
    if verb.answer is None:
        return {"application/json": {"schema": {"type": "null"}}}
    if verb.media_type in {"application/json", "text/plain"}:
        return {verb.media_type: {"schema": schemas[id(verb.answer)]}}
    return {verb.media_type: {"x-each": schemas[id(verb.answer)]}}
