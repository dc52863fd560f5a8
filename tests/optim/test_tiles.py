"""Tiles are all elements of a tensor, each once, however large they are and however they are cut."""

import pytest
import torch

from hf_moe_ted.optim.tiles import split_into_tiles


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (5, 3), (2, 3, 4), (1, 9), (4, 1, 2), (0, 3)])
@pytest.mark.parametrize("tile_numel", [1, 2, 3, 4, 5, 6, 7, 12, 23, 24, 25])
def test_each_element_is_in_one_tile(shape: tuple[int, ...], tile_numel: int, is_flat: bool) -> None:
    first, second = torch.zeros(shape), torch.zeros(shape)
    if not is_flat and first.ndim == 2:
        second = torch.zeros(shape[::-1]).t()  # of other strides
    tiles = list(split_into_tiles([first, second], tile_numel, is_flat))
    for tile in tiles:
        assert tile[0].shape == tile[1].shape and 0 < tile[0].numel() <= tile_numel
        for view in tile:
            view += 1
    assert sum(tile[0].numel() for tile in tiles) == first.numel()
    torch.testing.assert_close([first, second], [torch.ones(shape)] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 15, 16, 17])
def test_flat_tiles_are_full_but_for_the_last(numel: int) -> None:
    sizes = [tile[0].numel() for tile in split_into_tiles([torch.zeros(1, numel)], 8, True)]
    assert sizes == [8] * (numel // 8) + [numel % 8] * (numel % 8 > 0)
