"""The OpenAPI document of the interface, made from the table of its verbs."""

from __future__ import annotations

from typing import Any

import msgspec

from ovm.service.app import VERBS, Verb
from ovm.service.protocol import API, Problem

_REFERENCE = "#/components/schemas/{name}"
_WRONG = {
    "400": "The request cannot be fulfilled as it is; nothing was changed.",
    "409": "It does not fit the state of the machine, or a port is taken.",
    "500": "A fault of the service.",
    "502": "The guest could not be reached, or did not do as asked.",
    "503": "There are too many requests at once.",
    "504": "A command in the guest ran too long.",
    "507": "The disk has too little room.",
}


def document() -> dict[str, Any]:
    """The whole document, for OpenAPI 3.1."""
    kinds = [kind for verb in VERBS for kind in (verb.body, verb.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template=_REFERENCE)
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
        "components": {"schemas": components},
    }


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
