"""How an instruction and a text become one prompt (docs/method.md §2)."""

from __future__ import annotations

DEFAULT_TEMPLATE = "Instruct: {instruction}\nQuery:{text}"


def check_template(template: str) -> None:
    """Raises ValueError unless `template` is a string that holds {instruction} and {text} once each."""
    if not isinstance(template, str) or template.count("{instruction}") != 1 or template.count("{text}") != 1:
        raise ValueError(
            f"prompt_template: got {template!r}, expected a string with {{instruction}} and {{text}} once each"
        )


def format_query(instruction: str | None, text: str, template: str = DEFAULT_TEMPLATE) -> str:
    """The prompt of a text under an instruction; the bare text when there is none (None or "").

    Braces in the instruction or the text are ordinary characters.
    """
    if not instruction:
        return text
    before, after = template.split("{text}")
    # the two halves are filled apart, so that a text that says "{instruction}" stays as it is
    return before.replace("{instruction}", instruction) + text + after.replace("{instruction}", instruction)


def is_symmetric(instruction: str | None) -> bool:
    """Whether passages carry the instruction too. In every task but retrieval they do (docs/method.md §2)."""
    lowered = (instruction or "").lower()
    return not ("retrieve" in lowered and "semantic" not in lowered)
