"""Read MovieLens rating files as sessions: each user's rated items in order of time."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from mechcausal.studies.explanations.examples import PAD, Examples
from mechcausal.studies.explanations.sessions import FIRST_ITEM

_CSV_HEADER = ("userId", "movieId", "rating", "timestamp")
_FORMATS = "UserID::MovieID::Rating::Timestamp, comma-separated with a header, or tab-separated"


class RatingsError(ValueError):
    """A rating file that cannot be used; the message is one line that names it."""


@dataclass(frozen=True, eq=False)
class RatedSessions:
    """Every user's items, oldest first, cut into sessions; each user's last item is held out.

    Attributes:
        histories: tokens of every user's items, oldest first.
        item_ids: item id in the file, by `token - FIRST_ITEM`.
        length: items per session; PAD fills the front of shorter ones.
    """

    histories: tuple[tuple[int, ...], ...]
    item_ids: tuple[str, ...]
    length: int

    @property
    def vocab_size(self) -> int:
        """Number of tokens: PAD, MASK and the items."""
        return FIRST_ITEM + len(self.item_ids)

    def sample(self, n_sessions: int, generator: torch.Generator) -> Examples:
        """Sessions that end at a random item before a random user's last item."""
        users = self._draw(len(self.histories), n_sessions, generator)
        rows = []
        for user in users:
            history = self.histories[user]
            # The target lies between the second item and the last but one.
            rows.append((user, 1 + self._draw(len(history) - 2, 1, generator)[0]))
        return self._batch(rows, generator.device)

    def held_out(self, n_sessions: int, generator: torch.Generator) -> Examples:
        """Sessions with the last item of random users as target, at most one for each user."""
        order = torch.randperm(
            len(self.histories), generator=generator, device=generator.device
        ).tolist()
        rows = [(user, len(self.histories[user]) - 1) for user in order[:n_sessions]]
        return self._batch(rows, generator.device)

    def _batch(self, rows: list[tuple[int, int]], device: torch.device) -> Examples:
        items, targets = [], []
        for user, target in rows:
            history = self.histories[user]
            session = history[max(0, target - self.length) : target]
            items.append([PAD] * (self.length - len(session)) + list(session))
            targets.append(history[target])
        return Examples(torch.tensor(items, device=device), torch.tensor(targets, device=device))

    @staticmethod
    def _draw(below: int, n: int, generator: torch.Generator) -> list[int]:
        drawn: list[int] = torch.randint(
            below, (n,), generator=generator, device=generator.device
        ).tolist()
        return drawn


def load_ratings(path: str | Path, *, length: int = 12, most_items: int = 2000) -> RatedSessions:
    """Read `ratings.dat`, `ratings.csv` or `u.data`; the first line determines the format.

    A rating counts as an interaction whatever its value. Ratings with equal timestamps keep the
    file's order.

    Args:
        path: the file.
        length: items per session.
        most_items: how many of the most rated items to keep.

    Raises:
        RatingsError: the file is not readable, is no rating file, or holds too few ratings: at
            least one user with three items, and two different items, are needed.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RatingsError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RatingsError(f"{path}: not a text file in UTF-8") from None
    separator, start = _format(lines, path)
    by_user: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines[start:], start + 1):
        if line.strip():
            user, item, time = _rating(line, separator, f"{path}, line {number}")
            by_user.setdefault(user, []).append((time, item))
    counts = Counter(item for ratings in by_user.values() for _, item in ratings)
    ranked = [item for item, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))]
    tokens = {item: FIRST_ITEM + i for i, item in enumerate(ranked[:most_items])}
    histories = []
    for ratings in by_user.values():
        ratings.sort(key=lambda rating: rating[0])
        history = tuple(tokens[item] for _, item in ratings if item in tokens)
        if len(history) >= 3:
            histories.append(history)
    if not histories or len(tokens) < 2:
        raise RatingsError(
            f"{path}: {len(histories)} users with three ratings or more and {len(tokens)} items; "
            "at least one and two are needed"
        )
    return RatedSessions(tuple(histories), tuple(tokens), length)


def _format(lines: list[str], path: Path) -> tuple[str, int]:
    """The separator of the fields, and the first line with a rating."""
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise RatingsError(f"{path}: empty; {_FORMATS} is needed")
    for separator in ("::", "\t"):
        if separator in first:
            return separator, 0
    header = tuple(field.strip() for field in first.split(","))
    if header == _CSV_HEADER:
        return ",", lines.index(first) + 1
    raise RatingsError(f"{path}, line {lines.index(first) + 1}: {first[:60]!r} is not {_FORMATS}")


def _rating(line: str, separator: str, source: str) -> tuple[str, str, int]:
    fields = [field.strip() for field in line.split(separator)]
    if len(fields) != 4:
        raise RatingsError(f"{source}: {len(fields)} fields; user, item, rating, timestamp are 4")
    user, item, rating, time = fields
    if not user or not item:
        raise RatingsError(f"{source}: the {'item' if user else 'user'} is empty")
    try:
        float(rating)
        return user, item, int(float(time))
    except (ValueError, OverflowError):
        raise RatingsError(
            f"{source}: rating {rating!r} and timestamp {time!r}; numbers are needed"
        ) from None
