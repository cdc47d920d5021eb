"""``ovm start`` where there is no guest image yet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from ovm import cli
from ovm.errors import HelperError, OptionError


async def found() -> None:
    """A gvproxy."""


async def missing() -> None:
    """No gvproxy."""
    raise HelperError("gvproxy is not on this machine")


def test_nothing_is_built_without_a_gvproxy(monkeypatch, tmp_path, capsys):
    """The first start fails at once where the machine could not run, not after minutes of building an image."""
    monkeypatch.setenv("OVM_HOME", str(tmp_path))
    monkeypatch.setattr("ovm.host.programs.find_gvproxy", missing)
    monkeypatch.setattr("ovm.image.build_image", lambda *_args, **_more: pytest.fail("an image was built"))
    monkeypatch.setattr("ovm.image.pull_image", lambda *_args, **_more: pytest.fail("an image was fetched"))
    with pytest.raises(SystemExit):
        cli.main(["--progress", "plain", "start"])
    assert "gvproxy is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "released", "how"),
    [("linux", False, "build"), ("linux", True, "pull"), ("darwin", True, "pull"), ("darwin", False, "pull")],
)
def test_first_start_comes_by_an_image(monkeypatch, tmp_path, platform, released, how):
    """A released one is fetched; else it is built where that can be done, and elsewhere the pull says what to do."""
    done: list[str] = []

    def way(name: str) -> Callable[..., Awaitable[None]]:
        async def go(*_options: object, progress: object) -> None:
            done.append(name)
            raise OptionError("far enough")

        return go

    monkeypatch.setenv("OVM_HOME", str(tmp_path))
    monkeypatch.setattr("ovm.cli.start.sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr("ovm.registry.images.is_released", lambda _arch: released)
    monkeypatch.setattr("ovm.image.build_image", way("build"))
    monkeypatch.setattr("ovm.image.pull_image", way("pull"))
    monkeypatch.setattr("ovm.host.programs.find_gvproxy", found)
    with pytest.raises(SystemExit):
        cli.main(["--progress", "plain", "start"])
    assert done == [how]
