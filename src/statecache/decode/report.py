"""What a call of `generate` did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# why a row ended: an end token, or an id of `stop`; a string of `stop`; `max_new_tokens`; or the stream was closed
Reason = Literal["end", "stop", "length", "closed"]


@dataclass(frozen=True)
class Report:
    """Counts of one call of `generate`, over all rows. A row's turn is its part in one forward pass of the model."""

    prompt: int  # tokens of the prompts
    tokens: int  # new ones
    forwards: int  # passes of the model; the first reads the prompts and gives each row its first token
    turns: int  # passes, counted for each row that took part
    drafted: int = 0  # tokens that the model checked
    accepted: int = 0  # of them
    rounds: int = 0  # turns with drafts
    assistant_forwards: int = 0
    compiled: int = 0  # of the passes, those that a captured graph or compiled code ran
    reasons: tuple[Reason, ...] = ()  # of each row

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a row for each pass it took part in: 1 without speculation."""
        return self.tokens / max(self.turns, 1)

    @property
    def accepted_per_round(self) -> float:
        """Drafted tokens kept in a turn with drafts."""
        return self.accepted / max(self.rounds, 1)

    @property
    def acceptance(self) -> float:
        """The part of the drafted tokens that was kept."""
        return self.accepted / max(self.drafted, 1)

    def __str__(self) -> str:
        text = f"{self.tokens} tokens in {self.forwards} forward passes, {self.tokens_per_forward:.2f} each"
        if self.drafted:
            text += f"; {self.accepted} of {self.drafted} drafted accepted, {self.accepted_per_round:.2f} a round"
        if self.assistant_forwards:
            text += f"; {self.assistant_forwards} draft passes"
        return text
