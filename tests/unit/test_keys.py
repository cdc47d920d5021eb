"""The keys of a machine."""

from __future__ import annotations

import asyncssh
import pytest

from ovm.errors import FileError
from ovm.guest.ssh import make_keys
from ovm.paths import KeyPaths, public


def test_keys_are_private_and_belong_together(tmp_path):
    """Both keys are ed25519, 0600 in a 0700 directory, each with its own public half."""
    keys = KeyPaths(tmp_path / "a" / "keys")
    make_keys(keys)
    assert keys.directory.stat().st_mode & 0o777 == 0o700
    for path in (keys.user_key, keys.host_key):
        assert path.stat().st_mode & 0o777 == 0o600
        private, its_public = asyncssh.read_private_key(path), asyncssh.read_public_key(public(path))
        assert private.get_algorithm() == "ssh-ed25519"
        assert private.convert_to_public() == its_public
    assert keys.user_key.read_bytes() != keys.host_key.read_bytes()


def test_keys_are_made_once(tmp_path):
    """A second call changes nothing: a guest that knows the key stays reachable."""
    keys = KeyPaths(tmp_path)
    make_keys(keys)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_keys(keys)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"ovm", "ovm.pub", "host_key", "host_key.pub"}


@pytest.mark.parametrize("lost", ["ovm", "ovm.pub"])
def test_half_a_pair_is_made_anew(tmp_path, lost):
    """A key that lost its other half is replaced as a pair, and the other pair is kept."""
    keys = KeyPaths(tmp_path)
    make_keys(keys)
    host_key = keys.host_key.read_bytes()
    (tmp_path / lost).unlink()
    make_keys(keys)
    private = asyncssh.read_private_key(keys.user_key)
    assert private.convert_to_public() == asyncssh.read_public_key(public(keys.user_key))
    assert keys.host_key.read_bytes() == host_key


def test_an_open_directory_is_closed(tmp_path):
    """A key directory that others could read is closed to them."""
    tmp_path.chmod(0o755)
    make_keys(KeyPaths(tmp_path))
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_no_place_for_keys_is_a_file_error(tmp_path):
    """Where no directory can be made, the error says so."""
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="keys cannot be created: Not a directory"):
        make_keys(KeyPaths(tmp_path / "file" / "keys"))
