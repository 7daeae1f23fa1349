"""The layout operations, against indices written out."""

import torch
from layout import as_token, group_interleaved_qkv, group_qkv, group_stacked_qkv, keep, pad_rows, stack_rows


def test_grouped_queries_stand_before_their_key_and_value() -> None:
    # Four query heads, two groups, two channels: a row is named by its head.
    query = torch.tensor([10, 10, 11, 11, 12, 12, 13, 13])[:, None]
    key, value = torch.tensor([20, 20, 21, 21])[:, None], torch.tensor([30, 30, 31, 31])[:, None]
    fused = group_qkv(4, 2).pack(query, key, value)
    assert fused[::2, 0].tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


def test_stacked_projections_are_interleaved_by_head() -> None:
    qkv = torch.arange(12)  # two heads of two channels: q 0..3, k 4..7, v 8..11
    assert group_stacked_qkv(2).pack(qkv).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_even_channels_of_queries_and_keys_go_before_odd_ones() -> None:
    # Four query heads, two groups, six channels: a row is named by its head and its channel.
    query = torch.tensor([10 * head + channel for head in (1, 2, 3, 4) for channel in range(6)])
    key, value = (
        torch.tensor([10 * head + channel for head in two for channel in range(6)]) for two in ((5, 6), (7, 8))
    )
    halves = [0, 2, 4, 1, 3, 5]
    wanted = []
    for heads, kept in (((1, 2, 5), 7), ((3, 4, 6), 8)):
        wanted += [10 * head + channel for head in heads for channel in halves]
        wanted += [10 * kept + channel for channel in range(6)]
    assert group_interleaved_qkv(4, 2).pack(query, key, value).tolist() == wanted


def test_rows() -> None:
    assert stack_rows.pack(torch.zeros(2, 3), torch.ones(2, 3))[:, 0].tolist() == [0, 0, 1, 1]
    padded = pad_rows(2, 4).pack(torch.ones(2, 3))
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert pad_rows(2, 2) is keep
    assert as_token.pack(torch.arange(3)).tolist() == [[[0, 1, 2]]]


def test_every_layout_goes_back() -> None:
    random = torch.Generator().manual_seed(0)
    for layout, shapes in (
        (keep, [(3, 2)]),
        (as_token, [(6,)]),
        (stack_rows, [(4, 2), (4, 2)]),
        (group_qkv(6, 2), [(24, 5), (8, 5), (8, 5)]),
        (group_qkv(6, 2), [(24,), (8,), (8,)]),
        (group_interleaved_qkv(6, 2), [(36, 5), (12, 5), (12, 5)]),
        (group_stacked_qkv(3), [(18, 6)]),
        (pad_rows(5, 8), [(5, 2)]),
    ):
        parts = [torch.randn(shape, generator=random) for shape in shapes]
        for found, part in zip(layout.unpack(layout.pack(*parts)), parts, strict=True):
            assert torch.equal(found, part), layout.name
