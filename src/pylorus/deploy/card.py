"""The model card: what a reader must know before the model is used, in Markdown."""

from pylorus.deploy.description import Description


def model_card(said: Description) -> str:
    """The text of MODEL_CARD.md."""
    return f"# {said.architecture}\n\n{said.intended_use}\n"
