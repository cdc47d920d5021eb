"""What `make clients` counts, and what it writes down; the suites themselves need a machine and half an hour."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from suites import images, outcome, plan
from suites.plan import Known

SUITE = plan.SUITES[0]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_runs"/>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_known">
<failure message="500  Server&#10;Error"/></testcase>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_new"><error message="oh"/></testcase>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_hub"><skipped message="hub"/></testcase>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_old"><skipped message="old"/></testcase>
<testcase classname="tests.integration.api_exec_test.ExecTest" name="test_runs"><error message="torn"/></testcase>
</testsuite></testsuites>"""
OWN = (Known("docker-py::api_exec_test::ExecTest::test_known", "why"),)
HUB = (Known("docker-py::api_exec_test::ExecTest::test_hub", "hub"),)


@pytest.fixture
def ran(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    return [outcome.Ran(SUITE, outcome.outcomes(report, SUITE, "api_exec_test", HUB, OWN))]


def test_every_test_counts_once(ran):
    """As the worst that came of it: a tear-down that fails is a failure of its test."""
    verdicts = {found.test.rpartition("::")[2]: found.verdict for found in ran[0].outcomes}
    assert verdicts == {
        "test_runs": "ours",
        "test_known": "podman's own",
        "test_new": "ours",
        "test_hub": "left out",
        "test_old": "skipped",
    }
    assert next(found.said for found in ran[0].outcomes if found.verdict == "podman's own") == "500 Server Error"


def test_a_suite_that_died_has_no_passes(tmp_path):
    """Without a report there is nothing to count."""
    assert outcome.outcomes(tmp_path / "none.xml", SUITE, "api_exec_test", (), ()) == ()


def test_a_row_that_passes_is_named(ran):
    """So that the table of what is podman's own shrinks; a row whose tests were not run says nothing."""
    assert outcome.stale(ran, OWN) == []
    ran[0] = outcome.Ran(SUITE, (outcome.Outcome(OWN[0].test, "passed"),))
    assert outcome.stale(ran, (*OWN, Known("docker-py::other", "why"))) == [OWN[0].test]


def test_the_table_goes_between_its_marks(ran):
    """The rest of the page is people's."""
    page = f"above\n{outcome.BEGIN}\nold\n{outcome.END}\nbelow\n"
    told = outcome.placed(page, outcome.table(ran, "podman 5"))
    assert "| docker-py 7.2.0 | 7.0.0 | 0 | 1 | 2 | 1 | 1 |" in told
    assert "old" not in told
    assert told.startswith("above\n")
    assert told.endswith("below\n")
    with pytest.raises(ValueError, match="no <!--"):
        outcome.placed("another page", "text")


def test_the_tables_name_suites_that_there_are_and_nothing_twice():
    """Each row with a reason."""
    rows = (*plan.LEFT_OUT, *plan.PODMANS_OWN)
    assert len({row.test for row in rows}) == len(rows)
    modules = {f"{suite.client}::{module.rpartition('/')[2][:-3]}" for suite in plan.SUITES for module in suite.modules}
    assert {"::".join(row.test.split("::")[:2]) for row in rows} <= modules
    assert all(row.why for row in rows)


def test_a_row_speaks_of_whole_names():
    """A test whose name begins with another's is another test."""
    assert outcome.known("docker-py::a::B::test_one", [Known("docker-py::a::B", "why")])
    assert not outcome.known("docker-py::a::B::test_one_more", [Known("docker-py::a::B::test_one", "why")])


def test_an_image_refers_to_its_own_blobs():
    """By digest and size, as a registry checks it."""
    root = images.root_file_system()
    layer = images.compressed(root)
    config, manifest = images.packed(images.IMAGES[0], root, layer, "x86_64")
    described = json.loads(manifest.content)
    assert described["config"]["digest"] == config.digest
    assert described["layers"][0] == layer.described(images.LAYER_TYPE)
    assert json.loads(config.content)["rootfs"]["diff_ids"] == [images.Blob(root).digest]
    with tarfile.open(fileobj=io.BytesIO(root)) as tar:
        assert {"bin/sh", "usr/bin/top", "etc/passwd"} <= set(tar.getnames())
