"""Which rows begin with the same blocks."""

from __future__ import annotations

import numpy as np

from octavo.runner.prefixes import PrefixFinder
from octavo.sched.plan import RowAdmission, StepPlan
from octavo.types import EngineRequest, SamplingParams

BLOCK = 16
HEAD = list(range(1000, 1128))  # 128 blocks


def admit(finder: PrefixFinder, tables: dict[int, list[int]]) -> None:
    request = EngineRequest(
        request_id=1,
        prompt_token_ids=(5, 6),
        params=SamplingParams(max_tokens=None),
        max_total_len=9,
        seed=0,
    )
    entries = [(row, col, b) for row, table in tables.items() for col, b in enumerate(table)]
    rows, cols, ids = np.array(entries, np.int32).T
    finder.update(
        StepPlan.of_changes(
            admitted=tuple(RowAdmission(row, request) for row in tables),
            block_rows=rows,
            block_cols=cols,
            block_ids=ids,
        )
    )


def make(tables: dict[int, list[int]]) -> PrefixFinder:
    finder = PrefixFinder(64, 256, BLOCK)
    admit(finder, tables)
    return finder


def rows_of(*rows: int) -> np.ndarray:
    return np.array(rows, np.int32)


def test_finds_the_common_head() -> None:
    tables = {row: [*HEAD, 10 * row + 1, 10 * row + 2] for row in range(16)}
    tables[3] = [77, 78]
    found = make(tables).find(np.arange(16, dtype=np.int32))
    assert found is not None
    assert found.length == 128 * BLOCK
    assert found.row in tables
    assert found.row != 3
    assert found.members.tolist() == [row != 3 for row in range(16)]


def test_the_last_block_is_never_shared() -> None:
    found = make(dict.fromkeys(range(16), HEAD)).find(np.arange(16, dtype=np.int32))
    assert found is not None
    assert found.length == 127 * BLOCK


def test_takes_the_length_that_saves_most() -> None:
    """Twelve rows share 128 blocks, four more only the first two."""
    tables = {row: [*HEAD, 10 * row + 1] for row in range(12)}
    tables |= {row: [*HEAD[:2], 10 * row + 1] for row in range(12, 16)}
    found = make(tables).find(np.arange(16, dtype=np.int32))
    assert found is not None
    assert found.length == 128 * BLOCK
    assert found.members.tolist() == [True] * 12 + [False] * 4


def test_nothing_in_common_or_too_little() -> None:
    everyone = np.arange(16, dtype=np.int32)
    assert make({row: [row + 1, row + 100] for row in range(16)}).find(everyone) is None
    assert make({row: [*HEAD[:4], row + 1] for row in range(16)}).find(everyone) is None
    few = make({row: [*HEAD, row + 1] for row in range(4)})
    assert few.find(rows_of(0, 1, 2, 3)) is None


def test_forgets_a_row_s_former_tenant() -> None:
    finder = make({row: [*HEAD, 10 * row + 1] for row in range(16)})
    everyone = np.arange(16, dtype=np.int32)
    assert finder.find(everyone) is not None
    admit(finder, {row: [HEAD[0], 500 + row] for row in range(12)})
    assert finder.find(everyone) is None
