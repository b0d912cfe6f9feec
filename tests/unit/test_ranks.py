from __future__ import annotations

from dynamo_ray.routing.ranks import Holder, Ranks

A, B, C = (Holder(name, 1, 0) for name in "abc")


def test_columns_are_dense_stay_and_are_used_again_from_the_lowest() -> None:
    ranks = Ranks()
    assert [ranks.add(holder) for holder in (A, B, C, B)] == [0, 1, 2, 1]
    version = ranks.version
    ranks.remove(B)
    ranks.remove(A)
    ranks.remove(A)
    assert ranks.version == version + 2
    assert (ranks.column(A), ranks.holder(0), ranks.holder(7), ranks.num_columns, len(ranks)) == (
        None,
        None,
        None,
        3,
        1,
    )
    later = [Holder(name, 1, 0) for name in "def"]
    assert [ranks.add(holder) for holder in later] == [0, 1, 3]
    assert ranks.in_mask(0b1101) == [later[0], C, later[2]]
    assert ranks.by_holder([(0b10, 3), (0b100000, 9)]) == {later[1]: 3}
