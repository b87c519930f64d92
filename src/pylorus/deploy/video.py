"""Decode frames of a video at regular intervals, one after another."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from pylorus.data.image import MOST_PIXELS, RGB
from pylorus.data.unreadable import UnreadableImageError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".webm")


def decode_frames(path: Path, *, every: float) -> Iterator[tuple[float, RGB]]:
    """Decode the first frame at or after 0, `every`, 2 × `every`, … seconds.

    Args:
        path: The video file.
        every: Seconds between two frames, > 0.

    Yields:
        The time of the frame in seconds, and the frame.

    Raises:
        UnreadableImageError: If the file is not a video, has frames that are too large, or contains no frames.
    """
    # A file may be a playlist of addresses: only local files may be opened.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    video = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise UnreadableImageError("not a video that OpenCV can read")
        if video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MOST_PIXELS:
            raise UnreadableImageError(f"its frames exceed the limit of {MOST_PIXELS:,} pixels")
        next_index, count = 0, 0
        while video.grab():
            second = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if second < next_index * every - 1e-6:
                continue
            is_decoded, frame = video.retrieve()
            if is_decoded:
                count += 1
                yield round(second, 3), np.ascontiguousarray(frame[:, :, ::-1])
            next_index = max(next_index, int(second / every + 1e-6)) + 1
        if not count:
            raise UnreadableImageError("a video without frames")
    finally:
        video.release()
