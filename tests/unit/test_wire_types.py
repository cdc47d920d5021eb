"""Each thing has one type: the library returns it, and the service sends it."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import typing
from pathlib import Path

import msgspec
import pytest

import ovm.model
import ovm.service
from ovm.errors import HelperExited, OVMError
from ovm.model.events import EVENT_NAMES, Event, EventKind
from ovm.model.info import Health, Info, Stage
from ovm.model.ports import Forward
from ovm.model.results import ClockSync, ExecResult, Pruned
from ovm.model.states import StateInfo, VMState, state_info
from ovm.service.app import VERBS
from ovm.service.openapi import document
from ovm.service.protocol import Piece, Status, Stopped
from ovm.wire import codec

OF_THE_SERVICE = {Status, Stopped, Piece}
"""Answers that only a service has; the library returns none of them in another shape."""

PART_OF = {(Piece, ExecResult)}
"""A line of a stream has an exit status only if it is the last one; the result has collected all of them."""

PUBLISHED = {
    "InfoAnswer": Info,
    "State": StateInfo,
    "Health": Health,
    "Stage": Stage,
    "Synced": ClockSync,
    "PortOpen": Forward,
    "PrunedAnswer": Pruned,
    "Told": Event,
}
"""What OpenAPI clients call each type."""
REQUIRED = {
    "InfoAnswer": set(Info.__struct_fields__) - {"not_resumed"},
    "State": set(StateInfo.__struct_fields__),
    "Health": set(),
    "Stage": {"name", "ms"},
    "Synced": set(ClockSync.__struct_fields__),
    "PortOpen": set(Forward.__struct_fields__),
    "PrunedAnswer": set(Pruned.__struct_fields__),
    "Told": {"id", "name", "at"},
}

HEALTH = Health(problems=("the disk is full",), checked_at=7.5, data_size_bytes=10, host_free_bytes=3)
INFO = Info(
    podman_socket=Path("/run/podman.sock"),
    podman_port=None,
    ssh_port=2222,
    ssh_key=Path("/keys/id"),
    ssh_user="root",
    hypervisor="qemu",
    accelerator="kvm",
    accelerator_reason="/dev/kvm can be opened",
    cpus=2,
    memory_mib=1024,
    data_disk=Path("/disks/data.img"),
    log_dir=Path("/logs"),
    timings=(Stage("guard", 1.5), Stage("guest: ready", 9.0, 8.5)),
    health=HEALTH,
)
EXAMPLES = [
    HEALTH,
    INFO,
    Stage("guard", 1.5),
    state_info(VMState.PAUSED),
    ClockSync(3.0, 0.001, 0.0005),
    Forward(protocol="udp", host_address="127.0.0.1", host_port=5353, guest_port=53, purpose="container"),
    Pruned(removed={"images": 1}, freed_bytes={"images": 5}, trimmed_bytes=None, failures=("x: in use",)),
    ExecResult(3, b"out\n", b"\xff"),
    Event(4, "health", health=HEALTH, at=12.0),
    Event(5, "step", at=12.5, step="guard"),
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)


def structs(package) -> set[type[msgspec.Struct]]:
    """Every struct that a module of ``package`` defines."""
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if module.name != "__main__"
    ]
    return {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    }


@pytest.fixture(scope="module")
def of_the_service() -> set[type[msgspec.Struct]]:
    """Every struct of the service; importing its web server takes a while."""
    return structs(ovm.service)


def named_in(answer) -> set[type]:
    """The classes of which an answer consists."""
    inner = {kind for part in typing.get_args(answer) if part is not ... for kind in named_in(part)}
    return inner if typing.get_origin(answer) else {answer}


def test_the_service_answers_with_the_types_of_the_library():
    """Every answer is a type of ``ovm.model``, plain JSON, or one of the few types that only a service has."""
    answers = {kind for verb in VERBS if verb.answer is not None for kind in named_in(verb.answer)}
    assert answers - structs(ovm.model) == OF_THE_SERVICE | {str}


def test_nothing_has_a_second_type(of_the_service):
    """No struct of the service has all the fields of a type of the library."""
    twice = {
        (theirs, ours)
        for theirs in of_the_service
        for ours in structs(ovm.model)
        if {*ours.__struct_fields__} <= {*theirs.__struct_fields__}
    }
    assert twice == PART_OF


def test_openapi_clients_keep_their_names_and_fields():
    """The document calls each type as it always did, and requires of an answer what it always required."""
    schemas = document()["components"]["schemas"]
    for name, kind in PUBLISHED.items():
        schema = schemas[name]
        assert (schema["title"], set(schema["properties"])) == (name, set(kind.__struct_fields__))
        assert set(schema["required"]) == REQUIRED[name], name
        assert not [field for field in schema["required"] if "default" in schema["properties"][field]]
    assert set(schemas["Told"]["properties"]["name"]["enum"]) == {*EVENT_NAMES, "step"} == {*typing.get_args(EventKind)}
    assert schemas["Told"]["properties"]["error"]["anyOf"][0] == {"type": "object"}
    assert schemas["InfoAnswer"]["properties"]["podman_socket"] == {"type": "string"}


def test_every_reference_of_the_document_leads_somewhere():
    """A renamed schema is renamed wherever it is referred to."""
    whole = document()
    text = msgspec.json.encode(whole).decode()
    referred = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert referred <= set(whole["components"]["schemas"])
    assert set(PUBLISHED) <= referred


@each_example
def test_what_is_sent_is_what_arrives(example):
    """JSON of a type decodes to an equal object of that type."""
    assert codec.decode(codec.encode(example), type(example)) == example
    assert msgspec.json.decode(codec.encode(example)) == msgspec.json.decode(
        msgspec.json.encode(codec.builtins(example))
    )


@each_example
def test_copies_are_equal(example):
    """A pickle, a copy and a deep copy are equal to the original, and print as it does."""
    for other in (pickle.loads(pickle.dumps(example)), copy.copy(example), copy.deepcopy(example)):
        assert other == example
        assert repr(other) == repr(example)
        assert repr(other).startswith(f"{type(example).__name__}({example.__struct_fields__[0]}=")


@each_example
def test_none_can_be_changed(example):
    """Assigning to a field raises an AttributeError."""
    with pytest.raises(AttributeError):
        setattr(example, example.__struct_fields__[0], None)


def test_the_docker_host_is_that_of_the_podman_socket():
    """It is sent as a field, and follows the socket into a copy with another one."""
    assert INFO.docker_host == msgspec.json.decode(codec.encode(INFO))["docker_host"] == "unix:///run/podman.sock"
    other = msgspec.structs.replace(INFO, podman_socket=Path("/other.sock"))
    assert other.docker_host == "unix:///other.sock"


def test_an_error_arrives_with_its_evidence():
    """An event's error is sent as the object that it always was, and decodes to an error of the same class."""
    error = HelperExited(
        "qemu ended", hint="see its log", stage="guest", exit_reason="exit status 1", log_tail=("a", "b")
    )
    content = codec.encode(Event(1, "error", error, at=2.0))
    assert msgspec.json.decode(content) == {"id": 1, "name": "error", "error": error.as_dict(), "at": 2.0}
    arrived = codec.decode(content, Event).error
    assert type(arrived) is HelperExited
    assert arrived.as_dict() == error.as_dict()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Event, b'{"id": 1, "name": "error", "at": 1, "error": ["x"]}'),
        (Event, b'{"id": 1, "name": "error", "at": 1, "error": "x"}'),
        (Event, b'{"id": 1, "name": "error", "at": 1, "error": {"message": "x", "log_tail": 5}}'),
        (Event, b'{"id": 1, "name": "unheard of", "at": 1}'),
        (Path, b"7"),
        (list[Path], b'["/a", null]'),
    ],
)
def test_another_shape_is_a_decode_error(kind, content):
    """A path that is no string and an error that is no object are refused as any other wrong field is."""
    with pytest.raises(msgspec.DecodeError):
        codec.decode(content, kind)


def test_a_type_without_json_is_refused():
    """Nothing but paths and errors is made into JSON on the way: another type is a programming error."""
    with pytest.raises(NotImplementedError):
        codec.encode({"x": object()})
    with pytest.raises(TypeError):
        msgspec.json.schema(object, schema_hook=codec.schema)
    assert codec.schema(OVMError) == {"type": "object"}
