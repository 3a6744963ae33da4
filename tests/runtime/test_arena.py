"""The memory in which a rank leaves what it sends."""

from __future__ import annotations

import torch

from autopar.runtime.arena import FIRST_SEGMENT_BYTES, Arena

KB = 1 << 10


def test_the_lowest_free_room_is_taken() -> None:
    arena, read = Arena(), set[int]()
    places = [arena.take(64 * KB, k, read.__contains__) for k in range(4)]
    assert places == [0, 64 * KB, 128 * KB, 192 * KB]
    read.update({1, 3})  # the first and the third are not read by all yet
    assert arena.take(32 * KB, 4, read.__contains__) == 64 * KB
    assert arena.take(64 * KB, 5, read.__contains__) == 192 * KB
    assert arena.take(32 * KB, 6, read.__contains__) == 96 * KB


def test_what_is_left_behind_gives_its_pages_back_when_it_is_read() -> None:
    arena, read = Arena(), set[int]()
    arena.take(FIRST_SEGMENT_BYTES, 0, read.__contains__)
    small = arena.segment
    view = small.view(0, FIRST_SEGMENT_BYTES, torch.uint8)
    view.fill_(1)
    assert arena.held_bytes() == FIRST_SEGMENT_BYTES
    assert arena.take(64, 1, read.__contains__) == 0
    assert arena.segment is not small
    assert arena.segment.size == 2 * FIRST_SEGMENT_BYTES
    arena.segment.view(0, 64, torch.uint8).fill_(2)
    page = arena.segment.held_bytes()
    assert 64 <= page < 64 * KB  # of the larger one only what was written to
    assert arena.held_bytes() == FIRST_SEGMENT_BYTES + page
    assert bool((view == 1).all())  # a peer may still read it
    read.add(0)
    arena.take(64, 2, read.__contains__)
    assert small.held_bytes() == 0
    assert arena.held_bytes() == page
