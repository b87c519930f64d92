"""Fingerprints: copies are found without the images, different images are not accused, the salt decides the codes."""

import io

import numpy as np
import pytest
from PIL import Image

from pylorus.data.fingerprints import (
    BITS,
    LEAST_AGREEMENT,
    create_fingerprints,
    find_matches,
    measure_agreements,
    measure_reconstruction,
)
from pylorus.data.image_facts import compute_facts
from pylorus.data.image_measures import THUMBNAIL_SIDE
from pylorus.data.synthetic import generate_image_set

SALT = bytes(range(32))


def columns(contents):
    facts = [compute_facts(content) for content in contents]
    thumbnails = [np.frombuffer(each.thumbnail, np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE) for each in facts]
    return [each.sha256 for each in facts], [each.pixels for each in facts], np.stack(thumbnails)


def encode(image, format="JPEG", **options):
    held = io.BytesIO()
    image.save(held, format=format, **options)
    return held.getvalue()


def crop(image, share):
    width, height = image.size
    box = (round(width * share), round(height * share), round(width * (1 - share)), round(height * (1 - share)))
    return image.crop(box)


def mirror(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


CHANGES = {
    "re-encoded": lambda image: encode(image, quality=60),
    "scaled": lambda image: encode(image.resize((image.width // 2, image.height // 2)), quality=75),
    "mirrored": lambda image: encode(mirror(image), quality=75),
    "cropped": lambda image: encode(crop(image, 0.05), quality=90),
    "cropped, mirrored, scaled": lambda image: encode(mirror(crop(image, 0.05)).resize((180, 180)), quality=60),
    "rotated": lambda image: encode(image.transpose(Image.Transpose.ROTATE_90), quality=90),
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("frames")
    generate_image_set(root, images=10, size=192, images_per_patient=1, seed=3)
    contents = [path.read_bytes() for path in sorted(root.rglob("*.*")) if path.suffix in (".jpg", ".png")]
    return contents, columns(contents)


@pytest.fixture(scope="module")
def development(frames):
    contents, (files, pixels, thumbnails) = frames
    return contents[:20], create_fingerprints(files[:20], pixels[:20], thumbnails[:20], salt=SALT)


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found(development, change):
    contents, fingerprints = development
    copies = [CHANGES[change](Image.open(io.BytesIO(each)).convert("RGB")) for each in contents[:4]]
    matches = find_matches(fingerprints, *columns(copies))
    assert [match.index for match in matches] == list(range(4))
    assert all(match.level == "near" and LEAST_AGREEMENT <= match.agreement <= BITS for match in matches)
    words = {"mirrored": "mirrored", "cropped, mirrored, scaled": "mirrored", "rotated": "rotated by"}
    assert all(words.get(change, "near copy") in match.description for match in matches)


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_whole_images_are_found_if_those_in_training_were_cropped(frames, share):
    contents, _ = frames
    cropped = [encode(crop(Image.open(io.BytesIO(each)).convert("RGB"), share), quality=90) for each in contents[:4]]
    fingerprints = create_fingerprints(*columns(cropped), salt=SALT)
    mirrored = [encode(mirror(Image.open(io.BytesIO(each)).convert("RGB"))) for each in contents[:4]]
    assert len(find_matches(fingerprints, *columns(contents[:4]))) == 4
    assert len(find_matches(fingerprints, *columns(mirrored))) == 4


def test_different_images_are_not_accused(frames, development):
    _, fingerprints = development
    files, pixels, thumbnails = frames[1]
    assert len(files) > 25
    assert not find_matches(fingerprints, files[20:], pixels[20:], thumbnails[20:])
    own = [measure_agreements(fingerprints, each) for each in thumbnails[:20]]
    assert all(sum(bits >= LEAST_AGREEMENT for bits in each.values()) == 1 for each in own)


def test_identical_files_and_pixels_are_told_apart(development):
    contents, fingerprints = development
    image = Image.open(io.BytesIO(contents[3])).convert("RGB")
    matches = find_matches(fingerprints, *columns([contents[5], encode(image, format="PNG")]))
    assert [(match.index, match.level) for match in matches] == [(0, "file"), (1, "pixels")]
    assert matches[0].description == "identical file"


def test_blank_images_match_only_as_identical_files(development):
    contents, _ = development
    blank = [encode(Image.new("RGB", (120, 120), (90, 60, 50)), quality=quality) for quality in (95, 50)]
    fingerprints = create_fingerprints(*columns([contents[0], blank[0]]), salt=SALT)
    assert len(fingerprints.files) == 2
    assert len(fingerprints.codes) == 1
    grey = encode(Image.new("RGB", (90, 120), (91, 61, 50)))
    assert [match.index for match in find_matches(fingerprints, *columns([grey, blank[0]]))] == [1]


def test_the_salt_changes_every_part_and_the_order_says_nothing(frames, development):
    contents, fingerprints = development
    table = [each[:20] for each in frames[1]]
    other = create_fingerprints(*table)
    assert other.salt != fingerprints.salt
    for name in ("files", "pixels", "codes"):
        rows = {row.tobytes() for row in getattr(fingerprints, name)}
        assert len(rows) == len(contents)
        assert not rows & {row.tobytes() for row in getattr(other, name)}
    backward = create_fingerprints(*(each[::-1] for each in table), salt=SALT)
    assert np.array_equal(backward.codes, fingerprints.codes)
    assert np.array_equal(backward.files, fingerprints.files)


def test_no_thumbnail_can_be_rebuilt_linearly(frames):
    middle, whole = measure_reconstruction(frames[1][2], salt=SALT)
    assert np.median(middle) < 0.8
    assert np.median(whole) < 0.5
