"""The REST interface against its own OpenAPI document, by requests that schemathesis makes up."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import given
from schemathesis import checks
from schemathesis.generation import GenerationMode

import fuzz
import homes
import tiny

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]

ENDS_IT = {"/v1/stop", "/v1/suspend", "/v1/reset"}
"""Asked for nothing but what they refuse."""
STREAMS = {"/v1/events", "/v1/log"}
REFUSED_HERE = {"positive_data_acceptance"}
"""Much of what is right cannot be done: the guest is bare, or was paused by an earlier request."""
REQUESTS = 300
"""For each thing that can be asked, in ``make soak``; a tenth of them else."""
ANSWER_S = 60.0


def asks(service: httpx2.Client, operation: Any, mode: GenerationMode) -> None:
    """Sends what is made up, and compares each answer with the document."""
    held_against = [check for check in checks.CHECKS.get_all() if check.__name__ not in REFUSED_HERE]

    @fuzz.examples(REQUESTS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if case.path in STREAMS and str((case.query or {}).get("follow", "true")) not in {"false", "False"}:
            case.query = (case.query or {}) | {"follow": "false"}  # else it would not come to an end
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
        headers = {name: value for name, value in prepared.headers.items() if name.lower() != "content-length"}
        content = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body
        answer = service.request(prepared.method, prepared.url, content=content, headers=headers)
        case.validate_response(answer, checks=held_against)

    ask()


async def test_the_service_does_what_its_document_says(tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> None:
    """Whatever it is asked: no fault of the server's, and no answer that the document does not know."""
    home = homes.Home(short_path, tiny_guest, gvproxy)
    try:
        home.init()
        await home.good("start")
        transport = httpx2.HTTPTransport(uds=str(next((short_path / "run").rglob("ovm.sock"))))
        with httpx2.Client(transport=transport, timeout=ANSWER_S, base_url="http://localhost") as service:
            document = service.get("/v1/openapi.json").json()
            schema = schemathesis.openapi.from_dict(document)
            operations = [found.ok() for found in schema.get_all_operations()]
            assert {operation.path for operation in operations} >= ENDS_IT
            for operation in operations:
                modes = [] if operation.path in ENDS_IT else [GenerationMode.POSITIVE]
                modes += [GenerationMode.NEGATIVE] if operation.body or operation.query else []
                for mode in modes:
                    await asyncio.to_thread(asks, service, operation, mode)
            assert service.get("/v1/status").json()["state"] != "VirtualMachineStateStopped"
            service.post("/v1/resume")
        await home.good("stop")
    finally:
        home.end()
