"""What happened in a history, kept cheaply and told only when a rule was broken."""

from collections import Counter
from enum import Enum

from shared.events import LoggedEvent, LoggedFence, LoggedNote


class Trace:
    """Lines of ``template.format(*arguments)``, made when they are read. Arguments must not change afterwards."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, tuple[object, ...]]] = []

    def __call__(self, template: str, *arguments: object) -> None:
        self._lines.append((template, arguments))

    def __str__(self) -> str:
        return "\n".join(template.format(*map(_told, arguments)) for template, arguments in self._lines)

    def kinds(self) -> Counter[str]:
        """How often each kind of thing happened. A line that begins with an argument and a colon is of that kind."""
        return Counter(
            _told(arguments[0]) if template.startswith("{}:") else template for template, arguments in self._lines
        )


def _told(argument: object) -> str:
    match argument:
        case Enum():
            return argument.name
        case LoggedFence(fence=fence):
            return f"fence {fence.nonce}"
        case LoggedEvent():
            end = "" if argument.completes is None else f", completes (key {argument.idempotency_key})"
            return (
                f"event {argument.event_id} of {argument.stream}: writer {argument.writer},"
                f" position {argument.position}, command {argument.command_offset}{end}"
            )
        case LoggedNote(note=note):
            noted = ", ".join(f"{each.command_id} {each.code}" for each in note.refusals)
            return f"note: writer {argument.writer}, position {argument.position}, {noted}"
        case _:
            return str(argument)
