"""Frames of a video, one every so many seconds, decoded one after another."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from pylorus.data.image import MOST_PIXELS, RGB
from pylorus.data.unreadable import UnreadableImageError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".webm")


def frames(path: Path, *, every: float) -> Iterator[tuple[float, RGB]]:
    """The frames of a video nearest after 0, `every`, 2 × `every`, … seconds, each with its own second.

    Args:
        path: Of the file.
        every: Seconds from one frame to the next, > 0.

    Raises:
        UnreadableImageError: If it is no video, or holds no frame.
    """
    # A file may be a list of addresses: nothing but files is opened.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    video = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise UnreadableImageError("no video that OpenCV can read")
        if video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MOST_PIXELS:
            raise UnreadableImageError(f"its frames are over the limit of {MOST_PIXELS:,} pixels")
        wanted, found = 0, 0
        while video.grab():
            second = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if second < wanted * every - 1e-6:
                continue
            whole, frame = video.retrieve()
            if whole:
                found += 1
                yield round(second, 3), np.ascontiguousarray(frame[:, :, ::-1])
            wanted = max(wanted, int(second / every + 1e-6)) + 1
        if not found:
            raise UnreadableImageError("a video without a frame")
    finally:
        video.release()
