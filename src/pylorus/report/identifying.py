"""Whether the values of a manifest's column tell who a patient is: judged by the values, never by the column's name.

A report is passed on, so what may be a name must not stand in it. A column refused by mistake is listed with its
reason, and its user can write codes (site-1, device-2) in place of the values.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

SHARED_BY = 3
"""A column of codes that fewer patients than these share, on average, may number persons."""
MANY = 12
"""Distinct values beyond which a column of initials or codes may stand for persons."""
OWN = 0.5
"""A column is refused where at least this share of the patients has a value that no other patient has."""
SOME = 0.25
"""A column is refused where at least this share of its values holds a common name of persons."""

E_MAIL = re.compile(r"\S+@\S+\.\S+")
PHONE = re.compile(r"(\+|00?\s?[1-9]|\(0)[\d\s()/.-]{6,}")
DIGITS_OF_A_PHONE = 7
PERSON_NUMBER = re.compile(r"[A-Za-z]{0,6}[-_/ .]?\d{4,}")
YEAR = re.compile(r"(19|20)\d\d")
INITIALS = re.compile(r"[^\W\d_]\.?[ -]?[^\W\d_]\.?([ -]?[^\W\d_]\.?)?")
TITLED = re.compile(r"(dr|prof|mr|mrs|ms|herr|frau|sr|sra|mme)\b\.?\s+[^\W\d_]+", re.IGNORECASE)
SEPARATED = re.compile(r"[^\W\d_][^\W\d_'-]*(\^|,\s*)[^\W\d_][^\W\d_'. -]*")
"""Family name and given name, as DICOM (Weber^Anna) and lists (Weber, Anna) write them."""
HAN_NAME = re.compile(
    "[王李张刘陈杨赵吴周徐孙朱胡郭何林罗郑梁谢宋唐许邓冯韩曹曾彭萧蔡潘田董袁于余叶蒋杜苏魏程吕丁沈任姚卢傅钟崔]"
    "[\u4e00-\u9fff]{1,2}"
)
HAN_PLACE = re.compile("[院科部室市省区]$")

NO_PERSONS = (
    "hospital clinic klinik klinikum krankenhaus university universität center centre zentrum institute site "
    "department olympus fujifilm fujinon fuji pentax hoya storz evis exera lucera eluxeo optivista antrum corpus "
    "body fundus cardia angle incisura pylorus duodenum esophagus oesophagus stomach lesser greater curvature upper "
    "lower middle anterior posterior proximal distal wall north south east west white light narrow band imaging "
    "blue linked no not yes unknown high low medium mild moderate severe grade stage early advanced never former "
    "current smoker positive negative helicobacter pylori bank holiday day night left right"
)
"""Words that no name of a person holds: two capitalised words with one of these are none."""

NAMES = (
    "anna maria erika sabine monika petra ursula renate helga karin susanne andrea claudia stefanie katharina julia "
    "laura sarah lena michael thomas andreas peter wolfgang klaus jürgen hans dieter manfred günther stefan "
    "christian markus matthias alexander sebastian felix lukas jonas paul john james robert william david richard "
    "joseph charles daniel matthew anthony mary patricia jennifer linda elizabeth barbara susan jessica karen emily "
    "emma olivia jean pierre marie françois nicolas sophie josé juan carlos luis miguel ana carmen giuseppe "
    "giovanni francesca mehmet mustafa ahmet fatma ayşe mohammed muhammad ahmed fatima ali hassan ivan dmitri "
    "sergei olga natalia tatiana wei fang jing xiaoming hiroshi takashi yuki kenji müller mueller schmidt schneider "
    "fischer weber meyer meier maier wagner becker schulz hoffmann schäfer koch bauer richter wolf schröder neumann "
    "zimmermann krüger hofmann hartmann schmitt werner schmitz krause lehmann huber mayer mustermann smith johnson "
    "williams jones miller davis wilson taylor garcía garcia martínez martinez hernández lópez gonzález rodríguez "
    "pérez sánchez rossi ferrari bianchi dubois durand moreau ivanov petrov smirnov yılmaz kaya demir nguyen tran "
    "kim choi lee wang zhang chen liu yang huang zhao zhou tanaka suzuki takahashi watanabe yamamoto nakamura "
    "kobayashi singh kumar sharma patel khan"
)
"""Given and family names of several countries that are no other words; no list is complete, so shapes count too."""

_NO_PERSONS, _NAMES = frozenset(NO_PERSONS.split()), frozenset(NAMES.split())


def identifying_reason(values: NDArray[np.str_], group: NDArray[np.generic]) -> str | None:
    """Why a column of words or codes may tell who a patient is, without any of its values; None if it doesn't.

    Args:
        values: Of shape (images,), as text; empty where nothing is known.
        group: The patient of each image, of shape (images,).

    Example:
        >>> patients = np.arange(4)
        >>> identifying_reason(np.array(["Weber, Anna", "Klein, Max", "Koch, Eva", "Wolf, Jan"]), patients)
        'its values look like names of persons'
        >>> identifying_reason(np.array(["Olympus", "Olympus", "Fujifilm", "Fujifilm"]), patients)
    """
    known = values != ""
    distinct = sorted(set(values[known].tolist()))
    if not distinct:
        return None
    patients = len(set(group[known].tolist()))
    if _share(distinct, _is_e_mail) > 0:
        return "its values look like e-mail addresses"
    if _share(distinct, _is_phone) >= OWN:
        return "its values look like telephone numbers"
    if _look_like_names(distinct):
        return "its values look like names of persons"
    rarely_shared = patients < SHARED_BY * len(distinct)
    if rarely_shared and _share(distinct, _is_person_number) >= OWN:
        return "its values look like numbers of persons or cases"
    if rarely_shared and len(distinct) > MANY and _share(distinct, INITIALS.fullmatch) >= OWN:
        return "its values look like initials of persons"
    return None


def is_of_one_patient(values: NDArray[np.str_], group: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Whether each image's value is known and occurs in no other patient, of shape (images,).

    Args:
        values: Of shape (images,), as text; empty where nothing is known.
        group: The patient of each image, of shape (images,).
    """
    kinds, value = np.unique(values, return_inverse=True)
    patient = np.unique(group, return_inverse=True)[1]
    pairs = np.unique(np.stack([value, patient]), axis=1)
    alone = np.bincount(pairs[0], minlength=len(kinds)) == 1
    return np.asarray(alone[value] & (values != ""))


def is_nearly_unique(values: NDArray[np.str_], group: NDArray[np.generic]) -> bool:
    """Whether many patients have a value of their own: at least half of them, or values have two patients on average.

    Args:
        values: Of shape (images,), as text; empty where nothing is known.
        group: The patient of each image, of shape (images,).

    Example:
        >>> is_nearly_unique(np.array(["a", "b", "c", "c"]), np.arange(4))
        True
        >>> is_nearly_unique(np.array(["a", "c", "c", "c"]), np.arange(4))
        False
    """
    known = values != ""
    if not known.any():
        return False
    alone = is_of_one_patient(values, group)
    patients, distinct = len(set(group[known].tolist())), len(set(values[known].tolist()))
    return len(set(group[alone].tolist())) >= OWN * patients or (distinct > MANY and patients <= 2 * distinct)


def _share(distinct: Sequence[str], fits: Callable[[str], object]) -> float:
    return sum(bool(fits(value)) for value in distinct) / len(distinct)


def _is_e_mail(value: str) -> bool:
    return E_MAIL.fullmatch(value) is not None


def _is_phone(value: str) -> bool:
    return PHONE.fullmatch(value) is not None and sum(map(str.isdigit, value)) >= DIGITS_OF_A_PHONE


def _is_person_number(value: str) -> bool:
    return PERSON_NUMBER.fullmatch(value) is not None and YEAR.fullmatch(value) is None


def _look_like_names(distinct: Sequence[str]) -> bool:
    return _share(distinct, _is_name) >= OWN or _share(distinct, _holds_a_common_name) >= SOME


def _is_name(value: str) -> bool:
    """Whether a value has the shape of a person's name."""
    if HAN_NAME.fullmatch(value):
        return HAN_PLACE.search(value) is None
    words = value.replace("^", " ").replace(",", " ").split()
    if any(word.casefold().strip(".-") in _NO_PERSONS for word in words):
        return False
    if TITLED.fullmatch(value) or SEPARATED.fullmatch(value):
        return True
    plain = [word.replace(".", "").replace("-", "").replace("'", "") for word in words]
    return 2 <= len(words) <= 4 and all(word.isalpha() and word.istitle() for word in plain)


def _holds_a_common_name(value: str) -> bool:
    words = re.split(r"[\s,^.;_-]+", value.casefold())
    return any(word in _NAMES for word in words) and not any(word in _NO_PERSONS for word in words)
