"""The load benchmark's progress; its figures are judged beside the server, in test_serving.py."""

from __future__ import annotations

from hf_dspark.evaluation.load_benchmark import bench
from tests.costs import middling
from tests.helpers import NEVER, random_prompts
from tests.tiny import tiny_drafter, tiny_llama


def test_cells_are_handed_over_as_concurrencies_finish():
    """After each concurrency the record so far, complete but for what was not measured yet; turns are counted, the first one too."""
    target, records, turns = tiny_llama(), [], []
    record = bench(
        target, tiny_drafter(target), random_prompts((4, 6)), end_ids=[NEVER], pad_id=0, concurrencies=[1, 2], budgets=["plain", "full"],
        max_new_tokens=6, seconds=0.05, repeats=2, costs=middling(5), on_turn=lambda: turns.append(1),
        on_concurrency=lambda found: records.append([(cell["concurrency"], cell["budget"]) for cell in found["cells"]]),
    )  # fmt: skip
    assert records == [[(1, "plain"), (1, "full")], [(1, "plain"), (1, "full"), (2, "plain"), (2, "full")]]
    assert len(turns) == 2 * (2 + 1)
    assert [row["concurrency"] for row in record["summary"]] == [1, 2]
