"""The table of ranks and errors: sums over blocks."""

from __future__ import annotations

import math

from lorabooth.adapters.rank_table import RankRow, RankTable

TABLE = RankTable(
    (
        RankRow("text_encoder.text_model.encoder.layers.0.mlp.fc1", 1, (4, 4), (2, 2), 0.0, 0.0),
        RankRow("denoiser.up_blocks.10.attentions.0.to_q", 1, (4, 4), (1, 1), 3.0, 3.0),
        RankRow("denoiser.up_blocks.2.attentions.0.to_q", 1, (4, 4), (1, 1), 1.0, 0.0),
        RankRow("denoiser.up_blocks.2.attentions.1.to_q", 1, (8, 8), (3, 3), 4.0, 1.0),
        RankRow("denoiser.conv_in", 1, (1, 1), (1, 1), 1.0, 0.5),
    )
)


def test_blocks_come_in_the_networks_order_and_add_up():
    blocks = TABLE.blocks()
    assert [row.name for row in blocks] == ["conv_in", "up_blocks.2", "up_blocks.10", "text_encoder"]
    both = blocks[1]
    assert (both.modules, both.old_ranks, both.new_ranks) == (2, (4, 8), (1, 3))
    assert math.isclose(both.relative_error, 1 / math.sqrt(17))
    assert math.isclose(TABLE.total.relative_error, math.sqrt((9 + 1 + 0.25) / (9 + 1 + 16 + 1)))


def test_nothing_of_nothing_is_no_error_and_json_has_no_infinity():
    assert TABLE.blocks()[3].relative_error == 0
    assert RankRow("denoiser.conv_in", 1, (1, 1), (1, 1), 0.0, 2.0).relative_error == math.inf
    assert RankRow("denoiser.conv_in", 1, (1, 1), (1, 1), 0.0, 2.0).to_dict()["relative_error"] is None
    assert [row["name"] for row in TABLE.to_dict()["modules"]] == [row.name for row in TABLE.rows]
