"""``compiled.py`` can fail: what it says of rows that are doctored."""

import re

import pytest
from compiled import TABLE, assert_sound

from vitkernels.cli import _compiled

ROW = {
    **{"stem": "attention", "kernel": "_fwd_kernel", "arch": 90, "config": "N=197", "configs": ["N=197", "N=196"]},
    **{"registers": 168, "spill_bytes": 8, "spill_load_bytes": 12, "stack_bytes": 8, "local_loads": 3, "local_stores": 2},
    **{"shared_bytes": 4096, "shared_limit": 232448, "blocks_per_sm": 2},
    **{"has_dot": True, "mma": {"HMMA": 0, "HGMMA": 4, "tcgen05": 0}},
}
TABLE_OF_IT = {"attention sm_90 _fwd_kernel N=196": {"3.6": {"registers": 168, "spilled": 12, "blocks": 2}}}
NO_SPILL = {"spill_bytes": 0, "spill_load_bytes": 0}


def judge(triton, changes, **options):
    assert_sound([ROW, {**ROW, **changes}], table=TABLE_OF_IT, triton=triton, **options)


@pytest.mark.parametrize("triton", ["3.6.0", "3.6.1", "3.7.0"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**NO_SPILL, "stack_bytes": 0, "local_loads": 0, "local_stores": 0, "blocks_per_sm": 3},  # better than the table
        {"registers": 170},
        {"has_dot": False, "mma": {"HMMA": 0}},
    ],
)
def test_what_is_as_good_as_the_table_passes(changes, triton):
    judge(triton, changes, recorded=True)


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.0"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"spill_bytes": 68}, "spills 68 bytes, more than 64"),
        ({"spill_load_bytes": 68}, "spills 68 bytes, more than 64"),
        ({"shared_bytes": 232449}, "does not fit: 232449 bytes of shared memory, 168 registers"),
        ({"blocks_per_sm": 0}, "does not fit"),
        ({"mma": {"HMMA": 0, "HGMMA": 0, "tcgen05": 0}}, "multiplies matrices without tensor cores"),
        ({**NO_SPILL, "stack_bytes": 72}, "spills 72 bytes, more than 64"),  # an array of the compiler's
    ],
)
def test_what_holds_everywhere_is_asserted_of_every_version(changes, what, triton):
    with pytest.raises(AssertionError, match=rf"Triton 3\.\d:\n.*attention sm_90 _fwd_kernel N=197: {what}"):
        judge(triton, changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"spill_load_bytes": 16}, "spills 16 bytes, the table says 12"),
        ({**NO_SPILL, "stack_bytes": 16}, "spills 16 bytes, the table says 12"),
        ({"blocks_per_sm": 1}, "1 blocks fit an SM, the table says 2"),
        ({"configs": ["N=198"]}, "spills 12 bytes, the table says 0"),
    ],
)
def test_what_is_worse_than_the_table_fails_on_its_version_alone(changes, what):
    judge("3.7.0", changes, recorded=True)
    with pytest.raises(AssertionError, match=what):
        judge("3.6.0", changes)


def test_a_launch_of_the_default_run_has_to_be_in_the_table():
    with pytest.raises(AssertionError, match=r"N=198: is not in tests/compiled\.json"):
        judge("3.6.0", {"configs": ["N=198"]}, recorded=True)


def test_head_dims_of_no_workload_may_spill_more_where_the_version_is_not_listed():
    judge("3.7.0", {"spill_bytes": 68}, workloads=False)
    with pytest.raises(AssertionError, match="spills 68 bytes, the table says 12"):
        judge("3.6.0", {"spill_bytes": 68}, workloads=False)


def test_the_table_has_both_stacks_and_is_as_inspect_writes_it(tmp_path):
    table = _compiled.read(TABLE)
    floor = re.search(r"triton>=([\d.]+),", (TABLE.parent.parent / "pyproject.toml").read_text())[1]
    assert {version for entry in table.values() for version in entry} == {floor, "3.8"}
    both = [name for name, entry in table.items() if len(entry) == 2]
    assert len(both) > 0.9 * len(table)
    _compiled.write(tmp_path / "again.json", table)
    assert (tmp_path / "again.json").read_text() == TABLE.read_text()
