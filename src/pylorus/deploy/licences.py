"""What the licence of pretrained weights says about passing on a model that was trained from them.

A network that is trained from weights contains them. Where their licence forbids or limits passing them on, a model is
exported or signed only after whoever does so has accepted the licence by its name.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pylorus.core.errors import PylorusError
from pylorus.core.io import convert_to_plain
from pylorus.deploy.description import Description, Weights
from pylorus.deploy.verified_files import CARD, DESCRIPTION

ACCEPT_OPTION, ACCEPT_KEY = "--accept-licence", "deploy.accept_licence"
"""What accepts a licence at an export, and in training."""
FREE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "isc", "cc0-1.0", "cc-by-4.0", "unlicense")
"""Licences that let anyone pass on changed versions for any purpose, with the notice that they ask for."""

LIMITS = (
    (r"(.*-)?((by)?nc(nd|sa)?[\d.]*(-.*)?|non-?commercial(-.*)?)", "forbids commercial use"),
    (r"(.*-)?((by)?(nc)?nd[\d.]*(-.*)?|no-?deriv.*)", "forbids passing on changed versions"),
    (r"apple-amlr|(.*-)?research(-only)?(-.*)?", "allows research only"),
    (r"dinov3(-license)?", "allows passing on under the same licence only, with a copy of its text"),
)
"""Patterns of the names of licences that limit passing on, and what each limits."""


@dataclass(frozen=True)
class Terms:
    """What is known of a licence.

    Attributes:
        name: The licence as it is stated; None if none is.
        limits: What it forbids or asks for, as phrases; empty if it allows passing on, or is not known.
        is_known: Whether Pylorus knows whether it allows passing on.
    """

    name: str | None
    limits: tuple[str, ...]
    is_known: bool


def assess_licence(name: str | None) -> Terms:
    """Return what is known of a licence by its name, however it is spelled.

    Example:
        >>> assess_licence("CC BY-NC-ND 4.0").limits
        ('forbids commercial use', 'forbids passing on changed versions')
        >>> assess_licence("CC-BY-NC4.0").limits, assess_licence("CC BY/NC (4.0)").limits
        (('forbids commercial use',), ('forbids commercial use',))
        >>> assess_licence("apache-2.0"), assess_licence("seer-license").is_known
        (Terms(name='apache-2.0', limits=(), is_known=True), False)
    """
    plain = _normalize(name or "")
    limits = tuple(phrase for pattern, phrase in LIMITS if re.fullmatch(pattern, plain))
    return Terms(name, limits, bool(limits) or plain in FREE)


def _normalize(name: str) -> str:
    return re.sub(r"[^\w.]+|_", "-", name.lower()).strip("-")


def describe_limits(terms: Terms) -> str:
    """Return what a licence limits as the predicate of a sentence."""
    return " and ".join(terms.limits)


def format_terms(description: Description) -> str:
    """Return the sentences of a card on passing a model on, each after a space; "" if nothing has to be said."""
    networks = description.list_networks()
    return "".join(dict.fromkeys(_format_terms_of_weights(network.weights) for network in networks))


def _format_terms_of_weights(weights: Weights) -> str:
    terms = assess_licence(weights.licence)
    if weights.licence is None or weights.source == "none" or (terms.is_known and not terms.limits):
        return ""
    if not terms.is_known:
        return " Pylorus does not know whether it allows passing the model on: read its terms."
    if weights.accepted_licence is not None:
        return (
            f" It {describe_limits(terms)}. Whoever made this model or its export accepted this licence, and states "
            "that they may pass the model on."
        )
    return (
        f" It {describe_limits(terms)}. Nobody has accepted this licence yet: `pylorus export` and `pylorus sign` "
        "refuse the model until somebody does."
    )


def accept_licences(
    description: Description, contents: Mapping[str, bytes], accepted: Sequence[str]
) -> tuple[Description, Mapping[str, bytes]]:
    """Return what an exported model says, with the licences that whoever exports it accepts.

    Args:
        description: The bundle's description.
        contents: Its files of text, by name.
        accepted: Licences of its weights by their names; those of an ensemble may have several. Empty: the model stays
            as it is.

    Raises:
        PylorusError: If one is not a licence of the weights, or that licence needs no acceptance.
    """
    if not accepted:
        return description, contents
    changed = description
    for each in accepted:
        changed = _accept_in_description(changed, each)
    card, new_terms = contents[CARD].decode("utf-8"), format_terms(changed)
    old_terms = format_terms(description)
    card = card.replace(old_terms, new_terms) if old_terms in card else f"{card.rstrip()}\n\n{new_terms.strip()}\n"
    text = json.dumps(convert_to_plain(changed), ensure_ascii=False, indent=2)
    return changed, {**contents, DESCRIPTION: f"{text}\n".encode(), CARD: card.encode()}


def _accept_in_description(description: Description, accepted: str) -> Description:
    weights, ensemble = description.weights, description.ensemble
    if ensemble is None:
        check_acceptance(weights.licence, accepted, option=ACCEPT_OPTION)
        return replace(description, weights=_accept(weights, accepted))
    licences = [member.weights.licence for member in ensemble.members]
    limiting = [licence for licence in licences if assess_licence(licence).limits]
    named = [licence for licence in limiting if _normalize(licence or "") == _normalize(accepted)]
    check_acceptance([*named, *limiting, weights.licence][0], accepted, option=ACCEPT_OPTION)
    members = tuple(replace(member, weights=_accept(member.weights, accepted)) for member in ensemble.members)
    return replace(description, ensemble=replace(ensemble, members=members))


def _accept(weights: Weights, accepted: str) -> Weights:
    """Return weights with their licence as accepted, if it is the one that is accepted."""
    is_accepted = _normalize(weights.licence or "") == _normalize(accepted)
    return replace(weights, accepted_licence=weights.licence) if is_accepted else weights


def check_acceptance(licence: str | None, accepted: str, *, option: str) -> None:
    """Check that an accepted licence is that of the weights, and limits passing on.

    Raises:
        PylorusError: If not; the message says what to type.
    """
    terms = assess_licence(licence)
    if terms.limits and _normalize(accepted) == _normalize(licence or ""):
        return
    if not terms.limits:
        stated = f"under {licence}" if licence else "random, or no licence of them is stated"
        raise PylorusError(
            f"{option}: found {accepted}, but the weights that the training starts from are {stated}: there is nothing "
            "to accept. Leave it out."
        )
    raise PylorusError(f"{option}: found {accepted}, but the licence of the weights is {licence}.")


def check_passing_on(weights: Sequence[Weights], *, what: str, how: str) -> list[str]:
    """Check that a model may be passed on as far as the licences of its weights say.

    Args:
        weights: The initial weights of the network, or of each network.
        what: What is refused otherwise, such as "the export".
        how: How to accept a licence, as an imperative with {licence} in the place of its name.

    Returns:
        A warning for each licence that is not stated, or not known; empty if all allow it or are accepted.

    Raises:
        PylorusError: If a licence forbids or limits passing on, and was not accepted.
    """
    warnings: dict[str, None] = {}
    open_terms = [each for each in weights if each.source != "none" and each.accepted_licence is None]
    limiting = dict.fromkeys(each.licence for each in open_terms if assess_licence(each.licence).limits)
    for each in weights:
        terms = assess_licence(each.licence)
        if each.source == "none":
            continue
        name = "the pretrained weights" if each.source in ("hub", "factory") else f"the weights {each.source}"
        if not terms.is_known:
            found = (
                f"have the licence {each.licence}, which Pylorus does not know" if each.licence else "state no licence"
            )
            warnings[
                f"{name} that the training started from {found}: read their terms before you pass the model on."
            ] = None
        elif terms.limits and each.accepted_licence is None:
            options = f" {ACCEPT_OPTION} ".join(shlex.quote(str(licence)) for licence in limiting)
            raise PylorusError(
                f"{what} is refused: {name} that the training started from are under {each.licence}, which "
                f"{describe_limits(terms)}, and the model contains them. If you may pass it on, for example with the "
                f"owner's permission, {how.format(licence=options)}: the model's card then says so."
            )
    return list(warnings)
