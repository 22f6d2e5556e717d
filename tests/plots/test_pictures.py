"""Any array to bytes: the range is read from the numbers, the channels from the shape."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tracin.errors import DataError
from tracin.plots.pictures import as_picture, as_shown, png_bytes

RAMP = np.array([[0, 1], [2, 4]])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RAMP.astype(np.uint8), [[0, 1], [2, 4]]),
        (RAMP * 60, [[0, 60], [120, 240]]),
        (RAMP * 4, [[0, 64], [128, 255]]),
        (RAMP / 4.0, [[0, 64], [128, 255]]),
        (RAMP / 2.0 - 1.0, [[0, 64], [128, 255]]),
        (RAMP * 100.0 - 7.0, [[0, 64], [128, 255]]),
        (RAMP > 1, [[0, 0], [255, 255]]),
        (RAMP.astype(np.float16) / 4, [[0, 64], [128, 255]]),
        (np.full((2, 2), 7.0), [[128, 128], [128, 128]]),
        (np.array([[np.nan, 0.0], [1.0, np.inf]]), [[0, 0], [255, 255]]),
    ],
)
def test_the_range_is_read_from_the_numbers(array, expected):
    assert as_picture(array).tolist() == expected


def test_channels_may_come_first_or_last_and_one_channel_is_grey():
    colour = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    assert np.array_equal(as_picture(colour), colour)
    assert np.array_equal(as_picture(np.moveaxis(colour, 2, 0)), colour)
    assert as_picture(colour[..., :1]).shape == (5, 6)
    assert as_picture(colour[..., 0][None]).shape == (5, 6)
    assert as_picture(np.zeros((3, 4, 4))).shape == (4, 4, 3)
    assert as_picture(np.zeros((4, 4, 4))).shape == (4, 4, 3)


def test_opacity_is_laid_over_white():
    pixel = np.array([[[100, 0, 0, 0]], [[100, 0, 0, 255]]], dtype=np.uint8)
    assert as_picture(pixel).tolist() == [[[255, 255, 255]], [[100, 0, 0]]]


@pytest.mark.parametrize("shape", [(5, 5, 2), (0, 4), (2, 3, 4, 5)])
def test_a_shape_that_is_no_picture_is_refused(shape):
    with pytest.raises(DataError, match="picture"):
        as_picture(np.zeros(shape))


def test_an_array_that_holds_no_numbers_is_refused():
    with pytest.raises(DataError, match="real numbers"):
        as_picture(np.array([["a", "b"]]))


@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)))
@example(np.array([[np.finfo(np.float64).max, -1e292]]))
@example(np.array([[np.finfo(np.float64).max, np.finfo(np.float64).min, 0.0]]))
def test_any_numbers_at_all_make_a_picture(array):
    picture = as_picture(array)
    assert picture.dtype == np.uint8
    assert picture.shape == array.shape


@given(
    hnp.arrays(np.uint8, st.sampled_from([(1, 1), (3, 5), (7, 2), (4, 4, 3), (1, 6, 3)])),
)
def test_a_png_reads_back_bit_for_bit(picture):
    images = pytest.importorskip("PIL.Image")
    with images.open(BytesIO(png_bytes(picture))) as image:
        assert np.array_equal(np.asarray(image), picture)


def test_what_a_row_shows_may_be_a_tensor_a_text_a_table_or_numbers():
    assert as_shown(torch.zeros(1, 4, 4, dtype=torch.bfloat16)).shape == (4, 4)
    assert as_shown("a film <b>") == "a film <b>"
    assert as_shown({"age": torch.tensor(0.123456), 3: None}) == {"age": "0.1235", "3": ""}
    assert as_shown(torch.tensor([0.5, 2.0])) == "0.5, 2"
    assert as_shown(np.float32(1.5)) == "1.5"
