"""The error of all modules that decode image files, and the format of file names in messages."""


class UnreadableImageError(ValueError):
    """A file that can't be decoded under the policy; the message says why, without the file's name."""


def format_path(path: object) -> str:
    r"""Return a path on one line, in characters that every terminal and text file accepts.

    Line breaks, control characters and bytes that are not UTF-8 are written as escapes.

    Example:
        >>> print(format_path("a\nb"))
        a\nb
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(path)
    )
