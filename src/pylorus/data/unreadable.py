"""The one error of the rooms that turn files into images, and how it writes a file's name."""


class UnreadableImageError(ValueError):
    """A file that gives no image under the policy; the message says why, without the file's name."""


def shown(path: object) -> str:
    r"""The name of a file or place on one line, in letters that every terminal and file takes.

    Line breaks, control characters and bytes that are no UTF-8 are written as escapes.

    Example:
        >>> print(shown("a\nb"))
        a\nb
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(path)
    )
