import json

import pytest

from pylorus.core.errors import PylorusError
from pylorus.report.network_figure import (
    build_network_table,
    merge_similar_blocks,
    plot_network_structure,
    read_network_blocks,
)
from pylorus.runs.reading import read_run


def test_similar_blocks_are_merged_without_loss(make_run):
    run = read_run(make_run())
    blocks = read_network_blocks(run)
    told = merge_similar_blocks(blocks)
    assert [(block.name, block.type) for block in told] == [
        ("conv1", "Conv2d"),
        ("layer1.0–1", "2 × Bottleneck"),
        ("fc", "Linear"),
    ]
    assert sum(block.parameters for block in told) == sum(block.parameters for block in blocks)
    assert sum(block.layers for block in told) == sum(block.layers for block in blocks) == 9


def test_the_network_table_has_every_block_and_a_total(make_run):
    table = build_network_table(read_run(make_run()))
    assert [row.cells[0] for row in table.rows] == ["conv1", "layer1.0", "layer1.1", "fc", "all"]
    assert table.rows[-1].cells == ("all", "", 9, 160963, "", 6147, 160963)


def test_the_network_figure_states_what_was_trained(make_run):
    drawing = plot_network_structure(read_run(make_run()))
    assert "pretrain: 6,147 of 160,963 parameters trained" in drawing.alt
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert {"2 × Bottleneck", "256 × 56 × 56", "160,963"} <= set(texts)


def test_an_invalid_network_file_is_refused(make_run):
    run = make_run()
    (run / "network.json").write_text(json.dumps([{"name": "conv1"}]))
    with pytest.raises(PylorusError, match=r"network\.json: expected the format that a run writes"):
        read_network_blocks(read_run(run))
