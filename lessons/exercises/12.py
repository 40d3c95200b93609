"""Exercise 12.  Write the functions, then run:  minilora check 12"""


def pager(accesses: list[tuple[int, bool]], frames: int) -> list[tuple[bool, int | None, bool]]:
    """What a pager does that has room for `frames` pages and puts out the least recently used one.

    Args: accesses: the page that is wanted, and whether it will be changed.
    Returns: for each access, whether the page was missing, which page left for it (None: there was room, or it was
        there), and whether the one that left had to be written back because it had been changed since it came.
    """
    raise NotImplementedError


def moment_bytes(size: int, state_bits: int) -> int:
    """Bytes of both of Adam's moments for a parameter of `size` elements.

    Args: state_bits: 32, or 8: then codes of one byte, and a float32 constant for every block of 256; parameters of fewer
        than 4,096 elements stay in float32.
    """
    raise NotImplementedError
