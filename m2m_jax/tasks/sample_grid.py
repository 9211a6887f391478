"""How much of a sample grid is computed at once: beside the state of training there is no room for all of it."""

PIXELS_AT_ONCE = 512 * 512


def pieces(count: int, image_size: int) -> list[slice]:
    """Of `count` images, which are made together: as many as have, in all, the pixels of one of 512 px a side."""
    at_once = max(PIXELS_AT_ONCE // image_size**2, 1)
    return [slice(start, start + at_once) for start in range(0, count, at_once)]
