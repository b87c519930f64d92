"""Keep patients out of reports and logs: redact paths and values, and detect columns of a manifest that may name them.

Names of folders and files may be those of patients. A column of a manifest is judged by its values and never by its
name; one that is rejected by mistake is listed with the reason, so that the user can replace its values by codes
(site-1, device-2).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

MANIFEST_PREFIX = "about/"
"""Prefix of the columns that come from the user's manifest, in the catalog and in prediction tables."""

HIDDEN_VALUE = "(not shown)"

PATH_KEYS = ("data.root", "data.manifest", "data.split_file", "resume")
"""Keys whose values are folders or files, even if they contain no slash."""

PATIENT_KEYS = ("data.test_values", "data.test_from")
"""Keys whose values may identify patients in a manifest."""

FOLD = "data.fold"

REGULAR_EXPRESSIONS = ("data.group",)
"""Keys whose values may look like paths but are not."""

MIN_PATIENTS_PER_CODE = 3
"""A column of codes may number persons if fewer patients than this share a code on average."""
MAX_CODES = 12
"""Number of distinct values above which a column of initials or codes may denote persons."""
MAX_UNIQUE_FRACTION = 0.5
"""A column is rejected if at least this fraction of the patients has a value that no other patient has."""
MAX_NAME_FRACTION = 0.25
"""A column is rejected if at least this fraction of its values contains a common personal name."""

E_MAIL = re.compile(r"\S+@\S+\.\S+")
PHONE = re.compile(r"(\+|00?\s?[1-9]|\(0)[\d\s()/.-]{6,}")
MIN_PHONE_DIGITS = 7
PERSON_NUMBER = re.compile(r"[A-Za-z]{0,6}[-_/ .]?\d{4,}")
YEAR = re.compile(r"(19|20)\d\d")
INITIALS = re.compile(r"[^\W\d_]\.?[ -]?[^\W\d_]\.?([ -]?[^\W\d_]\.?)?")
NAME_WITH_TITLE = re.compile(r"(dr|prof|mr|mrs|ms|herr|frau|sr|sra|mme)\b\.?\s+[^\W\d_]+", re.IGNORECASE)
NAME_WITH_SEPARATOR = re.compile(r"[^\W\d_][^\W\d_'-]*(\^|,\s*)[^\W\d_][^\W\d_'. -]*")
"""Family name and given name as written in DICOM (Weber^Anna) and in lists (Weber, Anna)."""
HAN_NAME = re.compile(
    "[王李张刘陈杨赵吴周徐孙朱胡郭何林罗郑梁谢宋唐许邓冯韩曹曾彭萧蔡潘田董袁于余叶蒋杜苏魏程吕丁沈任姚卢傅钟崔]"
    "[\u4e00-\u9fff]{1,2}"
)
HAN_PLACE = re.compile("[院科部室市省区]$")

IMPERSONAL_WORDS = (
    "hospital clinic klinik klinikum krankenhaus university universität center centre zentrum institute site "
    "department olympus fujifilm fujinon fuji pentax hoya storz evis exera lucera eluxeo optivista antrum corpus "
    "body fundus cardia angle incisura pylorus duodenum esophagus oesophagus stomach lesser greater curvature upper "
    "lower middle anterior posterior proximal distal wall north south east west white light narrow band imaging "
    "blue linked no not yes unknown high low medium mild moderate severe grade stage early advanced never former "
    "current smoker positive negative helicobacter pylori bank holiday day night left right"
)
"""Words that do not occur in personal names: two capitalised words that include one of these are not a name."""

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
"""Given and family names of several countries that have no other meaning; as no list is complete, shape counts too."""

_NO_PERSONS, _NAMES = frozenset(IMPERSONAL_WORDS.split()), frozenset(NAMES.split())


def redact_value(key: str, value: Any) -> Any:
    """Redact the value of a configuration key if it is a path or may identify a patient.

    Example:
        >>> redact_value("data.root", "/patients"), redact_value("seed", 3)
        ('(not shown)', 3)
        >>> redact_value("model.weights", "/home/w/vgg.pth")
        'vgg.pth'
    """
    if value is not None and key in (*PATH_KEYS, *PATIENT_KEYS):
        return HIDDEN_VALUE
    if key == FOLD and isinstance(value, str):  # a value of data.fold_column; otherwise it is a number
        return HIDDEN_VALUE
    if not isinstance(value, str) or key in REGULAR_EXPRESSIONS:
        return value
    if key == "model.weights":
        return PureWindowsPath(PurePosixPath(value).name).name
    return HIDDEN_VALUE if "/" in value or "\\" in value else value


def redact_override(word: str) -> str:
    """Redact the value of one override of the command line.

    Example:
        >>> redact_override("data.root=/patients"), redact_override("optimizer.lr=0.1")
        ('data.root=(not shown)', 'optimizer.lr=0.1')
    """
    key, equals, value = word.partition("=")
    name, value = key.lstrip("+~"), value.strip("'\"")
    return f"{key}{equals}{redact_value(name, int(value) if name == FOLD and value.isdecimal() else value)}"


def redact_overrides(words: Sequence[str]) -> list[str]:
    """Redact the overrides of a command line, including a fold that is a value of data.fold_column."""
    by_column = any(word.startswith("data.fold_column=") for word in words)
    return [
        f"{FOLD}={HIDDEN_VALUE}" if by_column and word.startswith(f"{FOLD}=") else redact_override(word)
        for word in words
    ]


def format_redacted_yaml(config: DictConfig, *, names: bool) -> str:
    """Format a configuration as YAML.

    Args:
        config: The configuration.
        names: Whether to keep the names of files and folders and the values that may identify patients.
    """
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return OmegaConf.to_yaml(plain if names else _redact_values(plain, ""))


def collect_config_values(config: DictConfig) -> dict[str, Any]:
    """Return every value of a configuration by its dotted key."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return dict(_iter_config_values(plain, ""))


def _iter_config_values(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _iter_config_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _redact_values(values: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
    return {
        name: _redact_values(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else [redact_value(f"{prefix}{name}", item) for item in value]
        if isinstance(value, list)
        else redact_value(f"{prefix}{name}", value)
        for name, value in values.items()
    }


def find_identifying_reason(values: NDArray[np.str_], group: NDArray[np.generic]) -> str | None:
    """Explain why a column may identify patients, without quoting its values; return None if it does not.

    Args:
        values: Value of each image as text, of shape (images,); empty if unknown.
        group: Patient of each image, of shape (images,).

    Example:
        >>> patients = np.arange(4)
        >>> find_identifying_reason(np.array(["Weber, Anna", "Klein, Max", "Koch, Eva", "Wolf, Jan"]), patients)
        'its values look like personal names'
        >>> find_identifying_reason(np.array(["Olympus", "Olympus", "Fujifilm", "Fujifilm"]), patients)
    """
    known = values != ""
    distinct = sorted(set(values[known].tolist()))
    if not distinct:
        return None
    patients = len(set(group[known].tolist()))
    if _compute_match_fraction(distinct, _is_e_mail) > 0:
        return "its values look like e-mail addresses"
    if _compute_match_fraction(distinct, _is_phone) >= MAX_UNIQUE_FRACTION:
        return "its values look like telephone numbers"
    if _has_personal_names(distinct):
        return "its values look like personal names"
    rarely_shared = patients < MIN_PATIENTS_PER_CODE * len(distinct)
    if rarely_shared and _compute_match_fraction(distinct, _is_person_number) >= MAX_UNIQUE_FRACTION:
        return "its values look like patient or case numbers"
    if (
        rarely_shared
        and len(distinct) > MAX_CODES
        and _compute_match_fraction(distinct, INITIALS.fullmatch) >= MAX_UNIQUE_FRACTION
    ):
        return "its values look like personal initials"
    return None


def is_of_one_patient(values: NDArray[np.str_], group: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return, for each image, whether its value is known and occurs in no other patient; of shape (images,).

    Args:
        values: Value of each image as text, of shape (images,); empty if unknown.
        group: Patient of each image, of shape (images,).
    """
    distinct, value = np.unique(values, return_inverse=True)
    patient = np.unique(group, return_inverse=True)[1]
    pairs = np.unique(np.stack([value, patient]), axis=1)
    has_one_patient = np.bincount(pairs[0], minlength=len(distinct)) == 1
    return np.asarray(has_one_patient[value] & (values != ""))


def is_nearly_unique(values: NDArray[np.str_], group: NDArray[np.generic]) -> bool:
    """Return whether many patients have a value of their own.

    That is at least half of the patients, or, with many distinct values, at most two patients per value on average.

    Args:
        values: Value of each image as text, of shape (images,); empty if unknown.
        group: Patient of each image, of shape (images,).

    Example:
        >>> is_nearly_unique(np.array(["a", "b", "c", "c"]), np.arange(4))
        True
        >>> is_nearly_unique(np.array(["a", "c", "c", "c"]), np.arange(4))
        False
    """
    known = values != ""
    if not known.any():
        return False
    is_alone = is_of_one_patient(values, group)
    patients, distinct = len(set(group[known].tolist())), len(set(values[known].tolist()))
    return len(set(group[is_alone].tolist())) >= MAX_UNIQUE_FRACTION * patients or (
        distinct > MAX_CODES and patients <= 2 * distinct
    )


def _compute_match_fraction(distinct: Sequence[str], is_match: Callable[[str], object]) -> float:
    return sum(bool(is_match(value)) for value in distinct) / len(distinct)


def _is_e_mail(value: str) -> bool:
    return E_MAIL.fullmatch(value) is not None


def _is_phone(value: str) -> bool:
    return PHONE.fullmatch(value) is not None and sum(map(str.isdigit, value)) >= MIN_PHONE_DIGITS


def _is_person_number(value: str) -> bool:
    return PERSON_NUMBER.fullmatch(value) is not None and YEAR.fullmatch(value) is None


def _has_personal_names(distinct: Sequence[str]) -> bool:
    return (
        _compute_match_fraction(distinct, _is_name) >= MAX_UNIQUE_FRACTION
        or _compute_match_fraction(distinct, _has_common_name) >= MAX_NAME_FRACTION
    )


def _is_name(value: str) -> bool:
    """Return whether a value has the shape of a personal name."""
    if HAN_NAME.fullmatch(value):
        return HAN_PLACE.search(value) is None
    words = value.replace("^", " ").replace(",", " ").split()
    if any(word.casefold().strip(".-") in _NO_PERSONS for word in words):
        return False
    if NAME_WITH_TITLE.fullmatch(value) or NAME_WITH_SEPARATOR.fullmatch(value):
        return True
    plain = [word.replace(".", "").replace("-", "").replace("'", "") for word in words]
    return 2 <= len(words) <= 4 and all(word.isalpha() and word.istitle() for word in plain)


def _has_common_name(value: str) -> bool:
    words = re.split(r"[\s,^.;_-]+", value.casefold())
    return any(word in _NAMES for word in words) and not any(word in _NO_PERSONS for word in words)
