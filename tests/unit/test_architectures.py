"""The processors that guests run on, by their names."""

from __future__ import annotations

import pytest

from ovm.disks import kernel
from ovm.model.architectures import ARCHITECTURES, find, of


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("x86_64", ("x86_64", "amd64", "x86_64", "qemu-system-x86_64")),
        ("AMD64", ("x86_64", "amd64", "x86_64", "qemu-system-x86_64")),
        ("aarch64", ("aarch64", "arm64", "arm64", "qemu-system-aarch64")),
        ("arm64", ("aarch64", "arm64", "arm64", "qemu-system-aarch64")),
    ],
)
def test_an_architecture_is_found_by_each_of_its_names(name, names):
    """Whoever names it, the machine, Debian's, the kernel's and QEMU's names are those of one processor."""
    found = find(name)
    assert found is not None
    assert (found.machine, found.debian, found.kernel, found.qemu) == names
    assert of(found.machine) is found


def test_another_architecture_is_not_found():
    """No guest runs on a processor that the table does not have."""
    assert find("riscv64") is None


def test_each_architecture_has_a_form_of_kernel():
    """The table and the forms of kernels know the same processors."""
    assert {one.kernel for one in ARCHITECTURES} == kernel.FORMS.keys()
